"""Plan shards from true byte counts, and refuse what cannot be stored before anything is written.

How it works:

- A *value* is one `{"bytes", "path"}` struct of a feature that embeds files (Nifti, Image, Audio, Video, Pdf, Mesh, ...), at any
  depth. `leaves` finds them all, with the row each belongs to.
- The size of a value is the length of its bytes, or what `stat` says of its file: nothing is read, except the first bytes of files
  so small that they may be a pointer or an error page instead of an image.
- `plan_shards` cuts the rows, in order, where the next one would exceed the bound.
"""

import bz2
import gzip
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DownloadConfig, LargeList, List, Nifti, config
from datasets.features.features import FeatureType
from datasets.formatting import query_table
from datasets.utils.file_utils import is_local_path, xgetsize
from datasets.utils.py_utils import convert_file_size_to_int, string_to_dict

from .storage import options_for


MAX_CELL_NBYTES = 2**31 - 1 - 2**20
"""A Parquet page is limited to 2^31 - 1 bytes, and one row's values of a column are one page: they and their lengths and levels
(for which 1 MiB is kept) must fit in."""

SNIFF_BELOW = 64 * 1024
"""Files below this size (bytes) are looked into: git-annex and LFS pointers have 130-300 bytes, error pages a few thousand."""

REMOTE_SAMPLE = 1000
"""Remote files whose sizes are looked up for an estimate, as many as `datasets` looks at."""

BATCH_ROWS = 10_000
"""Rows whose sizes are looked up at a time."""


@dataclass(frozen=True)
class Shard:
    """Rows `[start, stop)` of a split, shard `index` of `num_shards`. `nbytes` is their true size once files are embedded."""

    index: int
    num_shards: int
    start: int
    stop: int
    nbytes: int


@dataclass(frozen=True)
class Refusal:
    """Why one value cannot be stored, and what to do about it."""

    row: int
    column: str
    path: str | None
    reason: str
    missing: bool = False

    def __str__(self) -> str:
        return f"row {self.row}, column '{self.column}': {self.path or '(no path)'} {self.reason}"


@dataclass(frozen=True)
class Leaf:
    """The values of one embedding feature inside a column: `values[i]` belongs to row `rows[i]`."""

    column: str
    feature: FeatureType
    values: pa.StructArray
    rows: np.ndarray


def embedded_nbytes(
    dataset: Dataset,
    start: int = 0,
    stop: int | None = None,
    *,
    local_files: bool = True,
    remote_files: bool = True,
    remote_sample: int | None = None,
    inspect: Callable[[str], str | None] | None = None,
) -> np.ndarray:
    """The size of each row once its files are embedded.

    Args:
        dataset: Any map-style dataset; its format does not matter.
        start, stop: Only rows `[start, stop)`.
        local_files, remote_files: Whether these are to be embedded.
        remote_sample: Ask for the sizes of this many remote files only (each is a request), and take the mean for the others.
        inspect: Says of a local file in a column of `Nifti` why it is no image, or None.

    Returns:
        int64, one per row: bytes of the embedded files and, roughly, of the other columns.

    Raises:
        ValueError: Lists every file that cannot be stored, with its row and column and what to do.
    """
    stop = len(dataset) if stop is None else stop
    refusals: list[Refusal] = []
    nbytes = _row_nbytes(dataset, start, stop, refusals, local_files, remote_files, remote_sample, inspect)
    raise_refusals(refusals)
    return nbytes


def estimate_nbytes(dataset: Dataset) -> int:
    """The size of the dataset once its files are embedded, remote ones by a sample of `REMOTE_SAMPLE`. Files that cannot be stored
    count as nothing; no error is raised."""
    return int(_row_nbytes(dataset, 0, len(dataset), None, True, True, REMOTE_SAMPLE).sum())


