"""Trees in a bucket: a real S3 server on loopback, read as OpenNeuro's is, without credentials."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import get_dataset_config_names, load_dataset

import datasets_bids  # noqa: F401
from datasets_bids import storage
from datasets_bids.index import index_tree

from .hub_server import HubServer
from .s3_server import NO_CREDENTIALS, FaultyProxy, s3_server, upload
from .test_push import push_to, read_with_stock, run
from .trees import noise_bytes, write_volumes


pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server():
    with s3_server() as url:
        yield url


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in NO_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(storage._VARIABLE, "{}")


def make_tree(root: Path) -> Path:
    """Two sessions of three subjects, with tables, inherited gradients and sidecars, and a derivative. 2 MB."""
    paths = [
        f"sub-{subject}/ses-{session}/{name.format(f'sub-{subject}_ses-{session}')}.nii.gz"
        for subject in ("01", "02", "03")
        for session in ("a", "b")
        for name in ("anat/{}_T1w", "dwi/{}_run-1_dwi", "dwi/{}_run-2_dwi", "func/{}_task-rest_bold")
    ]
    write_volumes(root, [*paths, "derivatives/masks/sub-01/anat/sub-01_mask.nii.gz"])
    for i, path in enumerate(paths[::4]):
        (root / path).write_bytes(noise_bytes(i, 300_000))
    texts = {
        "dataset_description.json": "{}",
        "participants.tsv": "participant_id\tage\nsub-01\t30\nsub-02\tn/a\nsub-03\t50\n",
        "participants.json": '{"age": {"Units": "year"}}',
        "dwi.bval": "0 1000\n",
        "sub-02/sub-02_run-2_dwi.bval": "0 2000\n",
        "task-rest_bold.json": '{"RepetitionTime": 2}',
        "sub-01/sub-01_sessions.tsv": "session_id\tpulse\nses-a\t60\nses-b\t70\n",
        "sub-01/ses-a/sub-01_ses-a_scans.tsv": "filename\tquality\nanat/sub-01_ses-a_T1w.nii.gz\tgood\n",
        ".bidsignore": "x\n",
    }
    for path, text in texts.items():
        (root / path).write_text(text)
    return root


def options(url):
    return {"anon": True, "endpoint_url": url}


def rows_of(dataset, root):
    def relative(value):
        if isinstance(value, dict):
            return value["path"].removeprefix(root)
        return [relative(item) for item in value] if isinstance(value, list) else value

    return [
        {name: relative(value) for name, value in row.items()} for row in dataset.with_format("arrow")[:].to_pylist()
    ]


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_rows_are_those_of_the_local_copy(tmp_path, server):
    tree = make_tree(tmp_path / "tree")
    upload(server, tree, "rows/ds1")
    proxy = FaultyProxy(server)
    local = load_dataset("bids", data_dir=tree, split="train", sidecars=True)
    remote = load_dataset(
        "bids", data_dir="s3://rows/ds1/", split="train", sidecars=True, storage_options=options(proxy.url)
    )
    assert remote.features == local.features
    assert rows_of(remote, "s3://rows/ds1/") == rows_of(local, f"{tree}/")
    row = remote[2]
    assert row["dwi"][1].get_fdata().tobytes() == local[2]["dwi"][1].get_fdata().tobytes()
    assert row["dwi_bval"] == ["0 1000\n", "0 2000\n"]
    streamed = load_dataset(
        "bids", data_dir="s3://rows/ds1", split="train", streaming=True, storage_options=options(proxy.url)
    )
    assert [np.asarray(row["func_task_rest_bold"].dataobj).sum() for row in streamed] == [
        np.asarray(image.dataobj).sum() for image in local["func_task_rest_bold"]
    ]
    masks = load_dataset("bids", "masks", data_dir="s3://rows/ds1", split="train", storage_options=options(proxy.url))
    assert masks["subject_id"] == ["sub-01"]
    assert get_dataset_config_names("bids", data_dir="s3://rows/ds1") == ["default", "masks"]
    # As OpenNeuro's buckets are read: nobody signs anything.
    assert b"GET /rows" in proxy.requests and b"authorization" not in proxy.requests.lower()
    proxy.close()


def test_a_schema_reads_a_bucket_too(tmp_path, server):
    tree = make_tree(tmp_path / "tree")
    upload(server, tree, "schemas")
    arguments = {
        "schema": {
            "t1w": "anat/*_T1w.nii.gz",
            "bold": "func/*_bold.nii.gz",
            "json": {"of": "bold", "companion": "json"},
        },
        "metadata_from": "participants.tsv",
        "split": "train",
    }
    remote = load_dataset("bids", data_dir="s3://schemas", storage_options=options(server), **arguments)
    local = load_dataset("bids", data_dir=tree, **arguments)
    assert rows_of(remote, "s3://schemas/") == rows_of(local, f"{tree}/")


def test_pushed_bit_for_bit_as_the_local_copy_in_spite_of_faults(tmp_path, server):
    tree = make_tree(tmp_path / "tree")
    upload(server, tree, "push/a/b")
    proxy = FaultyProxy(server, reset_every=3, slow=20_000)
    arguments = ("--max-shard-size", "400kB", "--sidecars", "--subjects", "01", "03")
    local = push_to(tmp_path / "local", "bids", tree, *arguments)
    assert local.returncode == 0, local.stderr
    remote = push_to(
        tmp_path / "remote",
        "bids",
        "s3://push/a/b",
        *arguments,
        *("--storage-option", "anon=true", "--storage-option", f"endpoint_url={proxy.url}"),
    )
    assert remote.returncode == 0, remote.stderr
    assert proxy.resets > 3
    assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")
    assert len(list((tmp_path / "remote" / "data").glob("*.parquet"))) > 2
    assert "| `age` | `Value('int64')` | unit: year |" in (tmp_path / "remote" / "README.md").read_text()
    assert [row["subject_id"] for row in read_with_stock(tmp_path / "remote")] == ["sub-01"] * 2 + ["sub-03"] * 2
    proxy.close()


def test_a_push_to_the_hub_holds_a_few_shards(tmp_path, server):
    tree = make_tree(tmp_path / "tree")
    upload(server, tree, "hub/ds")
    proxy = FaultyProxy(server, reset_every=4)
    home = tmp_path / "home"
    largest, done = [0, 0], threading.Event()

    def watch():
        while not done.wait(0.005):
            sizes = []
            for path in home.rglob("*.parquet*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    pass
            largest[:] = max(largest[0], len(sizes)), max(largest[1], sum(sizes))

    with HubServer(tmp_path / "hub") as hub:
        env = hub.env(home=home) | NO_CREDENTIALS | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        watcher = threading.Thread(target=watch)
        watcher.start()
        options = ["--storage-option", "anon=true", "--storage-option", f"endpoint_url={proxy.url}", "--num-proc", "2"]
        for data_dir, repo_id, more in ((tree, "alice/local", []), ("s3://hub/ds", "alice/remote", options)):
            args = [
                "bids",
                "--data-dir",
                str(data_dir),
                "--repo-id",
                repo_id,
                "--max-shard-size",
                "310kB",
                "--private",
                *more,
            ]
            command = [sys.executable, "-m", "datasets_bids.push", *args]
            pushed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert pushed.returncode == 0, pushed.stderr
        done.set()
        watcher.join()
        assert hub.tree("alice/remote") == hub.tree("alice/local")
        shards = [path for path in hub.tree("alice/remote") if path.startswith("data/")]
    # Four shards at most, each with its preview beside it.
    assert len(shards) == 6 and 0 < largest[0] <= 8 and largest[1] < 5 * 310_000
    assert proxy.resets
    proxy.close()


def _decode(dataset, queue):
    queue.put([float(dataset[i]["func_task_rest_bold"].get_fdata().sum()) for i in range(2)])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_that_are_started_later_read_the_bucket_too(tmp_path, server, method):
    tree = make_tree(tmp_path / "tree")
    upload(server, tree, f"workers-{method}")
    dataset = load_dataset("bids", data_dir=f"s3://workers-{method}", split="train", storage_options=options(server))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_decode, args=(dataset, queue))
    process.start()
    local = load_dataset("bids", data_dir=tree, split="train")
    assert queue.get(timeout=60) == [float(local[i]["func_task_rest_bold"].get_fdata().sum()) for i in range(2)]
    process.join()


def test_a_changed_object_is_seen(tmp_path, server):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii"])
    upload(server, tmp_path, "changes")
    before = index_tree("s3://changes", options(server))
    assert index_tree("s3://changes", options(server)).fingerprint == before.fingerprint
    stamp = storage.stamp("s3://changes/sub-1/anat/sub-1_T1w.nii")
    data = bytearray((tmp_path / "sub-1/anat/sub-1_T1w.nii").read_bytes())
    data[-1] ^= 1
    (tmp_path / "sub-1/anat/sub-1_T1w.nii").write_bytes(data)
    upload(server, tmp_path, "changes")
    after = index_tree("s3://changes", options(server))
    assert after.files[0].size == before.files[0].size
    assert after.fingerprint != before.fingerprint
    assert storage.stamp("s3://changes/sub-1/anat/sub-1_T1w.nii") != stamp
    assert storage.stamp("s3://changes/sub-1/anat/nothing.nii") == ""


def test_mistakes_are_one_clear_line(tmp_path, server):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii"])
    (tmp_path / "sub-1/anat/sub-1_T2w.nii").touch()
    upload(server, tmp_path, "mistakes/here")
    anonymous = ["--storage-option", "anon=true", "--storage-option", f"endpoint_url={server}"]
    for where, more, message in (
        ("s3://mistakes/there", anonymous, "There is no file under s3://mistakes/there: check data_dir"),
        ("s3://nowhere-at-all/x", anonymous, "s3://nowhere-at-all/x"),
        ("s3://mistakes/here/sub-1/anat/sub-1_T1w.nii", anonymous, "is a file: data_dir takes the directory"),
        ("s3://mistakes/here", [], "for a public bucket pass"),
        ("s3://mistakes/here", ["--storage-option", "anon"], "expected KEY=VALUE"),
        ("s3://mistakes/here", anonymous, "s3://mistakes/here/sub-1/anat/sub-1_T2w.nii is empty (0 bytes)"),
        ("nosuch://x/y", [], "Protocol not known: nosuch"),
    ):
        pushed = push_to(tmp_path / "out", "bids", where, *more)
        assert pushed.returncode == 1 and message in pushed.stderr, pushed.stderr
        assert "Traceback" not in pushed.stderr
        assert not (tmp_path / "out").exists()


def test_a_chained_url(tmp_path):
    tree = make_tree(tmp_path / "tree")
    assert run("-m", "zipfile", "-c", tmp_path / "x.zip", *sorted(tree.iterdir())).returncode == 0
    remote = load_dataset("bids", data_dir=f"zip://::{tmp_path}/x.zip", split="train")
    local = load_dataset("bids", data_dir=tree, split="train")
    assert (
        remote.remove_columns([c for c in remote.column_names if remote.features[c] != remote.features["age"]])[:]
        == (local.remove_columns([c for c in local.column_names if local.features[c] != local.features["age"]])[:])
    )
    assert remote[0]["dwi"][0].get_fdata().tobytes() == local[0]["dwi"][0].get_fdata().tobytes()


def test_options_are_those_of_the_innermost_root():
    storage.remember("s3://a", {"anon": True})
    storage.remember("s3://a/b", {"anon": False})
    storage.remember("s3://a/b", None)
    assert storage.options_for("s3://a/b/c.nii") == {"anon": False}
    assert storage.options_for("s3://a/bc.nii") == {"anon": True}
    assert storage.options_for("s3://ab") == {}
    with pytest.raises(ValueError, match="storage_options: .* pass plain data"):
        storage.remember("s3://a", {"session": object()})
