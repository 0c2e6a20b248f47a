"""BIDS trees of brain images as Hugging Face datasets."""

__version__ = "0.1.0"
