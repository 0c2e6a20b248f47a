"""How long `python -m datasets_bids.validate` takes: `python -m tests.benchmarks.validation`.

Each line is a process of its own, imports included. `isles24` has 149 subjects (2,494 images, 298 workbooks), `bids` has 600
(4,800 images, 2,404 sidecars, 1,203 tables), both of tiny files: what is measured is the cost of a file. `large` has 40 images of
21 MB (11 MB compressed), to compare `--deep` with `gzip -t` in as many processes as there are cores.
"""

import gzip
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.trees import bids_tree, isles24_tree


ROOT = Path(__file__).parents[2]


def measure(name: str, *command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:24} {seconds:6.1f} s   {cpu:6.1f} s CPU   peak so far {after.ru_maxrss / 1000:6.0f} MB", flush=True)


def main() -> None:
    validate = (sys.executable, "-m", "datasets_bids.validate")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        schema = root / "schema.yaml"
        schema.write_text("schema: {t1w: 'anat/*_T1w.nii.gz'}\nexpected: {same_grid: [[t1w]]}\n")
        isles24_tree(root / "isles24")
        bids_tree(root / "bids", subjects=600)
        voxels = np.random.default_rng(0).normal(0, 20, (256, 256, 160)).astype("i2")
        content = gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 1)
        for i in range(40):
            path = root / f"large/sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        for deep in ((), ("--deep",)):
            builder = str(ROOT / "builders/isles24")
            measure(" ".join(("isles24", *deep)), *validate, builder, "--data-dir", str(root / "isles24"), *deep)
            for name in ("bids", "large"):
                options = ("bids", "--schema", str(schema), "--data-dir", str(root / name))
                measure(" ".join((name, *deep)), *validate, *options, *deep)
        paths = f"find {root / 'large'} -name '*.gz' -print0 | xargs -0 -n 1 -P {os.cpu_count()} gzip -t"
        measure("large, gzip -t", "sh", "-c", paths)


if __name__ == "__main__":
    main()
