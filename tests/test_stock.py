"""The methods of `datasets` that embed, size and batch files.

A defect of `datasets` is a function decorated with `defect`. It runs twice: with the patches, where it has to pass, and without
them, where it has to fail on the releases that have the defect. Pushes go to a server on loopback (`hub_server.py`).

Deep (beyond 2 GiB; 6 GB of disk and a minute): `pytest tests/test_stock.py -m deep`.
"""

import inspect
import io
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Nifti, Pdf, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from datasets_bids import patching, stock

from .hub_server import HubServer
from .strategies import columns, embedded, make_files


RELEASE = Version(datasets.__version__)
DEFECTS = []


def defect(fact, present=True):
    """Register a check of a defect (by its number in the list of defects) and whether this release has it."""

    def register(check):
        DEFECTS.append(pytest.param(check, present, id=f"{fact}-{check.__name__}"))
        return check

    return register


@contextmanager
def unpatched():
    patching.undo()
    try:
        yield
    finally:
        patching.apply()


@pytest.fixture(autouse=True)
def patched(tmp_path, monkeypatch):
    patching.apply()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path / "files", [500, 3000, 70_000, 20])


def dataset_of(values, feature=None):
    def value(v):
        return (
            [value(x) for x in v] if isinstance(v, list) else {"path": v, "bytes": None} if isinstance(v, str) else v
        )

    features = Features({"x": feature or Nifti()})
    return Dataset(pa.table({"x": [value(v) for v in values]}, schema=features.arrow_schema))


def stored(table):
    return [v["bytes"] for v in table["x"].to_pylist()]


def contents(paths):
    return [Path(p).read_bytes() for p in paths]


# Sizes


@defect(1)
def files_of_every_feature_count(files):
    total = sum(map(os.path.getsize, files))
    for feature in (Nifti(), Pdf(), Image()):
        assert dataset_of(files, feature)._estimate_nbytes() == total
    assert dataset_of([files, []], List(Nifti()))._estimate_nbytes() == total
    assert dataset_of(files).select([2, 0])._estimate_nbytes() == 70_500


@defect(1)
def files_that_are_missing_count_as_nothing(files):
    assert dataset_of([files[0], "gone.nii"])._estimate_nbytes() == 500


# to_parquet


@defect(22)
def to_parquet_embeds(files):
    file = io.BytesIO()
    dataset_of(files).to_parquet(file)
    assert stored(pq.read_table(file)) == contents(files)
    dataset_of(files).to_parquet("x.parquet")
    assert Path("x.parquet").read_bytes() == file.getvalue()
    assert [v["path"] for v in pq.read_table(file)["x"].to_pylist()] == [os.path.basename(f) for f in files]


@defect(22)
def streaming_to_parquet_embeds(files):
    dataset = dataset_of(files).to_iterable_dataset()
    dataset.to_parquet("x.parquet")
    assert stored(pq.read_table("x.parquet")) == contents(files)
    assert Features.from_arrow_schema(pq.read_schema("x.parquet")) == dataset.features


@defect(6)
def row_groups_follow_bytes(files):
    file = io.BytesIO()
    bound = stock.row_groups.__globals__
    before, bound["ROW_GROUP_NBYTES"] = bound["ROW_GROUP_NBYTES"], 4000
    try:
        dataset_of(files).to_parquet(file)
    finally:
        bound["ROW_GROUP_NBYTES"] = before
    meta = pq.read_metadata(file)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [2, 1, 1]


@defect(5)
def no_statistics_on_volumes(files):
    file = io.BytesIO()
    dataset = dataset_of([{"bytes": b, "path": "a.nii"} for b in contents(files)])
    dataset.to_parquet(file)
    leaves = pq.read_metadata(file).row_group(0)
    statistics = {leaves.column(i).path_in_schema: leaves.column(i).statistics for i in range(leaves.num_columns)}
    assert statistics["x.bytes"] is None and statistics["x.path"].has_min_max


@defect(5)
def no_statistics_from_builders():
    if not hasattr(datasets.arrow_writer, "get_parquet_column_options"):
        pytest.skip("before 5.0 the options of builders that write Parquet stand inside a method")
    features = Features({"x": List(Nifti()), "id": Value("string")})
    options = datasets.arrow_writer.get_parquet_column_options(features, features.arrow_schema)
    assert options["write_statistics"] == ["x.list.element.path", "id"]


