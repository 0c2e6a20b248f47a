"""The streaming embedder: one row in, one row group out.

How it works:

- A file that is the only value of its leaf in a row group, as the volumes of large rows are, is mapped: the Parquet encoder copies from
  the page cache. Reading it first costs a third more time and holds it a third time, beside the encoder's copy and the page. The
  pages are given back while they are copied. Its size is compared when it is mapped and its time stamp when it is written; a file
  that is cut short in between (milliseconds) kills the process with SIGBUS, which leaves nothing but a temporary file.
- All others have to be side by side in memory. Their sizes are known (`shards.value_nbytes`), so they are read into one buffer that
  is allocated once and used again for the next row group; the Arrow values are views of it.
- Volume leaves are written plain: no compression, no dictionary, no statistics (which alone would cost three quarters of the
  throughput). The other leaves are written as `datasets` writes them.
- Row groups follow bytes: large rows have one each, small rows share one.
"""

import functools
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, config
from datasets.features.features import FeatureType
from datasets.formatting import query_table

from .shards import (
    Leaf,
    Refusal,
    Shard,
    canonical,
    download_config,
    embedded_nbytes,
    embeds,
    holds_file,
    leaves,
    list_feature,
    local_path,
    raise_refusals,
    refuse_content,
    stored_file,
    value_nbytes,
)
from .storage import open_file


ROW_GROUP_NBYTES = 32 * 1000**2
"""Rows share a row group up to this size (bytes). A reader has to take a row group whole: this is what it waits for and holds before
the first row. The Hub's viewer scans at most 300 MB for a page of 100 rows, which leaves 3 MB a row: far more than one row group."""

READ_NBYTES = 8 * 1024**2
"""Files are read in pieces of this size (bytes), so that a progress bar moves inside a large file."""

MAP_FROM = 1000**2
"""Files from this size (bytes) on are mapped if they are the only value of their leaf; below it, setting up costs more than it gives."""

GIVE_BACK_FROM = 128 * 1000**2
"""Mapped files from this size (bytes) on give their pages back while they are copied. The Parquet encoder holds a value twice; with
the mapped pages a row would exceed 2.5 x its size + 250 MB from 190 MB on."""

CDC_BELOW = 1024**2
"""Content-defined chunking is on if rows are smaller than this (bytes; the largest chunk pyarrow cuts). Above it every value is a page
of its own either way, and looking for the cuts costs a third of the throughput."""

REUSE_MS = 10_000
"""The encoder takes and gives back the memory of two rows for every row. Kept for so long (milliseconds), it is there for the next one
instead of being zeroed by the kernel again, which would cost a quarter of the throughput."""

Progress = Callable[[int], None]


def write_shard(dataset: Dataset, shard: Shard, path: str, *, progress: Progress | None = None) -> None:
    """Write one Parquet file with the rows of `shard`, files embedded.

    The same rows give the same file, byte for byte, under one release of pyarrow. The memory it takes depends on the largest row.

    Args:
        dataset: The dataset that `shard` was planned for.
        path: Where to write; an existing file is overwritten. The caller renames it when it is complete.
        progress: Called with the number of embedded bytes as they are read.

    Raises:
        ValueError: A file cannot be stored, or has changed since the shard was planned; names the file, row and column.
    """
    row_nbytes = embedded_nbytes(dataset, shard.start, shard.stop)
    if int(row_nbytes.sum()) != shard.nbytes:
        raise ValueError(
            f"The files of rows {shard.start}-{shard.stop - 1} have {int(row_nbytes.sum()):,} bytes, but had {shard.nbytes:,} when "
            f"shard {shard.index} of {shard.num_shards} was planned: they were changed in between. Start again from the planning."
        )
    with parquet_writer(path, dataset.features, row_nbytes) as writer:
        for table in row_groups(dataset, shard.start, row_nbytes, progress):
            writer.write_table(table, row_group_size=max(len(table), 1))


