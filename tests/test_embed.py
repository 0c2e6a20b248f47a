"""The embedder: what is in the Parquet files equals what lay on disk.

Quick profile: `pytest tests/test_embed.py`. Deep profile (thousands of layouts, and values beyond 2 GiB; some minutes):
`pytest tests/test_embed.py -m deep`.
"""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, Features, Image, LargeList, List, Nifti, Pdf, Value, Video, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets_bids import embed
from datasets_bids.embed import embed_array, group_rows, write_shard
from datasets_bids.shards import embedded_nbytes, plan_shards

from .strategies import columns, embedded, make_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
deep = settings(quick, max_examples=4000)


def embed_column(feature, column, expected):
    chunks = [embed_array(chunk, feature) for chunk in column.chunks]
    for chunk in chunks:
        chunk.validate(full=True)
        assert chunk.type == column.type
    assert [v for chunk in chunks for v in chunk.to_pylist()] == [embedded(v, feature) for v in expected]


@quick
@given(data=st.data())
def test_any_layout(files, data):
    embed_column(*data.draw(columns(files)))


@pytest.mark.deep
@deep
@given(data=st.data())
def test_any_layout_deep(files, data):
    embed_column(*data.draw(columns(files)))


def write_and_read(directory, feature, column, expected, bound, monkeypatch):
    features = Features({"n": Value("int64"), "x": feature})
    table = pa.table([pa.array(range(len(column))), column], schema=features.arrow_schema)
    dataset = Dataset(table)
    sizes = embedded_nbytes(dataset)
    monkeypatch.setattr(embed, "ROW_GROUP_NBYTES", bound)
    rows = []
    for shard in plan_shards(sizes, max_shard_size=10 * bound):
        path = directory / "shard.parquet"
        seen = []
        write_shard(dataset, shard, str(path), progress=seen.append)
        file = pq.ParquetFile(path)
        assert Features.from_arrow_schema(file.schema_arrow) == features
        rows.extend(file.read().to_pylist())
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [
            b - a for a, b in group_rows(sizes[shard.start : shard.stop], bound)
        ]
    assert rows == [{"n": i, "x": embedded(v, feature)} for i, v in enumerate(expected)]


