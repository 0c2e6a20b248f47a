"""Datasets without a builder directory: from a tree and a schema, or from a table of files."""

import os
from collections.abc import Mapping
from typing import Any

import datasets
import pandas as pd
from huggingface_hub import CommitInfo

from .pictures import as_table
from .upload import push_dataset_to_hub


class BidsDataset(datasets.Dataset):
    """A `datasets.Dataset` made from a tree of brain images."""

    @classmethod
    def from_bids(
        cls,
        bids_root: str | os.PathLike,
        schema: Mapping[str, Any],
        metadata_from: str | Mapping[str, Any] | list[Any] | None = None,
        row: str | None = None,
        split: str = "train",
        **config_kwargs: Any,
    ) -> "BidsDataset":
        """
        Args:
            bids_root (`str` or `os.PathLike`): root of the tree
            schema (`dict`): column -> where its file is; see `datasets_bids.schema`
            metadata_from (`str`, `dict` or `list`, *optional*): tables of participants, relative to the root
            row (`"subject"` or `"session"`, *optional*): what one row is
            split (`str`, defaults to `"train"`): the split to return
            **config_kwargs: further fields of [`BidsConfig`]

        Returns:
            `BidsDataset`: one example a row, images as paths until they are pushed

        Raises:
            ValueError: a mistake in the schema, or files that do not fit it
            FileNotFoundError: there is no such root
        """
        dataset = datasets.load_dataset(
            "bids",
            data_dir=os.fspath(bids_root),
            schema=dict(schema),
            metadata_from=metadata_from,
            row=row,
            split=split,
            **config_kwargs,
        )
        return cls(dataset.data, dataset.info, dataset.split, dataset._indices, dataset._fingerprint)

    def push_to_hub(self, repo_id: str, config_name: str = "default", **kwargs: Any) -> CommitInfo:
        """Pushes with [`push_dataset_to_hub`], which see for the arguments: `split`, `private`, `token`, `revision`,
        `create_pr`, `max_shard_size`, `num_shards`, `embed_external_files`, `num_proc`, `commit_message` and its own."""
        return push_dataset_to_hub(self, repo_id, config_name=config_name, **kwargs)

    def _repr_html_(self) -> str:
        """A table of the first rows with thumbnails, for a notebook."""
        return as_table(self)


def build_hf_dataset(file_table: pd.DataFrame, features: datasets.Features) -> datasets.Dataset:
    """A dataset from a table of files.

    Args:
        file_table (`pandas.DataFrame`): one row an example; in columns of `Nifti` a path, in columns of
            `List(Nifti())` a list of paths, and a missing value (`None`, `NaN`, `pandas.NA`) where there is none
        features (`datasets.Features`): the columns and their types; other columns of the table are left out

    Raises:
        ValueError: the table lacks a column of the features
    """
    missing = [name for name in features if name not in file_table]
    if missing:
        raise ValueError(f"file_table has no column {', '.join(map(repr, missing))} (it has {', '.join(file_table)})")
    # By way of Python values: pandas 3 holds text as large_string, which stock `datasets` does not cast to an image.
    columns = {name: [_example_value(value) for value in file_table[name].tolist()] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def _example_value(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_example_value(item) for item in value]
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value