def embed_array(
    array: pa.Array,
    feature: FeatureType,
    *,
    column: str = "",
    rows: np.ndarray | None = None,
    token_per_repo_id: dict | None = None,
    local_files: bool = True,
    remote_files: bool = True,
    arena: "Arena | None" = None,
    progress: Progress | None = None,
) -> pa.Array:
    """`array` with the bytes of all files that it names; less than 2 GiB in each leaf.

    Args:
        array: Any layout: sliced, with nulls, `List`, `LargeList`, fixed-size list, struct, list of struct.
        rows: The row of each element, for error messages; 0, 1, ... by default.
        arena: Where to put the bytes; by default memory of its own.

    Raises:
        FileNotFoundError: Files are missing; all of them are listed with their row.
        ValueError: Values cannot be stored; all of them are listed with their row.
    """
    rows = np.arange(len(array)) if rows is None else rows
    options = {"token_per_repo_id": token_per_repo_id, "local_files": local_files, "remote_files": remote_files}
    sizes: list[tuple[np.ndarray, np.ndarray]] = []
    refusals: list[Refusal] = []
    for leaf in leaves(array, feature, column, rows):
        sizes.append(value_nbytes(leaf, refusals, **options))
    raise_refusals(refusals, missing_as=FileNotFoundError)
    for nbytes, from_file in sizes:
        if from_file.any() and nbytes.sum() > np.iinfo(np.int32).max:
            raise ValueError(
                f"{int(nbytes.sum()):,} bytes do not fit into one Arrow array (2 GiB): embed fewer rows at a time, or use "
                "`datasets.table.embed_table_storage`, which returns chunks."
            )
    arena = arena or Arena(sum(int(nbytes.sum()) for nbytes, from_file in sizes if from_file.any()))
    found = iter(sizes)

    def build(array: pa.Array, feature: FeatureType, column: str, rows: np.ndarray) -> pa.Array:
        if isinstance(array, pa.ExtensionArray):
            return array.type.wrap_array(build(array.storage, feature, column, rows)) if embeds(feature) else array
        if holds_file(feature):
            leaf = Leaf(column, feature, canonical(array, feature), rows)
            return _embed_leaf(leaf, *next(found), arena, progress, **options)
        if pa.types.is_null(array.type) or not embeds(feature):
            return array
        if hasattr(feature, "embed_storage"):
            return feature.embed_storage(array, **options)
        if isinstance(feature, dict):
            children = [
                build(child, feature[field.name], f"{column}.{field.name}", rows) if field.name in feature else child
                for field, child in zip(array.type, array.flatten())
            ]
            fields = [field.with_type(child.type) for field, child in zip(array.type, children)]
            return pa.StructArray.from_arrays(children, fields=fields, mask=array.is_null())
        inner = list_feature(feature)
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        values = build(pc.list_flatten(array), inner, column, np.repeat(rows, lengths))
        return _as_lists(array, lengths, values)

    try:
        return build(array, feature, column, rows)
    finally:
        build = None  # it refers to itself: a cycle that would keep the arena until the garbage collector comes by


class Arena:
    """Memory for the files of one row group, used again for the next."""

    def __init__(self, nbytes: int = 0, can_map: bool = False):
        self.can_map = can_map and hasattr(mmap, "MADV_DONTNEED")
        self._memory = np.empty(nbytes, dtype=np.uint8)
        self._used = 0
        self._mapped: list[_MappedFile] = []

    def reset(self, nbytes: int) -> None:
        """Forget what was handed out; make room for `nbytes`."""
        while self._mapped:
            self._mapped.pop().check()
        if len(self._memory) < nbytes:
            self._memory = None  # freed before the larger one is there
            self._memory = np.empty(nbytes, dtype=np.uint8)
        self._used = 0

    def take(self, nbytes: int) -> np.ndarray:
        if self._used + nbytes > len(self._memory):
            return np.empty(nbytes, dtype=np.uint8)  # the size was an estimate (remote files)
        self._used += nbytes
        return self._memory[self._used - nbytes : self._used]

    def close(self) -> None:
        for mapped in self._mapped:
            mapped.stop()

    def map(self, path: str, nbytes: int, where: str) -> pa.Buffer:
        """The file as a buffer, without reading it; valid until `reset`."""
        self._mapped.append(_MappedFile(path, nbytes, where))
        return pa.py_buffer(self._mapped[-1].map)


