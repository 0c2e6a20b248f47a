"""What stands in place of names of `datasets` so that its own methods embed, size and batch files by their bytes.

How it works:

- `to_parquet` (`ParquetDatasetWriter._write`) embeds, one row group at a time.
- `push_to_hub` and `save_to_disk` run as they are, on a `_PlannedDataset`: the same dataset, whose `shard` follows a plan by bytes
  instead of by row numbers. The step that embedded a whole shard in memory is left out, as writing the shard embeds it.
- Streaming datasets do the same with an `_EmbeddingIterable`.
- `ArrowWriter` gets what it is given in pieces that stay far below the 2 GiB that an Arrow array can hold.
"""

import contextlib
import copy
import functools
import inspect
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Nifti, Value, config
from datasets.arrow_writer import ArrowWriter
from datasets.io.parquet import ParquetDatasetWriter
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from datasets.utils import tqdm as hf_tqdm
from datasets.utils.py_utils import convert_file_size_to_int

from .embed import (
    ROW_GROUP_NBYTES,
    column_options,
    embed_array,
    embed_table,
    group_rows,
    parquet_writer,
    row_groups,
)
from .patching import Patch
from .shards import (
    REMOTE_SAMPLE,
    Shard,
    embedded_nbytes,
    embeds,
    estimate_nbytes,
    holds_file,
    list_feature,
    plan_shards,
    table_leaves,
    value_nbytes,
)


logger = logging.get_logger(__name__)

BATCH_NBYTES = 64 * 1000**2
"""Arrow record batches are written from this size (bytes) on: what a reader of one row touches, and what a writer holds."""

INFERENCE_NBYTES = 2**30
"""The same while the types of columns are inferred from the first batch, which therefore should be as large as it safely can."""


# Embedding


def _embed_storage(original: Callable | None) -> Callable:
    def embed_storage(
        self, storage: pa.Array, token_per_repo_id=None, local_files: bool = True, remote_files: bool = True
    ) -> pa.StructArray:
        """Embed files into the Arrow array.

        Args:
            storage (`pa.StructArray`): Any layout: sliced, with nulls, any mix of path and bytes.
            token_per_repo_id (`dict`, optional): Dictionary repo_id -> token to fetch the files bytes.
            local_files (`bool`, defaults to `True`): Whether to embed local files.
            remote_files (`bool`, defaults to `True`): Whether to embed files with URLs (`hf://`, `https://`, ...).

        Returns:
            `pa.StructArray` of the feature's type. Beyond 2 GiB, which one Arrow array cannot hold, a `pa.ChunkedArray` of them.

        Raises:
            FileNotFoundError, ValueError: Lists every value that cannot be stored, with its row.
        """
        options = {"token_per_repo_id": token_per_repo_id, "local_files": local_files, "remote_files": remote_files}
        return _in_pieces(storage, self, **options)

    return embed_storage


def _in_pieces(array: pa.Array, feature: Any, column: str = "", first_row: int = 0, **options: Any) -> Any:
    """`embed_array`, in as many pieces as Arrow arrays need."""
    pieces = []
    for start, stop in _runs_of_array(array, feature, INFERENCE_NBYTES, **options):
        rows = np.arange(first_row + start, first_row + stop)
        pieces.append(embed_array(array[start:stop], feature, column=column, rows=rows, **options))
    return pieces[0] if len(pieces) == 1 else pa.chunked_array(pieces)


def _runs_of_array(array: pa.Array, feature: Any, bound: int, **options: Any) -> list[tuple[int, int]]:
    table = pa.table({"x": array})
    sizes = np.zeros(len(array), dtype=np.int64)
    for leaf in table_leaves(table, {"x": feature}, 0):
        np.add.at(sizes, leaf.rows, value_nbytes(leaf, None, **options)[0])
    return list(group_rows(sizes, bound)) or [(0, 0)]


def _only_files(feature: Any) -> bool:
    """True if everything that embeds in `feature` is a feature of `datasets`."""
    if isinstance(feature, dict):
        return all(_only_files(f) for f in feature.values())
    inner = list_feature(feature)
    return _only_files(inner) if inner is not None else holds_file(feature) or not hasattr(feature, "embed_storage")


