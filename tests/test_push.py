"""`python -m datasets_bids.push … --output-dir`: real files, real processes, stock `datasets` as the reader."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard

from datasets_bids import push
from datasets_bids.hub import _STAGING

from .trees import isles24_tree, noise_bytes, volume_bytes, write_volumes


ISLES24 = str(Path(__file__).parent.parent / "builders" / "isles24")

# What a user of the pushed dataset runs: stock `datasets`, and nothing of this package.
READER = """
import hashlib, json, sys
from datasets import Features, List, Nifti, load_dataset

path, config, streaming = sys.argv[1], sys.argv[2], sys.argv[3] == "streaming"
dataset = load_dataset(path, config, streaming=streaming)
assert not any(name.startswith("datasets_bids") for name in sys.modules)

def undecoded(feature):
    if isinstance(feature, Nifti):
        return Nifti(decode=False)
    return List(undecoded(feature.feature)) if isinstance(feature, List) else feature

def digest(value):
    if isinstance(value, list):
        return [digest(item) for item in value]
    if isinstance(value, dict):
        return [value["path"], hashlib.sha256(value["bytes"]).hexdigest()]
    return value

for split in dataset.values():
    split = split.cast(Features({name: undecoded(feature) for name, feature in split.features.items()}))
    for row in split:
        print(json.dumps({name: digest(value) for name, value in row.items()}))
"""


def run(*args, **kwargs):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, **kwargs)


def push_to(output, builder, tree, *options):
    return run("-m", "datasets_bids.push", builder, "--data-dir", tree, "--output-dir", output, *options)


def read_with_stock(output, config="default", mode="map-style"):
    reader = run("-c", READER, output, config, mode)
    assert reader.returncode == 0, reader.stderr
    return [json.loads(line) for line in reader.stdout.splitlines()]


def digest_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contents(directory):
    """Every file below `directory` and its SHA-256."""
    return {str(path.relative_to(directory)): digest_of(path) for path in Path(directory).rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path):
    """(tree, schema file) of three subjects: 0.4 MB of voxels that do not compress, a list, and a table."""
    root = tmp_path / "tree"
    for i in (1, 2, 3):
        write_volumes(root, [f"sub-{i}/anat/sub-{i}_T1w.nii.gz"])
        for run_ in range(i):
            path = root / f"sub-{i}/func/sub-{i}_run-{run_}_bold.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(noise_bytes(10 * i + run_, 100_000))
    (root / "participants.tsv").write_text("participant_id\tage\nsub-1\t60\nsub-2\t61\nsub-3\tn/a\n")
    (root / "dataset_description.json").write_text("[]")
    schema = tmp_path / "schema.yaml"
    bold = {"path": "{subject}/func/*_bold.nii.gz", "many": True}
    config = {"schema": {"t1w": "anat/*_T1w.nii.gz", "bold": bold}, "metadata_from": "participants.tsv"}
    schema.write_text(yaml.safe_dump(config, sort_keys=False))
    return root, schema


@pytest.mark.parametrize("mode", ["map-style", "streaming"])
def test_stock_datasets_reads_every_byte(tmp_path, mode):
    """Through push and stock load, of the tree with all of the release's quirks."""
    root = isles24_tree(tmp_path / "tree", count=20, without_perfusion=3, without_vessels=5)
    for config in ("default", "full"):
        pushed = push_to(tmp_path / "out", ISLES24, root, "--config", config, "--max-shard-size", "20kB")
        assert pushed.returncode == 0, pushed.stderr
        assert "Found 20 subjects" in pushed.stdout
        assert "about sixty" in pushed.stderr
    on_disk = {path.name: digest_of(path) for path in root.rglob("*.nii*")}
    for config, columns in (("default", 12), ("full", 21)):
        rows = read_with_stock(tmp_path / "out", config, mode)
        assert [row["subject_id"] for row in rows] == sorted(path.name for path in (root / "raw_data").iterdir())
        images = [value for row in rows for value in row.values() if isinstance(value, list)]
        assert all(digest == on_disk[name] for name, digest in images)
        assert len({name for name, _ in images}) == len(images)
        assert len(rows[-1]) > columns
    assert len(images) == len(on_disk), "full: every released volume is in exactly one cell"


