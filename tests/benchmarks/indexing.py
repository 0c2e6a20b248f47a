"""How long it takes to index a tree of 3,000 subjects and 36,000 files, next to bids2table and pybids.

    pip install bids2table pybids && python -m tests.benchmarks.indexing

Ours is the walk with every file's size and times, and the entities of every image: what a build asks of the tree.
Each is the best of `--repeat` runs in a process of its own; all in one run, since only the ratios mean something. Times are CPU
times, so that other programs on the machine count less.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


OURS = """
from datasets_bids.index import index_tree
from datasets_bids.layout import find_configs
def run(root):
    index = index_tree(root)
    assert sum(map(len, find_configs(index).values())) == len(index.images)
    return len(index.files), len(index.images)
"""
BUILD = """
from datasets_bids.bids import BidsConfig, build_rows
from datasets_bids.index import index_tree
def run(root):
    index = index_tree(root)
    return len(build_rows(BidsConfig(), index).rows["train"]), len(index.images)
"""
BIDS2TABLE = """
from bids2table import index_dataset
def run(root):
    return len(index_dataset(root)), None
"""
PYBIDS = """
from bids import BIDSLayout
def run(root):
    return len(BIDSLayout(root).get_files()), None
"""
TIMED = """
import json, sys, time
start = time.process_time()
counts = run(sys.argv[1])
print(json.dumps([time.process_time() - start, *counts]))
"""


def make_tree(root: Path, subjects: int) -> None:
    """12 files a subject, half of them images."""
    root.mkdir()
    (root / "dataset_description.json").write_text('{"Name": "benchmark", "BIDSVersion": "1.9.0"}')
    names = {
        "anat": ["T1w", "T2w"],
        "dwi": ["dwi"],
        "func": ["task-rest_run-1_bold", "task-rest_run-2_bold", "task-a_bold"],
    }
    for number in range(subjects):
        for datatype, suffixes in names.items():
            directory = root / f"sub-{number:04d}" / datatype
            directory.mkdir(parents=True)
            for suffix in suffixes:
                (directory / f"sub-{number:04d}_{suffix}.nii.gz").touch()
                (directory / f"sub-{number:04d}_{suffix}.json").write_text("{}")


def measure(code: str, root: Path, repeat: int) -> list:
    runs = []
    for _ in range(repeat):
        done = subprocess.run(
            [sys.executable, "-c", code + TIMED, root], stdout=subprocess.PIPE, check=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return min(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=3000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sizes = {}
        for subjects in (options.subjects, 2 * options.subjects):
            root = sizes[subjects] = Path(directory, str(subjects))
            make_tree(root, subjects)
        root = sizes[options.subjects]
        ours = measure(OURS, root, options.repeat)
        print(f"datasets-bids: {ours[0]:.3f} s ({ours[1]} files, {ours[2]} images)")
        double = measure(OURS, sizes[2 * options.subjects], options.repeat)
        print(f"  twice the subjects: {double[0] / ours[0]:.2f} x")
        built = measure(BUILD, root, options.repeat)
        print(f"  with columns and rows: {built[0]:.3f} s ({built[1]} rows)")
        for name, code, repeat in (("bids2table", BIDS2TABLE, options.repeat), ("pybids", PYBIDS, 1)):
            other = measure(code, root, repeat)
            print(f"{name}: {other[0]:.3f} s ({other[1]} entries): {other[0] / ours[0]:.1f} x")


if __name__ == "__main__":
    main()
