import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
from datasets import load_dataset, load_dataset_builder

import datasets_bids  # noqa: F401
from datasets_bids import loading

from .trees import write_volumes


SCRIPT = """
from datasets_bids import BidsBuilder, BidsConfig


class Tiny(BidsBuilder):
    BUILDER_CONFIGS = [
        BidsConfig(name="default", schema={"t1w": "{subject}/anat/{subject}_T1w.nii.gz"}, metadata_from="participants.tsv"),
        BidsConfig(name="ids", schema={"image": "{subject}/anat/{subject}_T1w.nii.gz"}),
    ]
    DEFAULT_CONFIG_NAME = "default"
"""


@pytest.fixture
def tiny(tmp_path):
    """(builder directory, tree) of two subjects."""
    builder, tree = tmp_path / "builders" / "tiny", tmp_path / "tree"
    builder.mkdir(parents=True)
    (builder / "tiny.py").write_text(SCRIPT)
    write_volumes(tree, ["sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz"])
    (tree / "participants.tsv").write_text("participant_id\tage\nsub-1\t60\nsub-2\t61\n")
    return builder, tree


def in_a_fresh_process(code, *args, cwd=None):
    """What `code` prints, run by an interpreter that knows nothing of this one."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_way_to_write_the_path(tiny, monkeypatch):
    builder, tree = tiny
    monkeypatch.chdir(builder.parent.parent)
    for path in (
        "builders/tiny",
        "builders/tiny/",
        "./builders/tiny",
        "builders//tiny",
        builder,
        f"{builder}/tiny.py",
    ):
        for data_dir in (tree, f"{tree}/", "tree", "./tree/"):
            ds = load_dataset(path, data_dir=data_dir, split="train")
            assert ds["subject_id"] == ["sub-1", "sub-2"]
            assert ds[1]["t1w"].shape == (4, 4, 3)


def test_configs_splits_streaming_and_processes(tiny):
    builder, tree = tiny
    assert list(load_dataset(str(builder), data_dir=tree)) == ["train"]
    assert load_dataset(str(builder), "ids", data_dir=tree, split="train").column_names == ["subject_id", "image"]
    assert load_dataset(str(builder), name="ids", data_dir=tree, split="train[:1]").num_rows == 1
    streaming = load_dataset(str(builder), data_dir=tree, split="train", streaming=True)
    assert [row["age"] for row in streaming] == [60, 61]
    assert streaming.features == load_dataset(str(builder), data_dir=tree, split="train").features
    two = load_dataset(str(builder), data_dir=tree, split="train", num_proc=2, cache_dir=str(tree.parent / "cache"))
    assert two["subject_id"] == ["sub-1", "sub-2"]
    with pytest.raises(ValueError, match="BuilderConfig 'nothing' not found"):
        load_dataset(str(builder), "nothing", data_dir=tree)


def test_inspection(tiny):
    builder, tree = tiny
    assert datasets.get_dataset_config_names(str(builder)) == ["default", "ids"]
    assert datasets.get_dataset_default_config_name(str(builder)) == "default"
    assert datasets.get_dataset_split_names(str(builder), data_dir=str(tree)) == ["train"]
    assert list(load_dataset_builder(str(builder), data_dir=tree).info.features) == ["subject_id", "t1w", "age"]
    with pytest.raises(ValueError, match="pass its directory as data_dir="):
        load_dataset(str(builder))


def test_streaming_dataset_is_unpickled_in_a_fresh_process(tiny, tmp_path):
    builder, tree = tiny
    streaming = load_dataset(str(builder), data_dir=tree, split="train", streaming=True)
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(streaming))
    printed = in_a_fresh_process(
        """
        import pickle, sys
        dataset = pickle.load(open(sys.argv[1], "rb"))
        print([row["subject_id"] + str(row["t1w"].shape) for row in dataset])
        """,
        tmp_path / "dataset.pkl",
    )
    assert printed == "['sub-1(4, 4, 3)', 'sub-2(4, 4, 3)']"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_streaming_in_worker_processes(tiny, tmp_path, method):
    """As a DataLoader does: the dataset goes to workers that share nothing with this process."""
    builder, tree = tiny
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys

            def rows(dataset):
                return [row["subject_id"] for row in dataset]

            if __name__ == "__main__":
                import datasets_bids
                from datasets import load_dataset
                dataset = load_dataset(sys.argv[1], data_dir=sys.argv[2], split="train", streaming=True)
                with multiprocessing.get_context(sys.argv[3]).Pool(2) as pool:
                    print(pool.map(rows, [dataset.shard(2, 0), dataset.shard(2, 1)]))
            """
        )
    )
    run = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    printed = in_a_fresh_process(run, script, builder, tree, method)
    assert printed == "[['sub-1'], ['sub-2']]"


def test_load_dataset_imported_before_the_package(tiny):
    builder, tree = tiny
    printed = in_a_fresh_process(
        """
        import sys
        from datasets import load_dataset
        import datasets_bids
        print(load_dataset(sys.argv[1], data_dir=sys.argv[2], split="train").num_rows)
        """,
        builder,
        tree,
    )
    assert printed == "2"


def test_a_changed_tree_is_seen(tiny):
    builder, tree = tiny

    def rows():
        dataset = load_dataset(str(builder), data_dir=tree, split="train")
        return list(zip(dataset["subject_id"], dataset["age"], strict=True))

    assert rows() == [("sub-1", 60), ("sub-2", 61)]
    write_volumes(tree, ["sub-3/anat/sub-3_T1w.nii.gz"])
    assert rows() == [("sub-1", 60), ("sub-2", 61), ("sub-3", None)]
    (tree / "sub-1/anat/sub-1_T1w.nii.gz").unlink()
    (tree / "participants.tsv").write_text("participant_id\tage\nsub-2\t99\nsub-3\t62\n")
    assert rows() == [("sub-2", 99), ("sub-3", 62)]
    datasets.load_dataset(str(builder), data_dir=tree, download_mode="force_redownload")


