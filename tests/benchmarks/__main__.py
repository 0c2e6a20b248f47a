"""How fast shards are written, and in how much memory: `python -m tests.benchmarks [DIRECTORY]`.

Prints one table. Every line is measured in processes of their own, in one run, with the same files:

- `read+write`: the files copied into one file through a buffer of 1 MB. What the disk gives.
- `stock`: the shard step of `Dataset.push_to_hub` of the installed `datasets`, without this package.
- `per shard`: one `embed_table_storage` and one `to_parquet` a row, rows taken from a data frame (a common workaround).
- `write_shard`: this package.

Throughput and CPU time are the best of `--repeat` runs, peak RSS the largest. All are given as speed against the other way (2 is
twice as fast); where other programs use the disk, the ratio of CPU times tells more than that of times. `first row` is the time until the first row of what was written
is there again through `load_dataset(..., streaming=True)`. It takes about 10 minutes and 20 GB of disk, which are given back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROWS = 10, 50, 200
ROW_NBYTES = 42_000_000
LARGE_ROWS = 3  # with four, stock fails: more than 2 GiB in a batch
LARGE_NBYTES = 700_000_000
STOCK_LIMIT = 3_000_000_000  # bytes of files; stock needs three times as much memory


def dataset_of(paths):
    import pyarrow as pa
    from datasets import Dataset, Features, Nifti, Value

    features = Features({"id": Value("string"), "image": Nifti(decode=False)})
    rows = {"id": [str(i) for i in range(len(paths))], "image": [{"path": p, "bytes": None} for p in paths]}
    return Dataset(pa.table(rows, schema=features.arrow_schema))


def read_and_write(paths, out):
    buffer = memoryview(bytearray(1 << 20))
    with open(out / "copy", "wb", buffering=0) as target:
        for path in paths:
            with open(path, "rb", buffering=0) as source:
                while n := source.readinto(buffer):
                    target.write(buffer[:n])


def stock(paths, out):
    from datasets import config
    from datasets.arrow_writer import get_writer_batch_size_from_data_size
    from datasets.table import embed_table_storage
    from datasets.utils.py_utils import convert_file_size_to_int

    dataset = dataset_of(paths)
    nbytes = dataset._estimate_nbytes()
    batch_size = get_writer_batch_size_from_data_size(len(dataset), nbytes)
    num_shards = int(nbytes / convert_file_size_to_int(config.MAX_SHARD_SIZE)) + 1
    for i in range(num_shards):
        shard = dataset.shard(num_shards, i, contiguous=True).with_format("arrow")
        shard = shard.map(embed_table_storage, batched=True, batch_size=batch_size, keep_in_memory=True)
        shard.with_format(None).to_parquet(out / f"{i:05d}.parquet", batch_size=batch_size)


def per_shard(paths, out):
    from datasets import Dataset
    from datasets.table import embed_table_storage

    dataset = dataset_of(paths)
    frame = dataset.to_pandas()
    for i in range(len(frame)):
        shard = Dataset.from_dict(frame.iloc[i : i + 1].to_dict(orient="list"), features=dataset.features)
        Dataset(embed_table_storage(shard.data.table)).to_parquet(out / f"{i:05d}.parquet")


def write_shard(paths, out):
    from datasets_bids import embed, shards

    dataset = dataset_of(paths)
    for shard in shards.plan_shards(shards.embedded_nbytes(dataset)):
        embed.write_shard(dataset, shard, str(out / f"{shard.index:05d}.parquet"))


WAYS = {"read+write": read_and_write, "stock": stock, "per shard": per_shard, "write_shard": write_shard}


def first_row(out):
    from datasets import load_dataset

    files = sorted(map(str, out.glob("*.parquet")))
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    start = time.perf_counter()
    row = next(iter(dataset))
    assert row["image"]["bytes"]
    return time.perf_counter() - start


def peak_rss():
    """Bytes; of this process alone (`ru_maxrss` would be inherited from the parent)."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def child(way, paths, out):
    import datasets

    datasets.disable_progress_bars()
    if way == "first row":
        result = {"seconds": first_row(out)}
    else:
        if way == "write_shard":
            import datasets_bids  # noqa: F401
        start, cpu = time.perf_counter(), time.process_time()
        WAYS[way](paths, out)
        result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps(result | {"rss": peak_rss()}))
    sys.stdout.flush()
    os._exit(0)  # a stream that is left early can abort the interpreter at its end


def run(way, paths, out, cache):
    os.sync()
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    args = [sys.executable, "-m", "tests.benchmarks", "--child", way, str(out)]
    process = subprocess.run(args, input="\n".join(paths), stdout=subprocess.PIPE, env=env, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def measure(title, paths, directory, repeat):
    nbytes = sum(os.path.getsize(p) for p in paths)
    largest = max(os.path.getsize(p) for p in paths)
    best = {}
    for _ in range(repeat):
        for way in WAYS:
            if way == "stock" and nbytes > STOCK_LIMIT:
                continue
            out = directory / "out"
            out.mkdir()
            result = run(way, paths, out, directory / "cache")
            if way != "read+write":
                result["first"] = run("first row", [], out, directory / "cache")["seconds"]
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
            before = best.get(way)
            if before is not None:
                result["seconds"] = min(result["seconds"], before["seconds"])
                result["cpu"] = min(result["cpu"], before["cpu"])
                result["rss"] = max(result["rss"], before["rss"])
                result["first"] = min(result.get("first", 0), before.get("first", 0))
            best[way] = result
    bound = 2.5 * largest + 250e6
    for way, result in best.items():
        speed = nbytes / result["seconds"]
        cells = [title, way, f"{speed / 1e6:.0f}", f"{best['read+write']['seconds'] / result['seconds']:.2f}"]
        cells.append(f"{best['stock']['seconds'] / result['seconds']:.1f}" if "stock" in best else "")
        cells.append(f"{best['read+write']['cpu'] / result['cpu']:.2f}")
        cells += [f"{result['rss'] / 1e6:.0f}", f"{result['rss'] / bound:.2f}"]
        cells.append(f"{result['first']:.3f}" if result.get("first") else "")
        print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="where to put the files (the system's temporary directory)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--large-rows", type=int, default=LARGE_ROWS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, sys.stdin.read().split("\n"), Path(args.directory))
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        directory = Path(directory)

        def make(count, nbytes, name):
            paths = []
            for i in range(count):
                paths.append(str(directory / f"{name}-{i:03d}.nii.gz"))
                Path(paths[-1]).write_bytes(b"\x1f\x8b" + os.urandom(nbytes - 2))
            return paths

        print(
            "| rows | way | MB/s | ÷ read+write | ÷ stock | CPU ÷ read+write | peak RSS (MB) | ÷ (2.5 rows + 250 MB) | first row (s) |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        paths = make(max(args.rows), ROW_NBYTES, "row")
        for rows in args.rows:
            measure(f"{rows} x {ROW_NBYTES // 10**6} MB", paths[:rows], directory, args.repeat)
        for path in paths:
            os.unlink(path)
        if args.large_rows:
            paths = make(args.large_rows, LARGE_NBYTES, "large")
            measure(f"{args.large_rows} x {LARGE_NBYTES // 10**6} MB", paths, directory, args.repeat)


if __name__ == "__main__":
    main()