@defect(24)
def pointers_and_error_pages_are_refused(files):
    Path("lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    Path("page.nii.gz").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(ValueError, match="(?s)2 files cannot be stored.*row 1.*git lfs pull.*row 2.*HTML page"):
        dataset_of([files[0], "lfs.nii.gz", "page.nii.gz"]).to_parquet("x.parquet")


@defect(24)
def file_urls_are_embedded(files):
    dataset_of([Path(files[0]).as_uri()]).to_parquet("x.parquet")
    assert stored(pq.read_table("x.parquet")) == contents(files[:1])


@defect(12, present=not Version("4.8") <= RELEASE < Version("5.0"))  # Nifti and Video; BioStructure
def embedding_twice_is_embedding_once(files):
    for name in ("Nifti", "Image", "Audio", "Video", "Pdf", "Mesh", "BioSequence", "BioStructure"):
        feature = getattr(datasets.features, name, None)
        if feature is None:
            continue
        once = datasets.table.embed_table_storage(dataset_of(files, feature()).data.table)
        assert stored(once) == contents(files)
        assert datasets.table.embed_table_storage(once).equals(once)


# embed_storage


def storage(*values):
    return pa.array(values, type=Nifti.pa_type)


@defect(8)
def values_without_content_are_refused(files):
    for value in ({"bytes": None, "path": None}, {"bytes": b"", "path": files[0]}):
        with pytest.raises(ValueError, match="row 1"):
            Nifti().embed_storage(storage({"bytes": b"a", "path": None}, value))


@defect(8)
def empty_files_are_refused():
    Path("empty.nii").touch()
    with pytest.raises(ValueError, match="empty.nii is empty"):
        Nifti().embed_storage(storage({"bytes": None, "path": "empty.nii"}))


@defect(8)
def halves_of_pairs_are_refused():
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2), np.int16), np.eye(4)), "pair.img")
    with pytest.raises(ValueError, match="half of a .hdr/.img pair"):
        Nifti().embed_storage(storage({"bytes": None, "path": "pair.img"}))


@defect(2)
def bytes_are_not_copied():
    values = storage({"bytes": b"abc", "path": None})
    address = values.field("bytes").buffers()[2].address
    assert Nifti().embed_storage(values).field("bytes").buffers()[2].address == address
    table = pa.table(
        {"x": pa.array([[{"bytes": b"abc", "path": None}]])}, schema=Features({"x": List(Nifti())}).arrow_schema
    )
    embedded = datasets.table.embed_table_storage(table)["x"].chunk(0)
    assert (
        embedded.values.field("bytes").buffers()[2].address
        == table["x"].chunk(0).values.field("bytes").buffers()[2].address
    )


def test_embed_storage_takes_the_same_arguments_on_every_release(files):
    values = storage({"bytes": None, "path": files[0]}, {"bytes": None, "path": "memory://gone.nii"}, None)
    result = Nifti().embed_storage(values, None, local_files=True, remote_files=False)
    assert result.type == Nifti.pa_type and isinstance(result, pa.StructArray)
    assert result.to_pylist()[1:] == [{"bytes": None, "path": "memory://gone.nii"}, None]
    assert Nifti().embed_storage(values, token_per_repo_id={}, local_files=False, remote_files=False).equals(values)