def _embed_array_storage(original: Callable) -> Callable:
    @functools.wraps(original)
    def embed_array_storage(
        array, feature, token_per_repo_id=None, local_files: bool = True, remote_files: bool = True
    ):
        if not _only_files(feature):
            return original(array, feature, **_known(locals()))
        options = {"token_per_repo_id": token_per_repo_id, "local_files": local_files, "remote_files": remote_files}
        if not isinstance(array, pa.ChunkedArray):
            return _in_pieces(array, feature, **options)
        chunks, row = [], 0
        for chunk in array.chunks:
            pieces = _in_pieces(chunk, feature, first_row=row, **options)
            chunks.extend(pieces.chunks if isinstance(pieces, pa.ChunkedArray) else [pieces])
            row += len(chunk)
        return pa.chunked_array(chunks, type=None if chunks else array.type)

    return embed_array_storage


def _embed_table_storage(original: Callable) -> Callable:
    @functools.wraps(original)
    def embed_table_storage(table, token_per_repo_id=None, local_files: bool = True, remote_files: bool = True):
        features = Features.from_arrow_schema(table.schema)
        if not _only_files(features) or not embeds(features):
            return original(table, **_known(locals()))
        options = {"token_per_repo_id": token_per_repo_id, "local_files": local_files, "remote_files": remote_files}
        schema = features.arrow_schema
        columns = []
        for name, feature in features.items():
            column = table[name]
            if embeds(feature):
                chunks, row = [], 0
                for chunk in column.chunks:
                    pieces = _in_pieces(chunk, feature, name, row, **options)
                    chunks.extend(pieces.chunks if isinstance(pieces, pa.ChunkedArray) else [pieces])
                    row += len(chunk)
                column = pa.chunked_array(chunks, type=schema.field(name).type)
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=schema)

    return embed_table_storage


_OPTIONS = set(inspect.signature(datasets.table.embed_table_storage).parameters)


def _known(values: dict) -> dict:
    """Those of the embedding options in `values` that this release has: 4.4.1 has only the token."""
    return {name: values[name] for name in ("token_per_repo_id", "local_files", "remote_files") if name in _OPTIONS}


# Sizes, and Parquet from a dataset


def _estimate_nbytes(original: Callable) -> Callable:
    @functools.wraps(original)
    def _estimate_nbytes(self) -> int:
        return estimate_nbytes(self) if embeds(self.features) else original(self)

    return _estimate_nbytes