@settings(quick, max_examples=40)
@given(data=st.data(), bound=st.sampled_from([1, 3000, 10**6]))
def test_any_layout_through_parquet(files, data, bound, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        write_and_read(tmp_path, *data.draw(columns(files)), bound, patch)


@pytest.mark.deep
@deep
@given(data=st.data(), bound=st.sampled_from([1, 3000, 10**6]))
def test_any_layout_through_parquet_deep(files, data, bound, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        write_and_read(tmp_path, *data.draw(columns(files)), bound, patch)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_row_groups(sizes, bound):
    runs = list(group_rows(sizes, bound))
    assert [row for a, b in runs for row in range(a, b)] == list(range(len(sizes)))
    assert all(sum(sizes[a:b]) <= bound or b - a == 1 for a, b in runs)


def write(dataset, path, **options):
    (shard,) = plan_shards(embedded_nbytes(dataset), num_shards=1)
    write_shard(dataset, shard, str(path), **options)


@pytest.mark.parametrize("feature", [Nifti(), Image(), Audio(), Video(), Pdf()], ids=lambda f: f._type)
def test_every_feature_that_embeds(files, tmp_path, feature):
    features = Features(
        {"x": feature, "many": List(feature), "large": LargeList(feature), "two": List(feature, length=2)}
    )
    rows = {"x": files[:2], "many": [files[:3], []], "large": [[], files[3:]], "two": [files[:2], files[2:4]]}
    values = {name: [_as_value(v) for v in column] for name, column in rows.items()}
    write(Dataset(pa.table(values, schema=features.arrow_schema)), tmp_path / "x.parquet")
    assert Features.from_arrow_schema(pq.read_schema(tmp_path / "x.parquet")) == features
    stored = pq.read_table(tmp_path / "x.parquet").to_pydict()
    expected = {name: [embedded(v, f) for v in values[name]] for name, f in features.items()}
    assert stored == expected


def _as_value(value):
    return [_as_value(v) for v in value] if isinstance(value, list) else {"path": value, "bytes": None}


def test_mesh(files, tmp_path):
    Mesh = pytest.importorskip("datasets.features.mesh").Mesh
    write(Dataset.from_dict({"x": files}, features=Features({"x": Mesh()})), tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet")["x"].to_pylist() == [embedded(_as_value(f), Mesh()) for f in files]


def test_volume_leaves_are_plain_and_the_others_as_usual(files, tmp_path):
    features = Features({"id": Value("string"), "scan": {"t1w": Nifti(), "bold": List(Nifti())}, "pdf": Pdf()})
    rows = {"id": ["a", "b"], "scan": [{"t1w": files[0], "bold": files[1:]}] * 2, "pdf": files[:2]}
    write(Dataset.from_dict(rows, features=features), tmp_path / "x.parquet")
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0)
    found = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    volumes = {"scan.t1w.bytes", "scan.bold.list.element.bytes", "pdf.bytes"}
    assert set(found) == volumes | {"id", "scan.t1w.path", "scan.bold.list.element.path", "pdf.path"}
    for path, leaf in found.items():
        if path in volumes:
            assert leaf.compression == "UNCOMPRESSED" and leaf.statistics is None
            assert "PLAIN" in leaf.encodings and not any("DICTIONARY" in e for e in leaf.encodings)
        else:
            assert leaf.compression == "SNAPPY" and leaf.statistics.has_min_max
        assert leaf.has_offset_index


def test_large_rows_have_a_row_group_each_and_small_ones_share(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "ROW_GROUP_NBYTES", 1000)
    sizes = [10] * 5 + [600, 600, 2000] + [10] * 3
    paths = make_files(tmp_path, sizes)
    write(Dataset.from_dict({"x": paths}, features=Features({"x": Nifti()})), tmp_path / "x.parquet")
    meta = pq.read_metadata(tmp_path / "x.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [6, 1, 1, 3]


def test_the_same_rows_give_the_same_file(files, tmp_path):
    dataset = Dataset.from_dict({"x": files}, features=Features({"x": Nifti()}))
    write(dataset, tmp_path / "a.parquet")
    write(dataset, tmp_path / "b.parquet")
    write(dataset.select(range(len(files))[::-1]).select(range(len(files))[::-1]), tmp_path / "c.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "c.parquet").read_bytes()


def test_loads_with_load_dataset(files, tmp_path):
    features = Features({"x": Nifti(decode=False)})
    write(Dataset.from_dict({"x": files}, features=features), tmp_path / "x.parquet")
    for streaming in (False, True):
        loaded = load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", streaming=streaming)
        assert loaded.features == features
        assert list(loaded) == [{"x": embedded(_as_value(f), Nifti())} for f in files]


def test_no_rows(tmp_path):
    features = Features({"x": List(Nifti()), "id": Value("string")})
    write(Dataset.from_dict({"x": [], "id": []}, features=features), tmp_path / "x.parquet")
    assert Features.from_arrow_schema(pq.read_schema(tmp_path / "x.parquet")) == features
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 0


def test_progress_counts_embedded_bytes_in_small_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "READ_NBYTES", 1000)
    paths = make_files(tmp_path, [2500, 700])
    rows = [{"path": p, "bytes": None} for p in paths] + [{"path": None, "bytes": b"x" * 30}, None]
    dataset = Dataset.from_dict({"x": rows}, features=Features({"x": Nifti()}))
    seen = []
    write(dataset, tmp_path / "x.parquet", progress=seen.append)
    assert sum(seen) == 3230 == embedded_nbytes(dataset).sum() and max(seen) == 1000


def test_bytes_that_are_there_are_not_copied(files):
    storage = pa.array([{"bytes": b"abc", "path": files[0]}, None, {"bytes": b"de", "path": None}], type=Nifti.pa_type)
    result = embed_array(storage, Nifti())
    assert result.field("bytes").buffers()[2].address == storage.field("bytes").buffers()[2].address
    assert result.to_pylist() == [
        {"bytes": b"abc", "path": os.path.basename(files[0])},
        None,
        {"bytes": b"de", "path": None},
    ]


def test_file_urls_are_embedded(files):
    from pathlib import Path

    storage = pa.array([{"bytes": None, "path": Path(files[0]).as_uri()}], type=Nifti.pa_type)
    assert embed_array(storage, Nifti())[0]["bytes"].as_py() == Path(files[0]).read_bytes()


def test_remote_files_are_embedded(files, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/sub-01/a.nii.gz", b"remote bytes")
    try:
        dataset = Dataset.from_dict({"x": ["memory://sub-01/a.nii.gz", files[0]]}, features=Features({"x": Nifti()}))
        write(dataset, tmp_path / "x.parquet")
        stored = pq.read_table(tmp_path / "x.parquet")["x"].to_pylist()
        assert stored[0] == {"bytes": b"remote bytes", "path": "a.nii.gz"}
    finally:
        fs.rm("/sub-01", recursive=True)


def test_files_inside_archives_are_embedded(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as z:
        z.writestr("sub-01/a.nii", b"zipped bytes")
    path = f"zip://sub-01/a.nii::{tmp_path / 'data.zip'}"
    storage = pa.array([{"bytes": None, "path": path}], type=Nifti.pa_type)
    assert embed_array(storage, Nifti()).to_pylist() == [{"bytes": b"zipped bytes", "path": "a.nii"}]


def test_compressed_files_of_a_stream_are_stored_as_they_are(files):
    path = f"gzip://sub-01.nii::{files[0]}"  # as streaming names them
    storage = pa.array([{"bytes": None, "path": path}], type=Nifti.pa_type)
    assert embed_array(storage, Nifti()).to_pylist() == [embedded(_as_value(files[0]), Nifti())]


def test_local_and_remote_files_on_demand(files):
    storage = pa.array(
        [{"bytes": None, "path": files[0]}, {"bytes": None, "path": "memory://x/y.nii"}], type=Nifti.pa_type
    )
    local = embed_array(storage, Nifti(), remote_files=False).to_pylist()
    assert local[0]["bytes"] is not None and local[1] == {"bytes": None, "path": "memory://x/y.nii"}
    assert embed_array(storage, Nifti(), local_files=False, remote_files=False).equals(storage)


def test_a_file_that_changed_after_planning_is_an_error(tmp_path):
    paths = make_files(tmp_path, [3000, 4000])
    dataset = Dataset.from_dict({"x": paths}, features=Features({"x": Nifti()}))
    (shard,) = plan_shards(embedded_nbytes(dataset))
    os.truncate(paths[1], 3999)
    with pytest.raises(ValueError, match="6,999 bytes, but had 7,000 when shard 0 of 1 was planned"):
        write_shard(dataset, shard, str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("new_size", [2000, 4500])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, new_size):
    (path,) = make_files(tmp_path, [4000])
    monkeypatch.setattr(embed, "READ_NBYTES", 1000)
    dataset = Dataset.from_dict({"x": [path]}, features=Features({"x": Nifti()}))
    with pytest.raises(
        ValueError, match=r"row 0, column 'x': .*T1w.nii.gz changed while it was read: it had 4,000 bytes"
    ):
        write(dataset, tmp_path / "x.parquet", progress=lambda n: os.truncate(path, new_size))


def test_large_files_are_mapped_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "MAP_FROM", 5000)
    monkeypatch.setattr(embed, "GIVE_BACK_FROM", 10_000)
    paths = make_files(tmp_path, [20_000, 100, 7000])
    dataset = Dataset.from_dict({"x": paths}, features=Features({"x": Nifti()}))
    mapped = []
    monkeypatch.setattr(embed.Arena, "map", lambda *args, of=embed.Arena.map: mapped.append(args[1]) or of(*args))
    monkeypatch.setattr(embed, "ROW_GROUP_NBYTES", 1)
    write(dataset, tmp_path / "x.parquet")
    assert mapped == [paths[0], paths[2]]
    stored = pq.read_table(tmp_path / "x.parquet")["x"].to_pylist()
    assert stored == [embedded(_as_value(p), Nifti()) for p in paths]
    with pytest.raises(ValueError, match="row 2, column 'x': .* changed while it was read"):
        write(dataset, tmp_path / "x.parquet", progress=lambda n: n == 7000 and os.utime(paths[2]))


def test_pointers_are_found_in_larger_files_too(tmp_path):
    path = tmp_path / "page.nii.gz"
    path.write_bytes(b"<html><body>" + b"x" * 100_000)
    storage = pa.array([{"bytes": None, "path": str(path)}], type=Nifti.pa_type)
    with pytest.raises(ValueError, match="row 0.*page.nii.gz is an HTML page"):
        embed_array(storage, Nifti())


def test_missing_files_are_file_not_found_errors(tmp_path):
    storage = pa.array([None, {"bytes": None, "path": str(tmp_path / "gone.nii")}], type=Nifti.pa_type)
    with pytest.raises(FileNotFoundError, match="row 1.*gone.nii does not exist"):
        embed_array(storage, Nifti())
    np.testing.assert_array_equal(os.listdir(tmp_path), [])
