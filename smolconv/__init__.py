"""smolconv: rewrite, verify and continue checkpoints of SmolLM2 and SmolLM3."""

__version__ = "0.1.0"