class _MappedFile:
    """A mapped file whose pages are given back while it is copied out, so that it never is in memory as a whole."""

    def __init__(self, path: str, nbytes: int, where: str):
        self._path, self._where = path, where
        with open(path, "rb") as f:
            status = os.fstat(f.fileno())
            if status.st_size != nbytes:
                raise _changed(where, nbytes)
            self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._state = _state(status)
        self._done = threading.Event()
        if nbytes >= GIVE_BACK_FROM:
            threading.Thread(target=self._give_back, name="give-back", daemon=True).start()

    def _give_back(self) -> None:
        while not self._done.wait(0.01):
            self.map.madvise(mmap.MADV_DONTNEED)  # pages of a file: those still needed come back from the page cache

    def stop(self) -> None:
        self._done.set()

    def check(self) -> None:
        """Raise if the file is no longer what it was when it was mapped."""
        self.stop()
        if _state(os.stat(self._path)) != self._state:
            raise _changed(self._where, len(self.map))


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _changed(where: str, nbytes: int) -> ValueError:
    return ValueError(
        f"{where} changed while it was read: it had {nbytes:,} bytes. Try again when nothing writes to it."
    )


def _embed_leaf(
    leaf: Leaf,
    sizes: np.ndarray,
    from_file: np.ndarray,
    arena: Arena,
    progress: Progress | None,
    token_per_repo_id: dict | None,
    local_files: bool,
    remote_files: bool,
) -> pa.StructArray:
    values = leaf.values
    bytes_, paths = values.field("bytes"), values.field("path")
    path_list = paths.to_pylist()
    if from_file.any():
        offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
        ends = np.cumsum(sizes, out=offsets[1:])
        where = [f"row {row}, column '{leaf.column}': {path}" for row, path in zip(leaf.rows, path_list)]
        (only,) = np.flatnonzero(sizes) if np.count_nonzero(sizes) == 1 else (None,)
        local = local_path(path_list[only]) if only is not None and from_file[only] else None
        if arena.can_map and local is not None and sizes[only] >= MAP_FROM:
            data = arena.map(local, int(sizes[only]), where[only])
            if progress is not None:
                progress(len(data))
        else:
            data = arena.take(int(sizes.sum()))
            present = _binary_views(bytes_)
            for i in np.flatnonzero(sizes).tolist():
                target = data[ends[i] - sizes[i] : ends[i]]
                if from_file[i]:
                    _read_into(path_list[i], memoryview(target), where[i], token_per_repo_id, progress)
                else:
                    target[:] = present(i)
                    if progress is not None:
                        progress(len(target))
        is_null = ~(from_file | bytes_.is_valid().to_numpy(zero_copy_only=False))
        validity = pa.array(~is_null).buffers()[1] if is_null.any() else None
        bytes_ = pa.Array.from_buffers(pa.binary(), len(sizes), [validity, pa.py_buffer(offsets), pa.py_buffer(data)])
    elif progress is not None and sizes.any():
        progress(int(sizes.sum()))
    new_paths = [
        path
        if path is None or not (local_files if local_path(path) is not None else remote_files)
        else _basename(path)
        for path in path_list
    ]
    paths = pa.array(new_paths, type=pa.string())
    children = {"bytes": bytes_, "path": paths}
    fields = list(leaf.feature.pa_type)
    return pa.StructArray.from_arrays([children[f.name] for f in fields], fields=fields, mask=values.is_null())


