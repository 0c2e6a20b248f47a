"""What tests run inside a client process of the test server: datasets of files, pushes that are counted, stock reads."""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard

from datasets_bids import embed, upload


FEATURES = datasets.Features(
    {
        "subject_id": datasets.Value("string"),
        "age": datasets.Value("float64"),
        "t1w": datasets.Nifti(),
        "bold": datasets.List(datasets.Nifti()),
    }
)


def dataset(tree: str) -> datasets.Dataset:
    """A row for every directory below `tree`: its t1w.nii and its bold-*.nii."""
    rows = {name: [] for name in FEATURES}
    for folder in sorted(Path(tree).iterdir()):
        rows["subject_id"].append(folder.name)
        rows["age"].append(float(int(hashlib.sha1(folder.name.encode()).hexdigest()[:2], 16)))
        rows["t1w"].append(str(folder / "t1w.nii") if (folder / "t1w.nii").exists() else None)
        rows["bold"].append([str(path) for path in sorted(folder.glob("bold-*.nii"))])
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def count_embedding(log: str) -> None:
    """Has every shard that is embedded from now on leave a line in the file `log`."""

    def counted(ds, shard, path, **kwargs):
        if path.endswith(".part"):  # else it is one example, to compare with what was read back
            with open(log, "a") as file:
                file.write(f"{ds['subject_id'][shard.start]}\n")
        return embed.write_shard(ds, shard, path, **kwargs)

    upload.write_shard = counted


def push(tree: str, repo_id: str, log: str | None = None, processes: int | None = None, **options):
    """`push_dataset_to_hub` with a commit on the working branch every three shards and short waits."""
    upload.COMMIT_SHARDS = options.pop("commit_shards", 3)
    upload.PATIENCE = options.pop("patience", 30.0)
    upload.TIMEOUT = options.pop("timeout", upload.TIMEOUT)
    upload.FIRST_WAIT = 0.05
    options.setdefault("num_shards", 8)
    options.setdefault("card", DatasetCard("---\n{}\n---\n\n# Phantoms\n"))  # the same in every repository
    if processes:
        initializer = count_embedding if log else None
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer, (log,) if log else ()) as executor:
            return upload.push_dataset_to_hub(dataset(tree), repo_id, executor=executor, **options).oid
    if log:
        count_embedding(log)
    return upload.push_dataset_to_hub(dataset(tree), repo_id, **options).oid


def read(repo_id: str, config: str | None = None, split: str = "train", revision: str | None = None) -> dict:
    """subject -> SHA-256 of each of its files, as stock `datasets` streams it."""
    ds = datasets.load_dataset(repo_id, config, split=split, streaming=True, revision=revision)
    ds = ds.cast_column("t1w", datasets.Nifti(decode=False)).cast_column(
        "bold", datasets.List(datasets.Nifti(decode=False))
    )
    found = {}
    for row in ds:
        files = [row["t1w"], *row["bold"]]
        found[row["subject_id"]] = [file and hashlib.sha256(file["bytes"]).hexdigest() for file in files]
    return found


def memory_peak() -> int:
    """Peak resident set (bytes) of this process."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
