"""Throughput of a push to the test server: one worker, two workers, two Dask workers, and what else there is to wait for.

    python tests/benchmarks/push.py [--rows 60] [--mb 20]

Needs rows x mb of disk three times over. The server runs on the same machine, so it takes its part of the processors: the
line "server alone" is how fast it takes uploads from a client that does nothing but send. So the same is measured with
connections that upload at 50 MB/s at most, as over a network.
"""

import argparse
import hashlib
import http.client
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.hub_server import Client, HubServer  # noqa: E402
from tests.test_upload import make_big_tree  # noqa: E402


SCRIPT = """
import hub_scripts
from datasets_bids import upload
ds = hub_scripts.dataset({tree!r})
{before}
upload.push_dataset_to_hub(ds, {repo_id!r}, max_shard_size="40MB", {options})
{after}
"""

CLUSTER = (
    "from distributed import LocalCluster\n"
    "cluster = LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None)\n"
    "context = upload.dask_executor(cluster.scheduler_address); executor = context.__enter__()\n"
    "list(executor.map(len, ['']*8))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--mb", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    total = args.rows * args.mb
    folder = Path(tempfile.mkdtemp())
    try:
        tree = make_big_tree(folder / "tree", args.rows, args.mb * 10**6)
        with (
            HubServer(folder / "server") as hub,
            Client(hub.env(), folder / "client", imports="hub_scripts, huggingface_hub") as client,
        ):
            ways = {
                "one worker": ("", "num_proc=1", ""),
                "two workers": ("", "num_proc=2", ""),
                "two Dask workers": (
                    CLUSTER,
                    "executor=executor",
                    "context.__exit__(None, None, None); cluster.close()",
                ),
            }
            best = {}
            for network, rate in (("loopback", None), ("50 MB/s a connection", 50e6)):
                hub.settings(upload_rate=rate)
                for round in range(args.rounds):
                    for name, (before, options, after) in ways.items():
                        repo_id = f"alice/{name.replace(' ', '-')}-{round}-{rate or 0:.0f}"
                        hub.clear_log()
                        client.run(
                            SCRIPT.format(tree=str(tree), repo_id=repo_id, before=before, options=options, after=after)
                        )
                        key = f"{name}, {network}"
                        # From the first shard's arrival to the last's: what starting the workers takes is left out.
                        sizes = [entry["bytes"] for entry in hub.log("lfs_upload")]
                        done = [entry["time"] for entry in hub.log("lfs_verify")]
                        seen = (sum(sizes) - sizes[0]) / 1e6 / (max(done) - min(done))
                        best[key] = max(best.get(key, 0), seen)
                        shutil.rmtree(hub.root / "datasets" / repo_id / "lfs")
            hub.settings(upload_rate=None)
            best["server alone"] = alone(hub, client, args.mb * 10**6, args.rows)
        start = time.monotonic()
        for path in tree.glob("*/*"):
            hashlib.sha256(path.read_bytes())
        best["read + SHA-256 alone"] = total / (time.monotonic() - start)
        for name, rate in best.items():
            one = best.get(f"one worker, {name.partition(', ')[2]}", best["one worker, loopback"])
            print(f"{name:40} {rate:7.0f} MB/s   {rate / one:.2f} of one worker")
    finally:
        shutil.rmtree(folder)


def alone(hub: HubServer, client: Client, nbytes: int, count: int) -> float:
    """MB/s of plain PUTs of one body over one connection."""
    client.run("import huggingface_hub as h; h.create_repo('alice/alone', repo_type='dataset')")
    body = np.random.default_rng(0).bytes(nbytes)
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    oid = hashlib.sha256(body).hexdigest()
    start = time.monotonic()
    for _ in range(count):
        connection.request("PUT", f"/_lfs/datasets/alice/alone/{oid}", body)
        connection.getresponse().read()
    return count * nbytes / 1e6 / (time.monotonic() - start)


if __name__ == "__main__":
    main()