def _basename(path: str) -> str:
    # Of `zip://sub-01.nii::/data.zip` the inner name says what the bytes are.
    return os.path.basename(stored_file(path).split("::")[0])


def _binary_views(array: pa.Array) -> Callable[[int], np.ndarray]:
    """Gives the bytes of one element without copying them."""
    _, offsets_buffer, data_buffer = array.buffers()
    if data_buffer is None:
        data_buffer = pa.py_buffer(b"")
    if offsets_buffer is None:
        offsets_buffer = pa.py_buffer(bytes(4 * (array.offset + len(array) + 1)))
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[array.offset :]
    data = np.frombuffer(data_buffer, dtype=np.uint8)
    return lambda i: data[offsets[i] : offsets[i + 1]]


def _read_into(
    path: str, target: memoryview, where: str, token_per_repo_id: dict | None, progress: Progress | None
) -> None:
    """Fill `target` with the file, which must have exactly its size."""
    local = local_path(path)
    try:
        f = (
            open(local, "rb", buffering=0)
            if local is not None
            else open_file(stored_file(path), download_config(path, token_per_repo_id))
        )
        with f:
            before = _state(os.fstat(f.fileno())) if local is not None else None
            done = 0
            while done < len(target):
                piece = target[done : done + READ_NBYTES]
                if local is not None:
                    n = f.readinto(piece)
                else:
                    data = f.read(len(piece))
                    n = len(data)
                    piece[:n] = data
                if not n:
                    break
                done += n
                if progress is not None:
                    progress(n)
            same = done == len(target) and not f.read(1)
            if local is not None:
                same = same and _state(os.fstat(f.fileno())) == before
    except OSError as e:
        raise type(e)(e.errno, f"{where} cannot be read: {e.strerror or e}") from e
    if not same:
        raise _changed(where, len(target))
    if (reason := refuse_content(bytes(target[:256]))) is not None:
        raise ValueError(f"{where} {reason}")


def _as_lists(array: pa.Array, lengths: np.ndarray, values: pa.Array) -> pa.Array:
    """`array` with its elements (nulls and what lies outside the slice removed) replaced by `values`."""
    element = array.type.value_field.with_type(values.type)
    mask = array.is_null() if array.null_count else None
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        if mask is not None:
            # A null list has a place among the values of a fixed-size list.
            valid = np.repeat(array.is_valid().to_numpy(zero_copy_only=False), size)
            places = np.cumsum(valid) - 1
            values = values.take(pa.array(places, mask=~valid))
        return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(element, size), mask=mask)
    large = pa.types.is_large_list(array.type)
    offsets = np.zeros(len(array) + 1, dtype=np.int64 if large else np.int32)
    np.cumsum(lengths, out=offsets[1:])
    if large:
        return pa.LargeListArray.from_arrays(pa.array(offsets), values, type=pa.large_list(element), mask=mask)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(element), mask=mask)


# Parquet


