"""Continued pretraining with DeepSpeed: nothing is here yet; the package is named so that the import contract holds."""