def test_beyond_two_gib_pieces_are_chunks(files, monkeypatch):
    monkeypatch.setattr(stock, "INFERENCE_NBYTES", 4000)
    table = dataset_of(files).data.table
    embedded = datasets.table.embed_table_storage(table)
    assert embedded["x"].num_chunks == 3 and stored(embedded) == contents(files)
    lists = dataset_of([[files[0]], [], files[1:3], [files[3]]], List(Nifti())).data.table
    result = datasets.table.embed_array_storage(lists["x"], List(Nifti()))
    assert result.num_chunks == 3
    assert [[v["bytes"] for v in row] for row in result.to_pylist()] == [
        contents(c) for c in ([files[0]], [], files[1:3], [files[3]])
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tables_of_any_layout(files, data):
    feature, column, expected = data.draw(columns(files))
    features = Features({"x": feature})
    table = pa.table({"x": column}, schema=features.arrow_schema)
    result = datasets.table.embed_table_storage(table)
    assert result.schema == table.schema
    assert result["x"].to_pylist() == [embedded(v, feature) for v in expected]
    file = io.BytesIO()
    Dataset(table).to_parquet(file)
    assert pq.read_table(file)["x"].to_pylist() == [embedded(v, feature) for v in expected]


def test_user_defined_features_keep_their_own_embedding(files):
    class Shouting(Nifti):
        def embed_storage(self, storage, token_per_repo_id=None, local_files=True, remote_files=True):
            return pa.array([{"bytes": b"!", "path": "!"}] * len(storage), type=self.pa_type)

    values = pa.array([[{"bytes": None, "path": files[0]}]], type=pa.list_(Nifti.pa_type))
    result = datasets.table.embed_array_storage(values, List(Shouting()))
    assert result.to_pylist() == [[{"bytes": b"!", "path": "!"}]]


# save_to_disk


@defect(1)
def save_to_disk_keeps_the_bound(files):
    dataset_of(files).save_to_disk("saved", max_shard_size=4000)
    lengths = [len(Dataset.from_file(str(p))) for p in sorted(Path("saved").glob("*.arrow"))]
    assert lengths == [2, 1, 1]
    assert [v["bytes"] for v in load_from_disk("saved").data.table["x"].to_pylist()] == contents(files)


def test_save_to_disk_in_spawned_processes(files):
    dataset_of(files * 3).save_to_disk("saved", max_shard_size=100_000, num_proc=2)
    assert stored(load_from_disk("saved").data.table) == contents(files * 3)


# Arrow files: 2 GiB that nobody reads, so that they take no memory


def huge(struct=True):
    value = stock._huge()
    if struct:
        value = pa.StructArray.from_arrays([value, pa.array(["a.nii"])], fields=list(Nifti.pa_type))
    return value


def writer():
    return ArrowWriter(features=Features({"x": Nifti()}), stream=pa.MockOutputStream())


@defect(14)
def examples_beyond_two_gib():
    w = writer()
    for _ in range(2):
        w.write({"x": huge()})
    assert w.finalize() == (2, pytest.approx(2_400_000_000, abs=1000))


@defect(14)
def rows_beyond_two_gib():
    w = writer()
    for _ in range(2):
        w.write_row(pa.table({"x": huge()}, schema=Features({"x": Nifti()}).arrow_schema))
    assert w.finalize()[0] == 2


@defect(14)
def batches_beyond_two_gib():
    w = writer()
    w.write_batch({"x": pa.chunked_array([huge(), huge()])})
    assert w.finalize()[0] == 2


@defect(15, present=RELEASE >= Version("5.0"))
def shuffling_beyond_two_gib():
    table = pa.table({"x": pa.chunked_array([huge(), huge(), huge()])}, schema=Features({"x": Nifti()}).arrow_schema)
    # the fingerprint is given, as computing one copies the table
    dataset = (
        Dataset(table, fingerprint="huge").to_iterable_dataset().shuffle(seed=0, buffer_size=3).with_format("arrow")
    )
    assert sum(len(t) for t in dataset.iter(batch_size=1)) == 3


def test_shuffling_gives_the_order_of_datasets(monkeypatch):
    dataset = Dataset.from_dict({"x": list(range(100))}).to_iterable_dataset(num_shards=4)

    def order():
        return [row["x"] for row in dataset.shuffle(seed=3, buffer_size=17)]

    with unpatched():
        expected = order()
    assert order() == expected and sorted(expected) == list(range(100))
    monkeypatch.setattr(stock, "INFERENCE_NBYTES", 1)
    assert order() == expected


def test_batches_by_bytes_do_not_change_what_is_written(monkeypatch):
    rows = {"x": [f"{i}" * (i % 50) for i in range(200)], "y": [None] * 100 + list(range(100))}
    monkeypatch.setattr(stock, "BATCH_NBYTES", 100)
    features = Features({"x": Value("string"), "y": Value("int64")})
    dataset = Dataset.from_generator(
        lambda: ({"x": a, "y": b} for a, b in zip(rows["x"], rows["y"])), features=features
    )
    assert dataset.to_dict() == rows
    mapped = dataset.map(lambda batch: {"z": [len(x) for x in batch["x"]]}, batched=True, batch_size=70)
    assert mapped.to_dict() == rows | {"z": [len(x) for x in rows["x"]]}
    assert dataset.select(range(199, -1, -1)).flatten_indices().to_dict() == {k: v[::-1] for k, v in rows.items()}


def test_types_are_still_inferred_from_a_whole_batch(monkeypatch):
    monkeypatch.setattr(stock, "BATCH_NBYTES", 10)
    dataset = Dataset.from_generator(lambda: ({"x": "a" * 20, "y": None if i < 50 else 1.5} for i in range(60)))
    assert dataset.features["y"] == Value("float64")


# push_to_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "server") as server:
        yield server


def push(hub, code, repo, patches):
    """Run `code` in a process of its own, and return the shards in the repository: (name, rows)."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from datasets import *
import pyarrow as pa
if __name__ == "__main__":
    if {patches}:
        from datasets_bids import patching
        patching.apply()
    def dataset_of(paths):
        schema = Features({{"x": Nifti()}}).arrow_schema
        return Dataset(pa.table({{"x": [{{"path": p, "bytes": None}} for p in paths]}}, schema=schema))
    repo = {repo!r}
"""
    script += "\n".join("    " + line for line in code.strip().splitlines())
    path = Path("push.py")
    path.write_text(script)
    run = subprocess.run([sys.executable, str(path)], env=hub.env(), capture_output=True, text=True, timeout=120)
    if run.returncode:
        return run.stderr
    shards = sorted(p for p in hub.tree(repo) if p.endswith(".parquet"))
    return [(p, pq.read_table(io.BytesIO(hub.read(repo, p)))) for p in shards]


PUSHES = []


def pushed(fact, code, check):
    PUSHES.append(pytest.param(fact, code, check, id=f"{fact}-{check.__name__}"))


def keeps_the_bound(shards, files):
    assert [len(table) for _, table in shards] == [2, 1, 1]
    assert [v for _, table in shards for v in stored(table)] == contents(files)
    assert all(Features.from_arrow_schema(table.schema) == Features({"x": Nifti()}) for _, table in shards)


def has_no_more_shards_than_rows(shards, files):
    assert [len(table) for _, table in shards] == [1, 1, 1, 1]


def keeps_the_bound_in_spawned_processes(shards, files):
    keeps_the_bound(shards, files)


def streams_the_very_bytes(shards, files):
    assert sorted(v for _, table in shards for v in stored(table)) == sorted(contents(files))
    assert all(Features.from_arrow_schema(table.schema) == Features({"x": Nifti()}) for _, table in shards)
    assert {v["path"] for _, table in shards for v in table["x"].to_pylist()} == {os.path.basename(f) for f in files}


def streams_within_the_bound(shards, files):
    assert len(shards) > 1
    streams_the_very_bytes(shards, files)


def leaves_paths(shards, files):
    assert [v for _, table in shards for v in table["x"].to_pylist()] == [{"path": f, "bytes": None} for f in files]


pushed(1, "dataset_of(FILES).push_to_hub(repo, max_shard_size=4000)", keeps_the_bound)
pushed(4, "dataset_of(FILES).push_to_hub(repo, num_shards=9)", has_no_more_shards_than_rows)
pushed(4, "dataset_of(FILES).push_to_hub(repo, max_shard_size=4000, num_proc=2)", keeps_the_bound_in_spawned_processes)
pushed(
    20,
    """
def generate():
    for path in FILES:
        yield {"x": path}
IterableDataset.from_generator(generate, features=Features({"x": Nifti()})).push_to_hub(repo)
""",
    streams_the_very_bytes,
)
pushed(
    20,
    "dataset_of(FILES).to_iterable_dataset(num_shards=2).push_to_hub(repo, max_shard_size=4000)",
    streams_within_the_bound,
)


@pytest.fixture
def images(tmp_path):
    """Files that stock can decode: it does, when it pushes a streaming dataset."""
    paths = []
    for i, shape in enumerate([(3, 3, 3), (4, 4, 4), (20, 30, 40), (2, 2, 2)]):
        paths.append(str(tmp_path / f"sub-{i}.nii.gz"))
        image = nib.Nifti1Image(np.random.default_rng(i).integers(0, 999, shape).astype(np.int16), np.eye(4))
        image.header.set_slope_inter(0.5, -3)
        nib.save(image, paths[-1])
    return paths


@pytest.mark.parametrize("fact, code, check", PUSHES)
def test_pushes(hub, images, files, fact, code, check):
    if "max_shard_size" not in inspect.signature(IterableDataset.push_to_hub).parameters and "iterable" in code:
        pytest.skip("this release streams as many shards as it reads")
    paths = images if fact == 20 else files
    name = f"alice/{check.__name__}"
    code = f"FILES = {paths!r}\n{code}"
    shards = push(hub, code, name, patches=True)
    assert not isinstance(shards, str), shards
    check(shards, paths)
    without = push(hub, code, name + "-stock", patches=False)
    with pytest.raises(AssertionError):
        assert not isinstance(without, str)
        check(without, paths)


def test_push_without_embedding_leaves_paths(hub, files):
    code = f"FILES = {files!r}\ndataset_of(FILES).push_to_hub(repo, embed_external_files=False)"
    leaves_paths(push(hub, code, "alice/paths", patches=True), files)


def test_push_of_no_rows(hub):
    shards = push(hub, "dataset_of([]).push_to_hub(repo)", "alice/nothing", patches=True)
    assert [len(table) for _, table in shards] == [0]
    assert Features.from_arrow_schema(shards[0][1].schema) == Features({"x": Nifti()})


def test_push_lists_all_bad_files_before_anything_is_uploaded(hub, files):
    code = f"dataset_of({[files[0], 'gone.nii', 'lost.nii']!r}).push_to_hub(repo)"
    error = push(hub, code, "alice/bad", patches=True)
    assert "2 files cannot be stored" in error and "gone.nii" in error and "lost.nii" in error
    assert not any(p.endswith(".parquet") for p in hub.tree("alice/bad")) if hub.exists("alice/bad") else True


# Without the patches


def _run(check, files):
    check(files) if check.__code__.co_argcount else check()


@pytest.mark.parametrize("check, present", DEFECTS)
def test_defect_is_mended(check, present, files):
    _run(check, files)


@pytest.mark.parametrize("check, present", DEFECTS)
def test_defect_is_there_without_patches(check, present, files):
    with unpatched():
        try:
            _run(check, files)
        except (Exception, pytest.fail.Exception):
            assert present, "this release has the defect, but is not listed as having it"
        else:
            assert not present, "this release no longer has the defect: say since when"


# Beyond 2 GiB for real


@pytest.mark.deep
def test_beyond_two_gib(tmp_path):
    sizes = [900_000_000] * 3
    paths = []
    for i, size in enumerate(sizes):
        paths.append(str(tmp_path / f"{i}.nii"))
        with open(paths[-1], "wb") as f:
            f.truncate(size)
            f.seek(size - 3)
            f.write(b"end")
    dataset = Dataset(
        pa.table(
            {"x": [{"path": p, "bytes": None} for p in paths], "label": ["a", "b", "a"]},
            schema=Features({"x": Nifti(decode=False), "label": Value("string")}).arrow_schema,
        )
    )
    dataset.to_parquet(tmp_path / "x.parquet")
    meta = pq.read_metadata(tmp_path / "x.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [1, 1, 1]
    table = datasets.table.embed_table_storage(dataset.data.table)
    assert table.nbytes > 2**31 and table["x"][2]["bytes"].as_py()[-3:] == b"end"
    dataset.save_to_disk(tmp_path / "saved", max_shard_size="5GB")
    saved = load_from_disk(tmp_path / "saved")
    assert len(saved.cache_files) == 1 and saved.data.nbytes > 2**31
    for changed in (
        saved.map(lambda x: {"n": 1}),
        saved.map(lambda batch: {"n": [1] * len(batch["label"])}, batched=True),
        saved.cast_column("x", Nifti()),
        saved.class_encode_column("label"),
        saved.select([2, 0, 1]).flatten_indices(),
        saved.batch(1),
    ):
        assert len(changed) == 3
    generated = Dataset.from_generator(
        lambda: ({"x": {"bytes": bytes(900_000_000), "path": None}} for _ in range(3)),
        features=Features({"x": Nifti(decode=False)}),
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(generated) == 3
    streamed = load_from_disk(tmp_path / "saved").to_iterable_dataset().shuffle(seed=0, buffer_size=3)
    assert sum(1 for _ in streamed) == 3
