"""The main job on a small tree, end to end: `python -m tests.demo [DIRECTORY]`.

Makes an ISLES'24-shaped tree of phantom heads, pushes it to a directory, loads that with stock `datasets` in a process of
its own, and compares every file's SHA-256. Needs neither network nor account.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .phantom import Head
from .trees import isles24_paths, isles24_phenotype, isles24_subjects, isles24_values


SUBJECTS = 4
BUILDER = Path(__file__).parent.parent / "builders" / "isles24"

# What a user of the pushed dataset runs: stock `datasets`, and nothing of this package.
READER = """
import hashlib, json, sys
from datasets import Features, Nifti, load_dataset

dataset = load_dataset(sys.argv[1], split="train")
assert "datasets_bids" not in sys.modules
lesion = dataset[0]["lesion_mask"]
print("   lesion_mask of row 0:", lesion.shape, "voxels,", int(lesion.get_fdata().sum()), "of them lesion", file=sys.stderr)
images = [name for name, feature in dataset.features.items() if isinstance(feature, Nifti)]
raw = dataset.cast(Features({n: Nifti(decode=False) if n in images else f for n, f in dataset.features.items()}))
for row in raw:
    for name in images:
        if row[name] is not None:
            print(json.dumps([row[name]["path"], hashlib.sha256(row[name]["bytes"]).hexdigest()]))
"""


def make_tree(root: Path, subjects: int = SUBJECTS) -> list[Path]:
    """Writes the tree; returns its images."""
    images = []
    for i, subject in enumerate(isles24_subjects(subjects)):
        for path in isles24_paths(subject, perfusion=i != 1, vessels=i != 2):
            modality = path.rpartition("_")[2].removesuffix(".nii.gz")
            shape = (96, 96, 12, 32) if modality == "ctp" else (192, 192, 72) if "ses-01" in path else (160, 160, 56)
            Head(i).save(root / path, modality, shape)
            images.append(root / path)
        isles24_phenotype(root, subject, *isles24_values(i))
    return images


def main(directory: str = "demo-isles24") -> int:
    root = Path(directory)
    tree, output = root / "train", root / "isles24-stroke"
    for old in (tree, output):
        shutil.rmtree(old, ignore_errors=True)
    images = make_tree(tree)
    nbytes = sum(image.stat().st_size for image in images)
    print(f"1. Made {tree}: {SUBJECTS} phantom subjects, {len(images)} images, {nbytes / 1e6:.1f} MB")

    start = time.perf_counter()
    command = [sys.executable, "-m", "datasets_bids.push", str(BUILDER), "--data-dir", str(tree)]
    print(f"2. python {' '.join(command[1:3])} builders/isles24 --data-dir {tree} --output-dir {output}", flush=True)
    subprocess.run([*command, "--output-dir", str(output), "--max-shard-size", "10MB"], check=True)
    shards = sorted((output / "data").iterdir())
    print(f"3. Pushed in {time.perf_counter() - start:.1f} s: " + ", ".join(shard.name for shard in shards))

    print("4. Loading it with stock `datasets` in a process of its own", flush=True)
    command = [sys.executable, "-c", READER, str(output.absolute())]
    quiet = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    reader = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=quiet)
    on_disk = {image.name: hashlib.sha256(image.read_bytes()).hexdigest() for image in images}
    loaded = [json.loads(line) for line in reader.stdout.splitlines()]
    wrong = [name for name, digest in loaded if on_disk[name] != digest]
    if wrong or not loaded:
        print(f"   {len(wrong)} of {len(loaded)} values differ from their files: {', '.join(wrong)}")
        return 1
    print(f"5. SHA-256 of all {len(loaded)} embedded images equals that of their files. Look around in {root}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