def test_layout_of_the_directory(tree, tmp_path):
    root, schema = tree
    out = tmp_path / "out"
    pushed = push_to(out, "bids", root, "--schema", schema, "--num-shards", "2")
    assert pushed.returncode == 0, pushed.stderr
    assert sorted(contents(out)) == [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "preview/train-00000-of-00002.parquet",
        "preview/train-00001-of-00002.parquet",
    ]
    assert sum(pq.read_metadata(path).num_rows for path in (out / "data").iterdir()) == 3
    assert "of 9 files, shard 2 of 2" in pushed.stderr
    data = DatasetCard.load(out / "README.md").data
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]},
        {"config_name": "preview", "data_files": [{"split": "train", "path": "preview/train-*"}]},
    ]
    assert data["size_categories"] == ["n<1K"]
    info, pictures = data["dataset_info"]
    assert info["config_name"] == "default" and pictures["splits"][0]["num_examples"] == 3
    assert [feature["name"] for feature in info["features"]] == ["subject_id", "t1w", "bold", "age"]
    assert info["splits"][0]["num_examples"] == 3
    assert info["download_size"] == sum(path.stat().st_size for path in (out / "data").iterdir())
    assert str(root) not in (out / "README.md").read_text()
    (first, second, third) = read_with_stock(out)
    assert [len(row["bold"]) for row in (first, second, third)] == [1, 2, 3]
    assert first["bold"] == [["sub-1_run-0_bold.nii.gz", digest_of(root / "sub-1/func/sub-1_run-0_bold.nii.gz")]]
    assert third["age"] is None and first["age"] == 60


def test_pushing_again_gives_the_same_bytes(tree, tmp_path):
    root, schema = tree
    for _ in range(2):
        assert push_to(tmp_path / "a", "bids", root, "--schema", schema).returncode == 0
    assert push_to(tmp_path / "b", "bids", root, "--schema", schema).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_fewer_shards_replace_more_and_other_configs_stay(tree, tmp_path):
    root, schema = tree
    out = tmp_path / "out"
    assert push_to(out, "bids", root, "--schema", schema, "--config", "other").returncode == 0
    other = contents(out / "other")
    assert push_to(out, "bids", root, "--schema", schema, "--num-shards", "3").returncode == 0
    card = out / "README.md"
    card.write_text(card.read_text() + "\nEdited by hand.\n")
    assert push_to(out, "bids", root, "--schema", schema, "--num-shards", "1").returncode == 0
    assert sorted(contents(out / "data")) == ["train-00000-of-00001.parquet"]
    assert contents(out / "other") == other
    assert len(read_with_stock(out)) == len(read_with_stock(out, "other")) == 3
    assert "Edited by hand." in card.read_text()
    assert [config["config_name"] for config in DatasetCard.load(card).data["configs"]] == [
        "default",
        "other",
        "other-preview",
        "preview",
    ]


def test_dry_run_writes_nothing(tree, tmp_path):
    root, schema = tree
    pushed = push_to(tmp_path / "out", "bids", root, "--schema", schema, "--dry-run")
    assert pushed.returncode == 0, pushed.stderr
    lines = pushed.stdout.splitlines()
    assert lines[0] == "Found 3 subjects"
    assert lines[-1] == "Dry run complete. Dataset built but not pushed."
    assert "3 rows, 9 images, 602.7 kB" in pushed.stdout and "Null: age 1 of 3 rows" in pushed.stdout
    assert not (tmp_path / "out").exists()
    assert push_to(tmp_path / "out", "bids", root, "--schema", schema, "--no-dry-run").returncode == 0
    assert (tmp_path / "out" / "README.md").exists()


def test_files_that_cannot_be_stored_are_all_named_before_anything_is_written(tree, tmp_path):
    root, schema = tree
    (root / "sub-1/anat/sub-1_T1w.nii.gz").write_bytes(b"")
    (root / "sub-2/anat/sub-2_T1w.nii.gz").unlink()
    (root / "sub-2/anat/sub-2_T1w.nii.gz").symlink_to("../../.git/annex/objects/x.nii.gz")
    page = b"\n\n<!DOCTYPE html><html>" + bytes(100_000)
    volume = volume_bytes("plain", compressed=False)
    bad = {
        "sub-3/anat/sub-3_T1w.nii.gz": b"\n",
        "sub-1/func/sub-1_run-0_bold.nii.gz": page,
        "sub-2/func/sub-2_run-0_bold.nii.gz": gzip.compress(page),
        "sub-2/func/sub-2_run-1_bold.nii.gz": volume[:-1],
        "sub-3/func/sub-3_run-0_bold.nii.gz": gzip.compress(volume)[:100],
    }
    for path, content in bad.items():
        (root / path).write_bytes(content)
    pushed = push_to(tmp_path / "out", "bids", root, "--schema", schema)
    assert pushed.returncode == 1
    assert "Traceback" not in pushed.stderr
    assert "7 files cannot be stored" in pushed.stderr
    for part in (*bad, "sub-1_T1w.nii.gz is empty", "sub-2_T1w.nii.gz does not exist", "row 0, column 't1w'", "HTML"):
        assert part in pushed.stderr, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data-dir", "nowhere"], "error: There is no directory"),
        (["--schema", "nowhere.yaml"], "error: .*nowhere.yaml"),
        (["--num-shards", "0"], "error: num_shards must be at least 1"),
        (["--max-shard-size", "big"], "error: .*big"),
        (["--schema", "{tree}/participants.tsv"], "error: .*participants.tsv: is no YAML"),
        (["--schema", "{tree}/dataset_description.json"], "error: .*description.json: expected the keys schema"),
        (["--output-dir", "{tree}/participants.tsv"], "error: .*participants.tsv"),
    ],
)
def test_user_errors_are_one_line_and_a_status(tree, tmp_path, options, message):
    import re

    root, schema = tree
    pushed = push_to(tmp_path / "out", "bids", root, "--schema", schema, *(o.format(tree=root) for o in options))
    assert pushed.returncode == 1
    assert re.search(message, pushed.stderr), pushed.stderr
    assert "Traceback" not in pushed.stderr
    assert not (tmp_path / "out").exists()