def _get_parquet_column_options(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_parquet_column_options(features, schema) -> dict:
        return column_options(features, schema)

    return get_parquet_column_options


def _write_parquet(original: Callable) -> Callable:
    @functools.wraps(original)
    def _write(self, file_obj, batch_size: int, **parquet_writer_kwargs) -> int:
        dataset = self.dataset
        # What a push asks for stands on the dataset; else as `save_to_disk`: local files.
        files = getattr(dataset, "_embed_files", {"local_files": True, "remote_files": False})
        if not embeds(dataset.features):
            return original(self, file_obj, batch_size, **parquet_writer_kwargs)
        parquet_writer_kwargs.pop("path_or_buf", None)
        chunking = self.use_content_defined_chunking
        options = {
            "use_content_defined_chunking": None if chunking == config.DEFAULT_CDC_OPTIONS else chunking,
            "write_page_index": self.write_page_index,
            **parquet_writer_kwargs,
        }
        row_nbytes = embedded_nbytes(dataset, **files, remote_sample=REMOTE_SAMPLE)
        written = 0
        with (
            parquet_writer(file_obj, dataset.features, row_nbytes, **options) as writer,
            hf_tqdm(unit="examples", total=len(dataset), desc="Creating parquet from Arrow format") as pbar,
        ):
            for table in row_groups(dataset, 0, row_nbytes, max_rows=batch_size, **files):
                writer.write_table(table, row_group_size=max(len(table), 1))
                written += table.nbytes
                pbar.update(len(table))
        return written

    return _write


# Shards


class _PlannedDataset(Dataset):
    """A dataset whose `shard(num_shards, index)` gives it the shards of a plan: `num_shards` is the plan's, or less (for one
    process each), and then the parts can be sharded again."""

    _plan: list[Shard]
    _embed_files: dict[str, bool]

    @classmethod
    def of(cls, dataset: Dataset, plan: list[Shard], embed_files: dict[str, bool]) -> "_PlannedDataset":
        planned = copy.copy(dataset)
        planned.__class__ = cls
        planned._plan, planned._embed_files = plan, embed_files
        return planned

    def shard(self, num_shards: int, index: int, contiguous: bool = True, **kwargs) -> "Dataset":
        # As `datasets` divides shards among processes: the first ones get the ones left over.
        div, mod = divmod(len(self._plan), num_shards)
        start = div * index + min(index, mod)
        stop = start + div + (index < mod)
        plan = self._plan[start:stop]
        first = self._plan[0].start
        rows = range(plan[0].start - first, plan[-1].stop - first) if plan else range(0)
        return _PlannedDataset.of(Dataset.select(self, rows), plan, self._embed_files)


def _plan(dataset: Dataset, max_shard_size: Any, num_shards: int | None, num_proc: int | None, **files: bool) -> list:
    sizes = embedded_nbytes(dataset, **files, remote_sample=REMOTE_SAMPLE)
    plan = plan_shards(sizes, max_shard_size, num_shards)
    if num_shards is None and len(plan) < (num_proc or 1):
        plan = plan_shards(sizes, num_shards=num_proc)
    return plan


_PUSH_PARAMETERS = {"num_shards", "embed_external_files", "num_proc"}


def _push_shards(original: Callable) -> Callable | None:
    signature = inspect.signature(original)
    if not _PUSH_PARAMETERS | {"max_shard_size"} <= set(signature.parameters):
        return None

    @functools.wraps(original)
    def _push_parquet_shards_to_hub(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        asked = call.arguments
        if not embeds(self.features):
            return original(*call.args, **call.kwargs)
        files = dict.fromkeys(("local_files", "remote_files"), bool(asked["embed_external_files"]))
        plan = _plan(self, asked["max_shard_size"], asked["num_shards"], asked["num_proc"], **files)
        asked.update(
            self=_PlannedDataset.of(self, plan, files),
            max_shard_size=None,
            num_shards=len(plan),
            embed_external_files=False,  # done when the shard is written
            num_proc=asked["num_proc"] and min(asked["num_proc"], len(plan)),
        )
        return original(*call.args, **call.kwargs)

    return _push_parquet_shards_to_hub


def _save_to_disk(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_to_disk(
        self, dataset_path, max_shard_size=None, num_shards=None, num_proc=None, storage_options=None
    ) -> None:
        if not embeds(self.features) or (max_shard_size is not None and num_shards is not None):
            return original(self, dataset_path, max_shard_size, num_shards, num_proc, storage_options)
        files = {"local_files": True, "remote_files": False}
        plan = _plan(self, max_shard_size, num_shards, num_proc, **files)
        planned = _PlannedDataset.of(self, plan, files)
        return original(planned, dataset_path, None, len(plan), num_proc, storage_options)

    return save_to_disk


# Streaming datasets


class _EmbeddingIterable(IterableDataset):
    """A streaming dataset that embeds these files when it is written."""

    _embed_files: dict[str, bool]

    @classmethod
    def of(cls, dataset: IterableDataset, embed_files: dict[str, bool]) -> "_EmbeddingIterable":
        embedding = copy.copy(dataset)
        embedding.__class__ = cls
        embedding._embed_files = embed_files
        return embedding

    def shard(self, *args, **kwargs) -> "IterableDataset":
        return _EmbeddingIterable.of(IterableDataset.shard(self, *args, **kwargs), self._embed_files)

    def _write_parquet_shards(
        self, start, end, embed_external_files, num_shards, num_source_shards, first_source_shard
    ) -> Iterator[tuple[int, str]]:
        if num_shards <= num_source_shards:
            yield from IterableDataset._write_parquet_shards(
                self, start, end, embed_external_files, num_shards, num_source_shards, first_source_shard
            )
            return
        from datasets.iterable_dataset import _split_evenly

        for i in range(self.num_shards):
            first, stop = _split_evenly(num_shards, num_source_shards, first_source_shard + i)
            source = self.shard(num_shards=self.num_shards, index=i, contiguous=True)
            with contextlib.ExitStack() as stack:
                paths = []
                for _ in range(first, stop):
                    with tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as file:
                        paths.append(file.name)
                    stack.callback(Path(file.name).unlink, missing_ok=True)
                writers = [
                    stack.enter_context(_RowWriter(path, self.features, self._embed_files, self._token_per_repo_id))
                    for path in paths
                ]
                for k, row in enumerate(_rows(source)):
                    writers[k % len(writers)].write(row)
                for writer in writers:
                    writer.close()
                for k, path in enumerate(paths):
                    yield first + k, path


def _rows(dataset: IterableDataset) -> Iterator[pa.Table]:
    """The rows as Arrow tables of one row, neither decoded nor encoded again."""
    schema = dataset.features.arrow_schema
    for table in dataset.with_format("arrow").iter(batch_size=1):
        yield datasets.table.table_cast(table, schema) if table.schema != schema else table


class _RowWriter:
    """Writes rows that come one by one to a Parquet file, in row groups by bytes."""

    def __init__(self, file: Any, features: Features, files: dict[str, bool], token_per_repo_id=None, **options: Any):
        self._file, self._features, self._files, self._options = file, features, files, options
        self._tokens = token_per_repo_id
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self._pending_nbytes = 0
        self._done = 0
        self.nbytes = 0

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, error_type, *_) -> None:
        self.close(flush=error_type is None)

    def write(self, row: pa.Table) -> None:
        size = row.nbytes
        for leaf in table_leaves(row, self._features, 0):
            sizes, from_file = value_nbytes(leaf, None, self._tokens, **self._files)
            size += int(sizes[from_file].sum())
        if self._pending and self._pending_nbytes + size > ROW_GROUP_NBYTES:
            self._flush()
        self._pending.append(row)
        self._pending_nbytes += size

    def close(self, flush: bool = True) -> None:
        if flush and (self._pending or self._writer is None):
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if self._writer is None:
            mean = self._pending_nbytes // max(len(self._pending), 1)
            self._writer = parquet_writer(self._file, self._features, np.array([mean]), **self._options)
        if self._pending:
            table = pa.concat_tables(self._pending)
            table = embed_table(table, self._features, self._done, token_per_repo_id=self._tokens, **self._files)
            self._writer.write_table(table, row_group_size=len(table))
            self.nbytes += table.nbytes
        self._done += len(self._pending)
        self._pending, self._pending_nbytes = [], 0


def _iterable_to_parquet(original: Callable) -> Callable:
    @functools.wraps(original)
    def to_parquet(self, path_or_buf, batch_size=None, storage_options=None, **parquet_writer_kwargs) -> int:
        self = _with_features(self)
        if not embeds(self.features):
            return original(self, path_or_buf, batch_size, storage_options, **parquet_writer_kwargs)
        import fsspec

        files = getattr(self, "_embed_files", {"local_files": True, "remote_files": False})
        with contextlib.ExitStack() as stack:
            if isinstance(path_or_buf, str | bytes | os.PathLike):
                path_or_buf = stack.enter_context(fsspec.open(path_or_buf, "wb", **(storage_options or {})))
            options = parquet_writer_kwargs
            if options.get("use_content_defined_chunking") is True:
                options["use_content_defined_chunking"] = config.DEFAULT_CDC_OPTIONS
            writer = stack.enter_context(
                _RowWriter(path_or_buf, self.features, files, self._token_per_repo_id, **options)
            )
            for row in _rows(self):
                writer.write(row)
        return writer.nbytes

    return to_parquet


def _with_features(dataset: IterableDataset) -> IterableDataset:
    if dataset.features is not None:
        return dataset
    resolved = dataset._resolve_features()
    if isinstance(dataset, _EmbeddingIterable):
        resolved = _EmbeddingIterable.of(resolved, dataset._embed_files)
    return resolved


def _push_iterable_shards(original: Callable) -> Callable | None:
    signature = inspect.signature(original)
    if not _PUSH_PARAMETERS <= set(signature.parameters):
        return None

    @functools.wraps(original)
    def _push_parquet_shards_to_hub(self, *args, **kwargs):
        call = signature.bind(_with_features(self), *args, **kwargs)
        asked = call.arguments
        self = asked["self"]
        if not embeds(self.features):
            return original(*call.args, **call.kwargs)
        files = dict.fromkeys(("local_files", "remote_files"), bool(asked["embed_external_files"]))
        asked["embed_external_files"] = False  # done when the shard is written
        if asked.get("max_shard_size") is not None and asked["num_shards"] is None:
            bound = convert_file_size_to_int(asked["max_shard_size"])
            num_shards = max(-(-_streamed_nbytes(self, files) // bound), asked["num_proc"] or 1, 1)
            if not hasattr(IterableDataset, "_write_parquet_shards") and num_shards > self.num_shards:
                logger.warning(
                    f"max_shard_size={asked['max_shard_size']} needs {num_shards} shards, but this release of `datasets` writes "
                    f"no more than the {self.num_shards} that the streaming dataset has."
                )
                num_shards = self.num_shards
            asked.update(max_shard_size=None, num_shards=num_shards)
        asked["self"] = _EmbeddingIterable.of(self, files)
        return original(*call.args, **call.kwargs)

    return _push_parquet_shards_to_hub


def _streamed_nbytes(dataset: IterableDataset, files: dict[str, bool]) -> int:
    nbytes = 0
    for row in _rows(dataset):
        nbytes += row.nbytes
        for leaf in table_leaves(row, dataset.features, 0):
            sizes, from_file = value_nbytes(leaf, None, dataset._token_per_repo_id, **files)
            nbytes += int(sizes[from_file].sum())
    return nbytes


def _shuffled_arrow(original: Callable) -> Callable:
    @functools.wraps(original)
    def _iter_arrow(self) -> Iterator[tuple[Any, pa.Table]]:
        rng = copy.deepcopy(self.generator)
        tables: list[pa.Table] = []
        num_rows, key = 0, None

        def shuffled() -> pa.Table:
            table, order = pa.concat_tables(tables), rng.permutation(num_rows)
            if table.nbytes < INFERENCE_NBYTES:
                return pc.take(table, order)
            # Taking copies into one array, which cannot hold 2 GiB; slices hold no data of their own.
            return pa.concat_tables([table.slice(i, 1) for i in order.tolist()])

        for key, table in self.ex_iterable.iter_arrow():
            tables.append(table)
            num_rows += len(table)
            if num_rows >= self.buffer_size:
                # half of the buffer goes, half stays to be mixed with what comes
                kept = self.buffer_size // 2
                table = shuffled()
                yield key, table.slice(0, num_rows - kept)
                tables, num_rows = [table.slice(num_rows - kept)], kept
        if num_rows:
            yield key, shuffled()

    return _iter_arrow


# Arrow files


def _weight(value: Any) -> int:
    """Roughly the bytes that `value` takes in Arrow."""
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    if isinstance(value, list | tuple):
        first = next((x for x in value if x is not None), None)
        # Numbers are not looked at one by one: tokenized text has hundreds in every row.
        return 8 * len(value) if first is None or isinstance(first, int | float) else sum(map(_weight, value))
    if hasattr(value, "dataobj"):  # a nibabel image
        return int(np.prod(value.shape)) * value.get_data_dtype().itemsize
    return getattr(value, "nbytes", 8)


def _is_too_much(writer: ArrowWriter, nbytes: int) -> bool:
    if nbytes <= BATCH_NBYTES:
        return False
    typed = writer.pa_writer is not None or (writer._features is not None and not writer.update_features)
    return typed or nbytes > INFERENCE_NBYTES


def _flushing(pool: str, flush: str) -> Callable:
    """Makes `write` or `write_row` flush the `pool` before it holds more bytes than a batch should."""

    def replace(original: Callable) -> Callable:
        @functools.wraps(original)
        def write(self, item, *args, **kwargs):
            nbytes = _weight(item)
            pending = getattr(self, "_pending_nbytes", 0) if getattr(self, pool) else 0
            if pending and _is_too_much(self, pending + nbytes):
                getattr(self, flush)()
                pending = 0
            self._pending_nbytes = pending + nbytes
            return original(self, item, *args, **kwargs)

        return write

    return replace


def _write_batch(original: Callable) -> Callable:
    @functools.wraps(original)
    def write_batch(self, batch_examples, *args, **kwargs):
        columns = dict(batch_examples.items())
        num_rows = min((len(column) for column in columns.values()), default=0)
        weights = np.zeros(num_rows, dtype=np.int64)
        for column in columns.values():
            if isinstance(column, list | tuple):
                weights += np.fromiter(map(_weight, column[:num_rows]), dtype=np.int64, count=num_rows)
            elif num_rows:
                weights += _weight(column) // num_rows
        if not _is_too_much(self, weights.sum()) or any(len(column) != num_rows for column in columns.values()):
            return original(self, batch_examples, *args, **kwargs)
        for start, stop in group_rows(weights, BATCH_NBYTES if self.pa_writer is not None else INFERENCE_NBYTES):
            part = {name: getattr(column, "iloc", column)[start:stop] for name, column in columns.items()}
            original(self, part, *args, **kwargs)

    return write_batch


def _write_table(original: Callable) -> Callable:
    @functools.wraps(original)
    def _write_table(self, pa_table, *args, **kwargs):
        sizes = np.full(len(pa_table), pa_table.nbytes // max(len(pa_table), 1), dtype=np.int64)
        features = self._features if getattr(self, "embed_local_files", False) else None
        if features is not None and set(features) == set(pa_table.column_names):
            for leaf in table_leaves(pa_table, features, 0):
                leaf_sizes, from_file = value_nbytes(leaf, None, remote_files=False)
                np.add.at(sizes, leaf.rows, np.where(from_file, leaf_sizes, 0))
        if sizes.sum() <= BATCH_NBYTES:
            return original(self, pa_table, *args, **kwargs)
        for start, stop in group_rows(sizes, BATCH_NBYTES):
            original(self, pa_table.slice(start, stop - start), *args, **kwargs)

    return _write_table


# Probes: each shows its defect on the installed release


_PATH = {"bytes": None, "path": __file__}


def _table(values: Iterable[Any], feature: Any = None) -> pa.Table:
    schema = Features({"x": feature or Nifti()}).arrow_schema
    return pa.table({"x": list(values)}, schema=schema)


def _stores_nothing(name: str) -> bool:
    """Values without content are stored or raise something odd."""
    feature = getattr(datasets.features, name)()
    for value in ({"bytes": None, "path": None}, {"bytes": b"", "path": None}):
        try:
            feature.embed_storage(pa.array([value], type=feature.pa_type))
            return True
        except ValueError:
            pass
    return False


def _copies_bytes() -> bool:
    """Values that have bytes are copied (through Python) when a table is embedded."""
    table = _table([{"bytes": b"abc", "path": None}], Image())  # 4.4.1 does nothing with Nifti
    embedded = datasets.table.embed_table_storage(table)
    address = [t["x"].chunk(0).field("bytes").buffers()[2].address for t in (table, embedded)]
    return address[0] != address[1]


def _underestimates() -> bool:
    return Dataset(_table([_PATH]))._estimate_nbytes() < os.path.getsize(__file__)


def _writes_statistics() -> bool:
    features = Features({"x": Nifti()})
    options = datasets.arrow_writer.get_parquet_column_options(features, features.arrow_schema)
    return "x.bytes" in options.get("write_statistics", ["x.bytes"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disabled = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            if not disabled:
                enable_progress_bars()


def _writes_paths() -> bool:
    """`to_parquet` stores local paths instead of the files."""
    file = io.BytesIO()
    with _quiet():
        ParquetDatasetWriter(Dataset(_table([_PATH])), file)._write(file, batch_size=1)
    return pq.read_table(file)["x"][0]["bytes"].as_py() is None


def _shuffle_overflows() -> bool:
    from datasets.iterable_dataset import BufferShuffledExamplesIterable

    class Source:
        @staticmethod
        def iter_arrow():
            yield "", pa.table({"x": pa.chunked_array([_huge(), _huge()])})

    try:
        shuffling = BufferShuffledExamplesIterable(Source(), 2, np.random.default_rng(0))
        return sum(len(table) for _, table in shuffling._iter_arrow()) != 2
    except pa.ArrowInvalid:
        return True


def _huge() -> pa.Array:
    """One value of 1.2 GB that takes no memory as long as nobody reads it."""
    nbytes = 1_200_000_000
    data = pa.py_buffer(np.zeros(nbytes, dtype=np.uint8))
    offsets = pa.py_buffer(np.array([0, nbytes], dtype=np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data])


def _writer_overflows() -> bool:
    writer = ArrowWriter(features=Features({"x": Value("binary")}), stream=pa.MockOutputStream())
    try:
        value = _huge()
        for _ in range(2):
            writer.write({"x": value})
        writer.write_examples_on_file()
        return False
    except pa.ArrowInvalid:
        return True


def _no_inner_write_table() -> bool:
    return not hasattr(ArrowWriter, "_write_table") and _writer_overflows()


_NO_EMBED = "values without content are stored in silence or raise something odd; every value is copied through Python"
_COPIES = "a batch over 2 GiB raises, slices of lists embed too much, every value is copied through Python"
_ONE_SHARD = "one shard, whatever the size: only images, audio and video count; embedded whole in memory; more shards than rows raise"
_STREAM = "streamed images are decoded and encoded again, lose their feature and path, and the shard bound is ignored"
_PATHS = "absolute local paths are stored instead of the files"
_OVERFLOW = "more than 2 GiB in a batch: offset overflow while concatenating arrays"

PATCHES = (
    *(
        Patch(
            f"datasets.features:{name}.embed_storage",
            _embed_storage,
            functools.partial(_stores_nothing, name),
            _NO_EMBED,
            adds=True,
        )
        for name in ("Nifti", "Image", "Audio", "Video", "Pdf", "Mesh", "BioSequence", "BioStructure")
    ),
    Patch("datasets.table:embed_array_storage", _embed_array_storage, _copies_bytes, _COPIES),
    Patch("datasets.table:embed_table_storage", _embed_table_storage, _copies_bytes, _COPIES),
    Patch("datasets:Dataset._estimate_nbytes", _estimate_nbytes, _underestimates, _ONE_SHARD),
    Patch("datasets:Dataset._push_parquet_shards_to_hub", _push_shards, _underestimates, _ONE_SHARD),
    Patch("datasets:Dataset.save_to_disk", _save_to_disk, _underestimates, _ONE_SHARD),
    Patch(
        "datasets.arrow_writer:get_parquet_column_options",
        _get_parquet_column_options,
        _writes_statistics,
        "statistics on embedded bytes cost three quarters of the throughput",
    ),
    Patch("datasets.io.parquet:ParquetDatasetWriter._write", _write_parquet, _writes_paths, _PATHS),
    Patch("datasets:IterableDataset.to_parquet", _iterable_to_parquet, _writes_paths, _PATHS),
    Patch("datasets:IterableDataset._push_parquet_shards_to_hub", _push_iterable_shards, _writes_paths, _STREAM),
    Patch(
        "datasets.iterable_dataset:BufferShuffledExamplesIterable._iter_arrow",
        _shuffled_arrow,
        _shuffle_overflows,
        _OVERFLOW,
    ),
    Patch(
        "datasets.arrow_writer:ArrowWriter.write",
        _flushing("current_examples", "write_examples_on_file"),
        _writer_overflows,
        _OVERFLOW,
    ),
    Patch(
        "datasets.arrow_writer:ArrowWriter.write_row",
        _flushing("current_rows", "write_rows_on_file"),
        _writer_overflows,
        _OVERFLOW,
    ),
    Patch("datasets.arrow_writer:ArrowWriter.write_batch", _write_batch, _writer_overflows, _OVERFLOW),
    Patch("datasets.arrow_writer:ArrowWriter._write_table", _write_table, _writer_overflows, _OVERFLOW),
    Patch("datasets.arrow_writer:ArrowWriter.write_table", _write_table, _no_inner_write_table, _OVERFLOW),
)
