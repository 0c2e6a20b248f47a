"""Decoding a gzipped 4-D image from embedded bytes, against stock `datasets` of the same release.

    python -m tests.benchmarks.decode [--mb 300]

Every figure is the median of three runs, each in a process of its own: the time from the stored bytes to what was
asked for, and the most memory that was in use for it beyond the stored bytes (resident, as the system counts it).
"""

import argparse
import gzip
import multiprocessing
import pickle
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np


READS = {
    "header": lambda image, rng: (image.shape, image.affine, image.header.get_zooms()),
    "first volume": lambda image, rng: image.dataobj[..., 0],
    "last volume": lambda image, rng: image.dataobj[..., -1],
    "10 random volumes": lambda image, rng: [image.dataobj[..., t] for t in rng.integers(image.shape[3], size=10)],
    "all (get_fdata, f4)": lambda image, rng: image.get_fdata(dtype=np.float32),
    "pickle": lambda image, rng: pickle.dumps(image),
}


def measure(connection, path: str, read: str, patched: bool) -> None:
    import nibabel  # noqa: F401 - not part of what is measured

    from datasets_bids import patching

    patching.apply() if patched else patching.undo()
    from datasets import Nifti

    stored = Path(path).read_bytes()
    small = nibabel.Nifti1Image(np.zeros((2, 2, 2, 2), np.int16), np.eye(4))
    READS[read](
        Nifti().decode_example({"path": "warm.nii.gz", "bytes": gzip.compress(small.to_bytes())}),
        np.random.default_rng(0),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    image = Nifti().decode_example({"path": "image.nii.gz", "bytes": stored})
    result = READS[read](image, np.random.default_rng(0))
    seconds = time.perf_counter() - start
    size = len(result) if isinstance(result, bytes) else None
    connection.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, size))


def run(path: Path, read: str, patched: bool, repeats: int = 3) -> tuple[float, float, int | None]:
    context = multiprocessing.get_context("spawn")
    results = []
    for _ in range(repeats):
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(theirs, str(path), read, patched))
        process.start()
        results.append(ours.recv())
        process.join()
    return statistics.median(r[0] for r in results), statistics.median(r[1] for r in results), results[0][2]


def make_file(path: Path, nbytes: int) -> None:
    """A smooth time series with noise, which compresses about as well as a BOLD run does."""
    import nibabel as nib

    shape = (96, 96, 60)
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[:96, :96, :60]
    head = 800 * ((x - 48) ** 2 + (y - 48) ** 2 + (z - 30) ** 2 < 44**2)
    image = nib.Nifti1Image(
        np.zeros((*shape, nbytes // 2 // int(np.prod(shape))), np.int16), np.diag([2.0, 2.0, 2.0, 1.0])
    )
    for t in range(image.shape[3]):
        image.dataobj[..., t] = head + (head > 0) * rng.normal(0, 12, shape)
    path.write_bytes(gzip.compress(image.to_bytes(), 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=300, help="size of the inflated image")
    nbytes = parser.parse_args().mb * 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "image.nii.gz")
        # in a process of its own: children start with the peak memory of this one
        maker = multiprocessing.get_context("spawn").Process(target=make_file, args=(path, nbytes))
        maker.start()
        maker.join()
        stored = path.stat().st_size
        print(f"inflated {nbytes / 1e6:.0f} MB, stored {stored / 1e6:.0f} MB\n")
        print("| read | stock | here | times faster | memory, stock | memory, here |\n|---|---|---|---|---|---|")
        for read in READS:
            (slow, stock_memory, stock_size), (fast, memory, size) = run(path, read, False), run(path, read, True)
            print(
                f"| {read} | {slow * 1e3:,.1f} ms | {fast * 1e3:,.1f} ms | {slow / fast:,.1f} "
                f"| {stock_memory / 1e6:,.0f} MB | {memory / 1e6:,.0f} MB |",
                flush=True,
            )
            if size is not None:
                print(f"\npickled size / stored size: stock {stock_size / stored:.2f}, here {size / stored:.2f}")


if __name__ == "__main__":
    main()