def plan_shards(
    row_nbytes: Any, max_shard_size: int | str | None = None, num_shards: int | None = None
) -> list[Shard]:
    """Cut rows into shards: every row once, in order, no shard over the bound unless one row is, never more shards than rows.

    Args:
        row_nbytes: Size of each row (bytes), as from `embedded_nbytes`.
        max_shard_size: The bound, e.g. `"500MB"` (the default of `datasets`) or a number of bytes.
        num_shards: Cut into this many shards of about equal size instead (fewer if there are fewer rows).

    Returns:
        At least one shard: no rows make one empty shard, so that the split and its features exist.
    """
    if max_shard_size is not None and num_shards is not None:
        raise ValueError("Please specify either max_shard_size or num_shards, but not both.")
    row_nbytes = np.asarray(row_nbytes, dtype=np.int64)
    ends = np.cumsum(row_nbytes)
    total = int(ends[-1]) if len(ends) else 0
    stops: list[int] = []
    if num_shards is not None:
        if num_shards < 1:
            raise ValueError(f"num_shards must be at least 1, got {num_shards}")
        num_shards = max(1, min(num_shards, len(ends)))
        for i in range(1, num_shards):
            nearest = int(np.searchsorted(ends, total * i / num_shards, side="right"))
            stops.append(min(max(nearest, (stops[-1] if stops else 0) + 1), len(ends) - num_shards + i))
    else:
        bound = convert_file_size_to_int(config.MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
        if bound < 1:
            raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
        start = 0
        while True:
            before = int(ends[start - 1]) if start else 0
            start = max(int(np.searchsorted(ends, before + bound, side="right")), start + 1)
            if start >= len(ends):
                break
            stops.append(start)
    stops.append(len(ends))
    starts = [0, *stops[:-1]]
    return [
        Shard(index=i, num_shards=len(stops), start=a, stop=b, nbytes=int(row_nbytes[a:b].sum()))
        for i, (a, b) in enumerate(zip(starts, stops))
    ]


# Where the embedded values are


def leaves(array: pa.Array, feature: FeatureType, column: str, rows: np.ndarray) -> Iterator[Leaf]:
    """All values of embedding features in `array`, at any depth, with the row each belongs to.

    Args:
        array: Any layout: sliced, with nulls, `List`, `LargeList`, fixed-size list, struct, list of struct.
        rows: The row of each element of `array`.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if holds_file(feature):
        yield Leaf(column, feature, canonical(array, feature), rows)
    elif pa.types.is_null(array.type) or not embeds(feature):
        return
    elif isinstance(feature, dict):
        for name, child in zip([field.name for field in array.type], array.flatten()):
            if name in feature:
                yield from leaves(child, feature[name], f"{column}.{name}", rows)
    elif (inner := list_feature(feature)) is not None:
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        yield from leaves(pc.list_flatten(array), inner, column, np.repeat(rows, lengths))


def list_feature(feature: FeatureType) -> FeatureType | None:
    """The feature of the elements if `feature` is a kind of list, else None."""
    if isinstance(feature, List | LargeList):
        return feature.feature
    if isinstance(feature, list | tuple):
        return feature[0]
    return None


def canonical(array: pa.Array, feature: FeatureType) -> pa.StructArray:
    """`array` in the feature's own storage type (`struct<bytes: binary, path: string>`)."""
    return array if array.type == feature.pa_type else feature.cast_storage(array)


def holds_file(feature: FeatureType) -> bool:
    """True if a value of `feature` is one file (its bytes, its path, or both), as in all features of `datasets` that embed."""
    # Not by `embed_storage`: in 4.4.1 neither Nifti nor Video has one.
    pa_type = getattr(feature, "pa_type", None)
    return (
        isinstance(pa_type, pa.StructType)
        and {field.name for field in pa_type} == {"bytes", "path"}
        and type(feature).__module__.startswith("datasets.")
    )


def embeds(feature: FeatureType) -> bool:
    """True if values of `feature` hold files at any depth."""
    if isinstance(feature, dict):
        return any(embeds(f) for f in feature.values())
    inner = list_feature(feature)
    return embeds(inner) if inner is not None else holds_file(feature) or hasattr(feature, "embed_storage")


# What a value weighs, and whether it can be stored


def value_nbytes(
    leaf: Leaf,
    refusals: list[Refusal] | None,
    token_per_repo_id: dict | None = None,
    local_files: bool = True,
    remote_files: bool = True,
    remote_size: Callable[[str, dict | None], int] | None = None,
    inspect: Callable[[str], str | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of a leaf's values and which of them have to be read from a file.

    Args:
        refusals: Gets what cannot be stored. None: such values count as nothing, in silence.

    Returns:
        int64 sizes, and a bool array that is True where the bytes come from the path.
    """
    bytes_, paths = (leaf.values.field(name) for name in ("bytes", "path"))
    valid = leaf.values.is_valid().to_numpy(zero_copy_only=False)
    has_bytes = valid & bytes_.is_valid().to_numpy(zero_copy_only=False)
    sizes = np.where(has_bytes, pc.binary_length(bytes_).fill_null(0).to_numpy(zero_copy_only=False), 0).astype(
        np.int64
    )
    from_file = np.zeros(len(sizes), dtype=bool)

    def refuse(i: int, path: str | None, reason: str, missing: bool = False) -> None:
        if refusals is not None:
            refusals.append(Refusal(int(leaf.rows[i]), leaf.column, path, reason, missing))

    for i in np.flatnonzero(valid & (sizes == 0)).tolist():
        path = paths[i].as_py()
        if has_bytes[i]:
            refuse(
                i, path, "has bytes that are empty (b''): set them to None to take the file's, or the value to None"
            )
            continue
        if path is None:
            refuse(i, path, "has neither bytes nor a path: give one of them, or set the value to None")
            continue
        local = local_path(path)
        if not (local_files if local is not None else remote_files):
            continue
        from_file[i] = True
        try:
            sizes[i] = (
                _local_size(local, isinstance(leaf.feature, Nifti) and refusals is not None, refusals is not None)
                if local is not None
                else (remote_size or _remote_size)(path, token_per_repo_id)
            )
            if local is None and sizes[i] == 0 and refusals is not None:
                raise _Unstorable("is empty (0 bytes): get it again, or set the value to None")
            if inspect is not None and local is not None and isinstance(leaf.feature, Nifti):
                reason = inspect(local)
                if reason is not None:
                    refuse(i, path, reason)
        except _Unstorable as e:
            refuse(i, path, str(e))
        except FileNotFoundError:
            fetch = " (a link to content that is not here: fetch it, e.g. with `datalad get`)"
            hint = fetch if local is not None and os.path.islink(local) else ""
            refuse(i, path, f"does not exist{hint}", missing=True)
        except OSError as e:
            refuse(i, path, f"cannot be opened: {e.strerror or e}")
    if refusals is not None and sizes.sum() > MAX_CELL_NBYTES:
        for i in np.flatnonzero(sizes > MAX_CELL_NBYTES).tolist():
            refuse(
                i,
                paths[i].as_py(),
                f"has {sizes[i]:,} bytes; a value must stay below 2 GiB: compress it (.nii.gz), split it, or leave it out",
            )
        rows, inverse = np.unique(leaf.rows, return_inverse=True)
        cells = np.bincount(inverse, weights=np.where(sizes > MAX_CELL_NBYTES, 0, sizes + 4)).astype(np.int64)
        for k in np.flatnonzero(cells > MAX_CELL_NBYTES).tolist():
            first = int(np.flatnonzero(inverse == k)[0])
            refuse(
                first,
                paths[first].as_py(),
                f"and the other {np.count_nonzero(inverse == k) - 1} files of this list have {cells[k]:,} bytes together; a list "
                "must stay below 2 GiB: compress them, spread them over columns, or give each file a row of its own",
            )
    return sizes, from_file


def raise_refusals(refusals: list[Refusal], missing_as: type[Exception] = ValueError) -> None:
    """Raise one error that lists all of `refusals`, if there are any; `missing_as` if all of them are missing files."""
    if refusals:
        ordered = sorted(refusals, key=lambda r: r.row)
        text = "\n  ".join(str(r) for r in ordered)
        count = f"{len(ordered)} files cannot be stored:\n  " if len(ordered) > 1 else "Cannot store "
        raise (missing_as if all(r.missing for r in ordered) else ValueError)(count + text)


def stored_file(path: str) -> str:
    """The file that `path` takes its bytes from. Streaming names a compressed file `gzip://a.nii::/b/a.nii.gz`: it is stored as
    it is, since the bytes of `a.nii` are not those on disk, and their number is not known before they are all inflated."""
    return re.sub(r"^(gzip|bz2|xz|lz4|zstd)://[^:]*::", "", path)


def local_path(path: str) -> str | None:
    """The path in the local file system that `path` names, or None if it has to be opened as a URL (`hf://`, `zip://a::b`, ...)."""
    path = stored_file(path)
    if path.startswith("file://") and "::" not in path:
        return url2pathname(urlparse(path).path)
    return path if is_local_path(path) else None


def download_config(path: str, token_per_repo_id: dict | None) -> DownloadConfig:
    """The credentials for a URL: `datasets` keeps one token for each repository, `storage` the options of each root."""
    source_url = path.split("::")[-1]
    pattern = config.HUB_DATASETS_URL if source_url.startswith(config.HF_ENDPOINT) else config.HUB_DATASETS_HFFS_URL
    fields = string_to_dict(source_url, pattern)
    token = (token_per_repo_id or {}).get(fields["repo_id"]) if fields is not None else None
    return DownloadConfig(token=token, storage_options=options_for(path))


def refuse_content(head: bytes) -> str | None:
    """Why a file that starts with `head` stands in place of the file that was meant, or None."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git-LFS pointer, not the file itself: run `git lfs pull`"
    if re.match(rb"(\.\./)*(\.git/annex/objects/|/annex/objects/)", head):
        return "is a git-annex pointer, not the file itself: run `datalad get` or `git annex get`"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)[\s>]", head, re.IGNORECASE):
        return "is an HTML page (an error page of a download?), not the file itself: download it again"
    return None


class _Unstorable(Exception):
    pass


def _remote_size(path: str, token_per_repo_id: dict | None) -> int:
    return xgetsize(stored_file(path), download_config=download_config(path, token_per_repo_id))


class _Sample:
    """Asks for the sizes of the first `count` remote files and answers with their mean from then on."""

    def __init__(self, count: int):
        self._left, self._sizes = count, []

    def __call__(self, path: str, token_per_repo_id: dict | None) -> int:
        if not self._left:
            return sum(self._sizes) // max(len(self._sizes), 1)
        self._left -= 1
        self._sizes.append(_remote_size(path, token_per_repo_id))
        return self._sizes[-1]


_PAIR_HALF = re.compile(r"\.(img|hdr)(\.gz|\.bz2)?$", re.IGNORECASE)


def _local_size(path: str, is_nifti: bool, check: bool) -> int:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise _Unstorable("is a directory, not a file: give the path of the file in it")
    if not check:
        return status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise _Unstorable("is not a regular file")
    if status.st_size == 0:
        raise _Unstorable("is empty (0 bytes): get it again, or set the value to None")
    if status.st_size < SNIFF_BELOW:
        with open(path, "rb") as f:
            reason = refuse_content(f.read(256))
        if reason is not None:
            raise _Unstorable(reason)
    if is_nifti and (half := _PAIR_HALF.search(path)) is not None:
        opener = {".gz": gzip.open, ".bz2": bz2.open}.get((half[2] or "").lower(), open)
        try:
            with opener(path, "rb") as f:
                header = f.read(348)
        except (OSError, EOFError) as e:
            raise _Unstorable(f"cannot be read: {e}") from None
        # Single-file images say so in their magic; a pair says "ni1"/"ni2", and Analyze nothing.
        if header[344:347] != b"n+1" and header[4:7] != b"n+2":
            raise _Unstorable(
                "is one half of a .hdr/.img pair, and a value holds one file: convert the pair, e.g. "
                "`nibabel.save(nibabel.load(path), 'name.nii.gz')`"
            )
    return status.st_size


def _row_nbytes(
    dataset: Dataset,
    start: int,
    stop: int,
    refusals: list[Refusal] | None,
    local_files: bool,
    remote_files: bool,
    remote_sample: int | None,
    inspect: Callable[[str], str | None] | None = None,
) -> np.ndarray:
    remote_size = None if remote_sample is None else _Sample(remote_sample)
    table = dataset.data
    others = [name for name, feature in dataset.features.items() if not embeds(feature)]
    nbytes = np.zeros(stop - start, dtype=np.int64)
    if len(others) == len(dataset.features):
        return nbytes + sum(table.column(name).nbytes for name in others) // max(len(table), 1)
    for first in range(start, stop, BATCH_ROWS):
        last = min(first + BATCH_ROWS, stop)
        batch = query_table(table, slice(first, last), indices=dataset._indices)
        for leaf in table_leaves(batch, dataset.features, first):
            sizes, _ = value_nbytes(leaf, refusals, None, local_files, remote_files, remote_size, inspect)
            np.add.at(nbytes, leaf.rows - start, sizes)
        for name in others:
            row = first - start
            for chunk in batch.column(name).chunks:
                nbytes[row : row + len(chunk)] += _element_nbytes(chunk)
                row += len(chunk)
    return nbytes


def _element_nbytes(array: pa.Array) -> np.ndarray:
    """About what each element weighs. It follows from the element alone, so that a row weighs the same in whatever slice or copy
    of a table it is looked up."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    pa_type = array.type
    if pa.types.is_struct(pa_type):
        return sum(map(_element_nbytes, array.flatten()), np.zeros(len(array), dtype=np.int64))
    if pa.types.is_list(pa_type) or pa.types.is_large_list(pa_type) or pa.types.is_fixed_size_list(pa_type):
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        nbytes = np.full(len(array), 4, dtype=np.int64)
        np.add.at(nbytes, np.repeat(np.arange(len(array)), lengths), _element_nbytes(pc.list_flatten(array)))
        return nbytes
    if any(
        is_(pa_type)
        for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ):
        return 4 + pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.full(len(array), 8, dtype=np.int64)


def table_leaves(table: pa.Table, features: dict, first_row: int) -> Iterator[Leaf]:
    """All leaves of a table, chunk by chunk; its first row is row `first_row`."""
    for name, feature in features.items():
        if embeds(feature):
            row = first_row
            for chunk in table.column(name).chunks:
                yield from leaves(chunk, feature, name, np.arange(row, row + len(chunk)))
                row += len(chunk)