def test_a_changed_script_is_seen(tiny):
    builder, tree = tiny
    assert load_dataset(str(builder), data_dir=tree, split="train").column_names == ["subject_id", "t1w", "age"]
    script = builder / "tiny.py"
    stat = script.stat()
    script.write_text(SCRIPT.replace('"t1w"', '"T1W"'))
    # Python's own cache of compiled code goes by size and time, and both are as before.
    os.utime(script, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_dataset(str(builder), data_dir=tree, split="train").column_names == ["subject_id", "T1W", "age"]


def test_builders_of_the_same_name_do_not_meet(tiny, tmp_path):
    builder, tree = tiny
    other = tmp_path / "elsewhere" / "tiny"
    other.mkdir(parents=True)
    (other / "tiny.py").write_text(SCRIPT.replace('"t1w"', '"image"'))
    first = load_dataset(str(builder), data_dir=tree, split="train", streaming=True)
    second = load_dataset(str(other), data_dir=tree, split="train", streaming=True)
    assert next(iter(first)).keys() == {"subject_id", "t1w", "age"}
    assert next(iter(second)).keys() == {"subject_id", "image", "age"}
    assert next(iter(pickle.loads(pickle.dumps(first)))).keys() == {"subject_id", "t1w", "age"}


def test_several_configs_and_no_default_ask_which(tiny):
    builder, tree = tiny
    (builder / "tiny.py").write_text(SCRIPT.replace('    DEFAULT_CONFIG_NAME = "default"\n', ""))
    with pytest.raises(ValueError, match="builder 'tiny' has several configs, say which one: default, ids"):
        load_dataset(str(builder), data_dir=tree)


def test_a_broken_script_is_one_clear_error(tiny):
    builder, tree = tiny
    (builder / "tiny.py").write_text("class Tiny(BidsBuilder:\n")
    with pytest.raises(ValueError, match="tiny.py, line 1: .*; mend the builder script"):
        load_dataset(str(builder), data_dir=tree)


MARK = "open({!r}, 'w').close()\nfrom datasets_bids import BidsBuilder\nclass X(BidsBuilder):\n    pass\n"


def test_a_script_from_the_hub_or_its_cache_is_never_run(tmp_path, monkeypatch):
    """A script of the right form, in every place that stock `datasets` or the Hub's client downloads to."""
    ran = tmp_path / "ran"
    for i, (module, constant) in enumerate(
        [
            (datasets.config, "HF_CACHE_HOME"),
            (datasets.config, "HF_DATASETS_CACHE"),
            (datasets.config, "HF_MODULES_CACHE"),
            (datasets.config, "DOWNLOADED_DATASETS_PATH"),
            (loading, "HF_HUB_CACHE"),
        ]
    ):
        cache = tmp_path / f"cache{i}"
        monkeypatch.setattr(module, constant, cache)
        script = cache / "datasets--org--evil" / "snapshots" / "evil" / "evil.py"
        script.parent.mkdir(parents=True)
        script.write_text(MARK.format(str(ran)))
        link = tmp_path / f"link{i}" / "evil"
        link.mkdir(parents=True)
        (link / "evil.py").symlink_to(script)
        for path in (script.parent, script, link):
            with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported, but found evil.py"):
                load_dataset(str(path), data_dir=tmp_path)
    assert not ran.exists()


def test_other_scripts_and_names_go_to_stock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    other = tmp_path / "other"
    other.mkdir()
    (other / "other.py").write_text(MARK.format(str(ran)).replace("X(BidsBuilder)", "X(GeneratorBasedBuilder)"))
    with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
        load_dataset("other", data_dir=tmp_path)
    assert not ran.exists()
    (tmp_path / "table.csv").write_text("a\n1\n")
    assert load_dataset("csv", data_files=str(tmp_path / "table.csv"), split="train")[0] == {"a": 1}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "table.csv").write_text("a\n2\n")
    assert load_dataset(str(plain), split="train")[0] == {"a": 2}


def test_the_hub_is_asked_for_a_name_that_is_no_local_directory():
    printed = in_a_fresh_process(
        """
        import datasets_bids, datasets
        try:
            datasets.load_dataset("org/evil", data_dir=".")
        except Exception as e:
            print(type(e).__name__)
        """
    )
    assert printed in ("ConnectionError", "OfflineModeIsEnabled")


def test_install_is_idempotent_and_undone(tiny):
    builder, tree = tiny
    installed = datasets.load.dataset_module_factory
    loading.install()
    assert datasets.load.dataset_module_factory is installed
    loading.uninstall()
    try:
        assert datasets.load.dataset_module_factory is installed.__wrapped__
        assert datasets.inspect.dataset_module_factory is installed.__wrapped__
        with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
            load_dataset(str(builder), data_dir=tree)
    finally:
        loading.install()
    assert load_dataset(str(builder), data_dir=tree, split="train").num_rows == 2


def test_a_missing_tree_and_data_files_are_refused(tiny):
    builder, tree = tiny
    with pytest.raises(FileNotFoundError, match="There is no file under memory://nowhere: check data_dir"):
        load_dataset(str(builder), data_dir="memory://nowhere")
    with pytest.raises(ValueError, match="pass data_dir=, not data_files="):
        load_dataset(str(builder), data_files=str(tree / "participants.tsv"))
    with pytest.raises(FileNotFoundError, match="no directory .*nowhere: check data_dir"):
        load_dataset(str(builder), data_dir=tree / "nowhere")