def test_a_builder_that_is_not_there_is_not_looked_for_on_the_hub(tree, tmp_path):
    pushed = push_to(tmp_path / "out", "builders/nothing", tree[0])
    assert pushed.returncode == 1
    assert pushed.stderr.startswith("error: builders/nothing: is no builder directory")


def test_where_to_is_asked_for(tree, tmp_path, capsys):
    with pytest.raises(SystemExit):
        push.main(["bids", "--data-dir", str(tree[0])])
    assert "--output-dir DIR, or --dry-run" in capsys.readouterr().err


def test_killed_and_started_again_it_goes_on(tree, tmp_path):
    """Killed at moments all over the push; the shards that were whole are not written again, and the end is the same."""
    root, schema = tree
    for i in range(4, 40):
        path = root / f"sub-{i}/anat/sub-{i}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(noise_bytes(i, 500_000))
    assert push_to(tmp_path / "expected", "bids", root, "--schema", schema, "--num-shards", "39").returncode == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "datasets_bids.push", "bids", "--data-dir", root, "--schema", schema]
    command += ["--output-dir", out, "--num-shards", "39"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    finished: dict[str, int] = {}
    kills = 0
    while kills < 8:
        process = subprocess.Popen([*map(str, command)], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        already = len(finished)
        while process.poll() is None:
            whole = [path for path in (out / _STAGING).rglob("*.parquet") if not path.name.startswith(".")]
            if len(whole) >= already + 4:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        if process.returncode == 0:
            break
        kills += 1
        now = {path.name: path.stat().st_mtime_ns for path in (out / _STAGING).rglob("[!.]*.parquet")}
        for name, mtime in finished.items():
            assert now.get(name, mtime) == mtime, "a finished shard was written again"
        finished = now
    assert kills > 2
    assert push_to(out, "bids", root, "--schema", schema, "--num-shards", "39").returncode == 0
    assert contents(out) == contents(tmp_path / "expected")


def test_a_source_that_changed_after_a_kill_is_embedded_anew(tree, tmp_path, monkeypatch):
    root, schema = tree
    args = [
        "bids",
        "--data-dir",
        str(root),
        "--schema",
        str(schema),
        "--output-dir",
        str(tmp_path / "out"),
        "--num-shards=3",
    ]

    def only_into_staging(source, target, replace=os.replace):
        if _STAGING not in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", only_into_staging)
        assert push.main(args) == 130
    staged = {path.name for path in (tmp_path / "out" / _STAGING).rglob("*.parquet")}
    assert len(staged) == 3
    (root / "sub-2/anat/sub-2_T1w.nii.gz").write_bytes((root / "sub-1/anat/sub-1_T1w.nii.gz").read_bytes())
    assert push_to(tmp_path / "out", "bids", root, "--schema", schema, "--num-shards", "3").returncode == 0
    second = read_with_stock(tmp_path / "out")[1]
    assert second["t1w"][1] == digest_of(root / "sub-1/anat/sub-1_T1w.nii.gz")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
def test_memory_follows_the_largest_row_not_their_number(tmp_path):
    """40 rows of 8 MB: far above the bound if a shard were held, far below if a row is."""
    root = tmp_path / "tree"
    data = noise_bytes(0, 8_000_000)
    for i in range(40):
        path = root / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump({"schema": {"t1w": "anat/*_T1w.nii.gz"}}))
    # Not ru_maxrss: a child starts with its parent's.
    code = """
import re, sys
from datasets_bids.push import main
peak = lambda: int(re.search("VmHWM: *\\t *(\\d+) kB", open("/proc/self/status").read())[1])
args = sys.argv[1:]
assert main([*args[:-2], "--dry-run"]) == 0
before = peak()
assert main(args) == 0
print(peak() - before)
"""
    args = ["bids", "--data-dir", root, "--schema", schema, "--output-dir", tmp_path / "out"]
    pushed = run("-c", code, *args)
    assert pushed.returncode == 0, pushed.stderr
    grown = int(pushed.stdout.splitlines()[-1]) * 1024
    assert grown < 160e6, f"{grown / 1e6:.0f} MB on top, for rows of 8 MB and 320 MB in all"
