"""BIDS trees of brain images as Hugging Face datasets."""

__version__ = "0.1.0"

from . import loading, patching
from .bids import BidsBuilder, BidsConfig
from .dataset import BidsDataset, build_hf_dataset
from .index import find_all_niftis, find_nifti
from .upload import push_dataset_to_hub


__all__ = [
    "BidsBuilder",
    "BidsConfig",
    "BidsDataset",
    "build_hf_dataset",
    "find_all_niftis",
    "find_nifti",
    "push_dataset_to_hub",
]

loading.install()
patching.apply()
