"""The version, which every document that smolconv writes names."""

__version__ = "0.1.0"
