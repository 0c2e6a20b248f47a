"""Patching with manners: only what the release lacks, once, undoably, and in spawned processes too."""

import copyreg
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Nifti
from packaging.version import Version

from datasets_bids import patching, stock
from datasets_bids.patching import Patch


ROOT = str(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def start_and_end_patched(tmp_path, monkeypatch):
    patching.apply()
    monkeypatch.chdir(tmp_path)
    yield
    patching.undo()
    patching.apply()


def snapshot():
    """Every name in every module and class of `datasets`."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "datasets" or name.startswith("datasets."):
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__.startswith("datasets."):
                    found |= {(value.__module__, value.__qualname__, k): id(v) for k, v in vars(value).items()}
    found |= {("copyreg", cls): id(f) for cls, f in copyreg.dispatch_table.items()}
    # What Python and tqdm keep on classes.
    return {k: v for k, v in found.items() if k[-1] not in ("__slotnames__", "_lock", "monitor")}


def test_undo_leaves_no_trace():
    modules = sorted({patch.target.partition(":")[0] for patch in patching.patches()})
    code = f"""
import contextlib, copyreg, importlib, sys
for name in {modules}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
{inspect.getsource(snapshot)}
before = snapshot()
sys.path.insert(0, {ROOT!r})
from datasets_bids import patching
patching.apply()
patched = snapshot()
patching.apply()
assert snapshot() == patched != before
patching.undo()
after = snapshot()
# `load_dataset` of builder directories is not a patch (`loading.py`).
changed = {{k for k in before if after.get(k) != before[k] and k[-1] != "dataset_module_factory"}}
assert not changed, changed
patching.apply()
assert snapshot().keys() == patched.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_are_replaced_wherever_they_were_imported():
    replaced = datasets.table.embed_table_storage
    assert datasets.arrow_dataset.embed_table_storage is replaced
    assert datasets.arrow_writer.embed_table_storage is replaced
    patching.undo()
    original = datasets.table.embed_table_storage
    assert original is not replaced
    assert datasets.arrow_dataset.embed_table_storage is original
    assert datasets.iterable_dataset.embed_table_storage is original


def test_what_is_not_needed_is_left_alone():
    patching.undo()
    original = Dataset.save_to_disk
    patching.apply([Patch("datasets:Dataset.save_to_disk", lambda _: None, lambda: False, "fixed")])
    assert Dataset.save_to_disk is original and patching.applied() == ()
    assert Dataset not in copyreg.dispatch_table


def test_missing_names_are_added_only_on_request():
    patching.undo()
    patches = [
        Patch("datasets:Dataset.no_such_method", lambda _: lambda self: 1, lambda: True, ""),
        Patch("datasets:Dataset.no_such_method_either", lambda _: lambda self: 2, lambda: True, "", adds=True),
        Patch("datasets:NoSuchClass.method", lambda _: lambda self: 3, lambda: True, "", adds=True),
        Patch("datasets.no_such_module:function", lambda _: lambda: 4, lambda: True, "", adds=True),
    ]
    patching.apply(patches)
    assert patching.applied() == (patches[1],) and Dataset.no_such_method_either(None) == 2
    patching.undo()
    assert not hasattr(Dataset, "no_such_method_either")


def test_an_unknown_newer_release_gets_one_warning_and_what_still_matches(monkeypatch):
    patching.undo()
    monkeypatch.setattr(patching, "NEWEST_TESTED", Version("1.0"))
    monkeypatch.setattr(patching, "_warned", False)

    def save_to_disk(
        self, dataset_path, max_shard_size=None, num_shards=None, num_proc=None, storage_options=None
    ): ...

    def to_csv(self, some_other_name): ...

    def raises():
        raise AttributeError("what the probe calls has moved")

    to_json = Dataset.to_json
    patches = [
        Patch("datasets:Dataset.save_to_disk", lambda _: save_to_disk, lambda: True, ""),
        Patch("datasets:Dataset.to_csv", lambda _: to_csv, lambda: True, ""),
        Patch("datasets:Dataset.to_json", lambda _: to_csv, raises, ""),
        Patch("datasets:Dataset.to_sql", lambda _: None, lambda: True, "one that no replacement understands"),
    ]
    with pytest.warns(UserWarning, match="newer than 1.0.*left alone because they changed: .*to_csv.*to_sql"):
        patching.apply(patches)
    assert patching.applied() == (patches[0],) and Dataset.save_to_disk is save_to_disk
    assert Dataset.to_json is to_json
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patching.undo()
        patching.apply(patches)


def test_all_patches_understand_this_release(monkeypatch):
    patching.undo()
    monkeypatch.setattr(patching, "NEWEST_TESTED", Version("1.0"))
    monkeypatch.setattr(patching, "_warned", False)
    with pytest.warns(UserWarning) as warned:
        patching.apply()
    assert "left alone" not in str(warned[0].message)


def test_every_patch_names_its_defect():
    assert all(patch.defect and "\n" not in patch.defect for patch in patching.patches())
    targets = [patch.target for patch in patching.patches()]
    assert len(targets) == len(set(targets))


def test_after_patching_nothing_is_needed_anymore():
    """The probes pass on a mended `datasets`: there, importing this package changes nothing."""
    mended = [a.patch for a in patching._applied if a.patch in stock.PATCHES and a.original is not None]
    assert mended and [patch.target for patch in mended if patching._is_needed(patch, True)] == []


WORKER = """
import sys
sys.path.insert(0, {root!r})

def work(dataset):
    import datasets
    assert "datasets_bids" not in sys.modules or datasets.table.embed_table_storage.__globals__["__name__"] == "datasets_bids.stock"
    return datasets.table.embed_table_storage.__globals__["__name__"], "datasets_bids" in sys.modules

def count(example):
    import datasets
    return {{"where": datasets.table.embed_table_storage.__globals__["__name__"], "pid": __import__("os").getpid()}}

if __name__ == "__main__":
    import multiprocessing
    from datasets import Dataset, Features, Nifti, Value
    if {patches}:
        from datasets_bids import patching
        patching.apply()
    dataset = Dataset.from_dict({{"x": ["a.nii", "b.nii"], "n": [1, 2]}}, features=Features({{"x": Nifti(), "n": Value("int64")}}))
    inputs = [dataset, dataset.to_iterable_dataset(), dataset.features]
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for value in inputs:
                print(*pool.apply(work, (value,)))
    import multiprocess, os
    multiprocess.set_start_method("spawn")
    mapped = dataset.remove_columns("x").map(count, num_proc=2)
    assert os.getpid() not in mapped["pid"]
    print(*set(mapped["where"]))
"""


@pytest.mark.parametrize("patches", [True, False])
def test_spawned_processes_are_patched_without_an_import(patches):
    Path("main.py").write_text(WORKER.format(root=ROOT, patches=patches))
    run = subprocess.run(
        [sys.executable, "main.py"], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert run.returncode == 0, run.stderr
    *pools, mapped = run.stdout.splitlines()
    here = "datasets_bids.stock" if patches else "datasets.table"
    assert pools == [f"{here} {patches}"] * 6 and mapped == here


def test_pickles_without_patches_need_no_package():
    dataset = Dataset.from_dict({"x": ["a.nii"]}, features=Features({"x": Nifti()}))
    assert b"datasets_bids" in pickle.dumps(dataset)
    patching.undo()
    assert b"datasets_bids" not in pickle.dumps(dataset)