def row_groups(
    dataset: Dataset,
    start: int,
    row_nbytes: np.ndarray,
    progress: Progress | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> Iterator[pa.Table]:
    """The rows from `start` on, embedded, one table for each row group. A table is good until the next one is asked for.

    Args:
        row_nbytes: Their sizes, which also say how many rows.
        max_rows: No more rows in a group.
        options: `token_per_repo_id`, `local_files`, `remote_files` as in `embed_array`.
    """
    arena = Arena(can_map=True)
    try:
        for first, last in group_rows(row_nbytes, ROW_GROUP_NBYTES, max_rows):
            table = query_table(dataset.data, slice(start + first, start + last), indices=dataset._indices)
            arena.reset(int(row_nbytes[first:last].sum()))
            yield embed_table(table, dataset.features, start + first, arena=arena, progress=progress, **options)
        arena.reset(0)
    finally:
        arena.close()


def embed_table(table: pa.Table, features: Features, first_row: int = 0, **options: Any) -> pa.Table:
    """`table` with the bytes of all files that it names; its first row is row `first_row`. Options as in `embed_array`."""
    schema = features.arrow_schema
    columns = []
    for name, feature in features.items():
        column = table.column(name)
        if embeds(feature):
            chunks, row = [], first_row
            for chunk in column.chunks:
                rows = np.arange(row, row + len(chunk))
                chunks.append(embed_array(chunk, feature, column=name, rows=rows, **options))
                row += len(chunk)
            column = pa.chunked_array(chunks, type=schema.field(name).type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def group_rows(row_nbytes: Iterable[int], bound: int, max_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut rows into runs `(start, stop)` of at most `bound` bytes (and `max_rows` rows); a row over it is a run of its own."""
    start, nbytes, i = 0, 0, -1
    for i, n in enumerate(row_nbytes):
        if i > start and (nbytes + n > bound or i - start == max_rows):
            yield start, i
            start, nbytes = i, 0
        nbytes += int(n)
    if i >= 0:
        yield start, i + 1


def parquet_writer(where: Any, features: Features, row_nbytes: np.ndarray, **options: Any) -> pq.ParquetWriter:
    """A writer of the schema of `datasets` (with its metadata); `options` override what this module thinks best."""
    schema = features.arrow_schema
    chunking = options.pop("use_content_defined_chunking", None)
    if chunking is None:
        small = len(row_nbytes) == 0 or np.median(row_nbytes) < CDC_BELOW
        chunking = config.DEFAULT_CDC_OPTIONS if small else False
    writer = pq.ParquetWriter(
        where,
        schema=schema,
        **{
            "memory_pool": _encoder_memory(),
            "use_content_defined_chunking": chunking,
            "write_page_index": True,
            **column_options(features, schema),
            **options,
        },
    )
    if chunking is not False:
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(chunking)})
    return writer


@functools.cache
def _encoder_memory() -> pa.MemoryPool:
    """The one pool of pyarrow that can be told to keep memory, where it is built in."""
    if "jemalloc" not in pa.supported_memory_backends():
        return pa.default_memory_pool()
    pa.jemalloc_set_decay_ms(REUSE_MS)
    return pa.jemalloc_memory_pool()


def column_options(features: Features, schema: pa.Schema) -> dict:
    """Options of `pq.ParquetWriter` by leaf: the bytes of embedded files plain and without statistics, all others as usual."""
    options: dict[str, Any] = {"compression": {}, "use_dictionary": [], "column_encoding": {}, "write_statistics": []}
    for field in schema:
        for leaf, plain in _parquet_leaves(field.name, field.type, features[field.name]):
            options["compression"][leaf] = "none" if plain else "snappy"
            if plain:
                options["column_encoding"][leaf] = "PLAIN"
            else:
                options["use_dictionary"].append(leaf)
                options["write_statistics"].append(leaf)
    return options


def _parquet_leaves(path: str, pa_type: pa.DataType, feature: FeatureType) -> Iterator[tuple[str, bool]]:
    """The paths of the Parquet leaves, and whether each holds the bytes of embedded files."""
    if isinstance(pa_type, pa.ExtensionType):
        pa_type = pa_type.storage_type
    if pa.types.is_struct(pa_type):
        file = holds_file(feature)
        for field in pa_type:
            if file:
                yield f"{path}.{field.name}", field.name == "bytes"
            else:
                inner = feature.get(field.name) if isinstance(feature, dict) else None
                yield from _parquet_leaves(f"{path}.{field.name}", field.type, inner)
    elif pa.types.is_list(pa_type) or pa.types.is_large_list(pa_type) or pa.types.is_fixed_size_list(pa_type):
        yield from _parquet_leaves(f"{path}.list.element", pa_type.value_type, list_feature(feature))
    else:
        yield path, False
