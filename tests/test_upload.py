"""Pushes to the test server, through the real clients; what stands there afterwards is read by stock `datasets`.

The numbers that the project promises (50 killed pushes, 200 schedules of faults, memory, throughput) are behind `-m deep`.
"""

import hashlib
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .hub_server import Client, Fault, HubServer


ROWS = 12
SHARDS = [f"data/train-{i:05d}-of-00008.parquet" for i in range(8)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub.env(), tmp_path_factory.mktemp("client"), imports="hub_scripts, huggingface_hub") as client:
        yield client


@pytest.fixture(scope="module")
def stock(hub, tmp_path_factory):
    """A reader that never imported `datasets_bids`."""
    folder = tmp_path_factory.mktemp("stock")
    code = "datasets, huggingface_hub, hashlib"
    with Client(hub.env(home=folder / "home"), folder, imports=code) as client:
        yield client


@pytest.fixture(autouse=True)
def calm(hub):
    yield
    hub.set_faults()
    hub.settings(quota=None)
    hub.clear_log()


def make_tree(folder: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """sub-NN/t1w.nii and up to two bold-N.nii, every file another; sub-03 has no t1w, sub-04 no bold."""
    rng = np.random.default_rng(seed)
    for row in range(rows):
        (folder / f"sub-{row:02d}").mkdir(parents=True)
        names = ["t1w"] * (row != 3) + [f"bold-{i}" for i in range((row + 2) % 3)] * (row != 4)
        for name in names:
            voxels = rng.integers(0, 9999, (16, 16, 8 + row)).astype("int16")
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"sub-{row:02d}" / f"{name}.nii")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def truth(tree: Path) -> dict[str, list[str | None]]:
    return {
        folder.name: [
            sha256(folder / "t1w.nii") if (folder / "t1w.nii").exists() else None,
            *(sha256(path) for path in sorted(folder.glob("bold-*.nii"))),
        ]
        for folder in sorted(tree.iterdir())
    }


READ = """
ds = datasets.load_dataset({!r}, {!r}, split="train", streaming=True, revision={!r})
ds = ds.cast_column("t1w", datasets.Nifti(decode=False)).cast_column("bold", datasets.List(datasets.Nifti(decode=False)))
result = {{
    row["subject_id"]: [file and hashlib.sha256(file["bytes"]).hexdigest() for file in [row["t1w"], *row["bold"]]]
    for row in ds
}}
import sys
assert "datasets_bids" not in sys.modules
"""


def read(stock: Client, repo_id: str, config: str | None = None, revision: str | None = None):
    return stock.run("import datasets, hashlib\n" + READ.format(repo_id, config, revision))


def script(tree: Path, repo_id: str, **options) -> str:
    return f"import hub_scripts\nresult = hub_scripts.push({str(tree)!r}, {repo_id!r}, **{options!r})"


def command(client: Client, repo_id: str, tree: Path, *options: str, check: bool = False):
    """`python -m datasets_bids.push` on a tree of sub-NN directories: (exit status, what it printed)."""
    schema = client.folder / "schema.yaml"
    schema.write_text(
        "schema:\n  t1w: {path: '{subject}/t1w.nii', optional: true}\n"
        "  bold: {path: '{subject}/bold-*.nii', many: true, optional: true}\n"
    )
    args = [
        "bids",
        "--data-dir",
        str(tree),
        "--schema",
        str(schema),
        "--repo-id",
        repo_id,
        "--affirm-defaced",
        *options,
    ]
    code = "from datasets_bids import push, upload; upload.FIRST_WAIT = 0.05; upload.PATIENCE = 5.0\n"
    run = client.start(code + f"import sys; sys.exit(push.main({args!r}))")
    status = run.wait()
    if check:
        assert status == 0, run.text
    return status, run.text


def uploads(hub: HubServer) -> dict[str, int]:
    """SHA-256 -> how often it was uploaded and answered with success."""
    counts: dict[str, int] = {}
    for entry in hub.log("lfs_upload"):
        if entry.get("status") == 200 and entry.get("fault") != "lost":
            counts[entry["oid"]] = counts.get(entry["oid"], 0) + 1
    return counts


def assert_atomic(hub: HubServer, repo_id: str, *states: dict[str, str]) -> None:
    """Every commit that `main` ever pointed to holds one of the whole states."""
    folder = hub.root / "datasets" / repo_id
    oid = hub.refs(repo_id)["refs/heads/main"]
    wholes = [{path: sha for path, sha in state.items() if path.startswith("data/")} for state in states]
    while oid:
        record = json.loads((folder / "commits" / oid).read_text())
        tree = {path: entry.get("lfs", entry)["oid"] for path, entry in record["tree"].items()}
        assert {path: sha for path, sha in tree.items() if path.startswith("data/")} in [{}, *wholes]
        oid = record["parents"][0] if record["parents"] else None


# -- one push ------------------------------------------------------------------------------------------------------------


def test_stock_datasets_reads_every_byte(hub, client, stock, tree):
    oid = client.run(script(tree, "alice/plain"))
    assert read(stock, "alice/plain") == truth(tree)
    assert sorted(hub.tree("alice/plain")) == [".gitattributes", "README.md", *SHARDS]
    assert hub.refs("alice/plain") == {"refs/heads/main": oid}
    commits = [entry["path"].rpartition("/")[2] for entry in hub.log("commit")]
    assert commits.count("main") == 1 and len(commits) <= 5
    assert set(uploads(hub).values()) == {1}


def test_again_uploads_nothing_and_commits_nothing(hub, client, tree):
    first = client.run(script(tree, "alice/again"))
    hub.clear_log()
    assert client.run(script(tree, "alice/again")) == first
    assert not hub.log("lfs_upload") and not hub.log("commit")


def test_fewer_shards_replace_more_in_one_commit(hub, client, stock, tree, tmp_path):
    client.run(script(tree, "alice/fewer"))
    before = hub.tree("alice/fewer")
    other = make_tree(tmp_path / "other", rows=7, seed=1)
    client.run(script(other, "alice/fewer", num_shards=3))
    after = hub.tree("alice/fewer")
    assert len([path for path in after if path.startswith("data/")]) == 3
    assert read(stock, "alice/fewer") == truth(other)
    assert_atomic(hub, "alice/fewer", before, after)


def test_other_configs_and_splits_are_left_alone(hub, client, stock, tree, tmp_path):
    other = make_tree(tmp_path / "other", rows=4, seed=2)
    client.run(script(tree, "alice/many", num_shards=2))
    client.run(script(other, "alice/many", num_shards=2, config_name="small"))
    client.run(script(other, "alice/many", num_shards=1, split="test"))
    client.run(script(tree, "alice/many", num_shards=3))
    assert read(stock, "alice/many", "default") == truth(tree)
    assert read(stock, "alice/many", "small") == truth(other)
    splits = stock.run(
        "import datasets\nresult = {s: i.num_examples for s, i in datasets.load_dataset_builder('alice/many', 'default').info.splits.items()}"
    )
    assert splits == {"train": ROWS, "test": 4}
    data = sorted(path for path in hub.tree("alice/many") if path.endswith(".parquet"))
    assert data == [
        "data/test-00000-of-00001.parquet",
        *(f"data/train-{i:05d}-of-00003.parquet" for i in range(3)),
        *(f"small/train-{i:05d}-of-00002.parquet" for i in range(2)),
    ]


def test_a_card_edited_by_hand_keeps_its_prose(hub, client, stock, tree):
    client.run(script(tree, "alice/card", num_shards=2))
    client.run(
        """
from huggingface_hub import DatasetCard, HfApi
card = DatasetCard.load("alice/card")
card.text = "\\n# By hand\\n\\nPlease cite us."
card.data["license"] = "cc0-1.0"
HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="alice/card", repo_type="dataset")
"""
    )
    client.run(script(tree, "alice/card", num_shards=4))
    text = hub.read("alice/card", "README.md").decode()
    assert "Please cite us." in text and "license: cc0-1.0" in text
    assert read(stock, "alice/card") == truth(tree)


def test_branch_and_pull_request(hub, client, stock, tree):
    client.run(script(tree, "alice/refs", num_shards=2))
    main = hub.tree("alice/refs")
    client.run(script(tree, "alice/refs", num_shards=3, revision="v2"))
    oid = client.run(script(tree, "alice/refs", num_shards=4, create_pr=True))
    assert hub.tree("alice/refs") == main
    assert sorted(hub.refs("alice/refs")) == ["refs/heads/main", "refs/heads/v2", "refs/pr/1"]
    assert hub.refs("alice/refs")["refs/pr/1"] == oid
    for revision in ("v2", "refs/pr/1"):
        assert read(stock, "alice/refs", revision=revision) == truth(tree)
    assert client.run(script(tree, "alice/refs", num_shards=4, create_pr=True)) == oid
    client.run("import huggingface_hub as h; h.HfApi().merge_pull_request('alice/refs', 1, repo_type='dataset')")
    assert len([path for path in hub.tree("alice/refs") if path.startswith("data/")]) == 4


def test_many_workers_make_the_same_repository(hub, client, tree):
    client.run(script(tree, "alice/one"))
    client.run(script(tree, "org/one", num_proc=4))
    assert hub.tree("alice/one") == hub.tree("org/one")


def test_dask_makes_the_same_repository(hub, client, tree):
    pytest.importorskip("distributed")
    client.run(script(tree, "alice/cluster"))
    client.run(
        f"""
if __name__ == "__script__":
    import hub_scripts
    from datasets_bids.upload import dask_executor
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with dask_executor(cluster.scheduler_address) as executor:
            hub_scripts.push({str(tree)!r}, "org/cluster", executor=executor)
"""
    )
    assert hub.tree("alice/cluster") == hub.tree("org/cluster")


def test_a_killed_dask_worker_is_no_loss(hub, client, stock, tree):
    pytest.importorskip("distributed")
    hub.set_faults(Fault("lfs_upload", kind="slow", seconds=0.7, count=8))
    client.run(
        f"""
if __name__ == "__script__":
    import hub_scripts, os, signal, threading, time
    from datasets_bids.upload import dask_executor, push_dataset_to_hub
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pid = cluster.workers[0].pid
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        with dask_executor(cluster.scheduler_address) as executor:
            push_dataset_to_hub(hub_scripts.dataset({str(tree)!r}), "alice/dask-killed", num_shards=8, executor=executor)
        assert pid != cluster.workers[0].pid
"""
    )
    assert read(stock, "alice/dask-killed") == truth(tree)


def test_there_is_no_cluster(client, tree):
    pytest.importorskip("distributed")
    status, text = command(client, "alice/nowhere", tree, "--dask", "tcp://127.0.0.1:9")
    assert status == 1 and "no Dask scheduler at tcp://127.0.0.1:9" in text.splitlines()[-1]


def test_a_killed_worker_is_replaced(hub, client, stock, tree):
    hub.set_faults(Fault("lfs_upload", kind="slow", seconds=1, count=2))
    run = client.start(script(tree, "alice/killed-worker", num_proc=2))
    wait_for(hub, "lfs_upload", run)
    import psutil

    children = psutil.Process(run.pid).children()
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    run.result()
    assert read(stock, "alice/killed-worker") == truth(tree)


def test_workers_die_with_the_push(hub, client, tree):
    import psutil

    hub.set_faults(Fault("lfs_upload", kind="slow", seconds=1, count=99))
    run = client.start(script(tree, "alice/orphans", num_proc=2))
    wait_for(hub, "lfs_upload", run)
    children = psutil.Process(run.pid).children(recursive=True)
    psutil.Process(run.pid).kill()
    assert run.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive
    hub.set_faults()
    client.run(script(tree, "alice/orphans"))


def test_an_embedded_shard_leaves_no_memory_behind(tree, tmp_path):
    """Without waiting for the garbage collector: a push embeds hundreds of shards, and few objects that would call it."""
    import gc
    import weakref

    from datasets_bids import embed, hub
    from tests import hub_scripts

    kept = []

    class Arena(embed.Arena):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(weakref.ref(self))

    plan = hub.plan_push({"train": hub_scripts.dataset(str(tree))}, num_shards=1)
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embed, "Arena", Arena)
            embed.write_shard(plan.splits["train"], plan.shards["train"][0], str(tmp_path / "x.parquet"))
        assert kept and not any(arena() for arena in kept)
    finally:
        gc.enable()


def test_the_method_of_a_bids_dataset(hub, client, stock, tree):
    client.run(
        f"""
from datasets_bids import BidsDataset
schema = {{"t1w": {{"path": "{{subject}}/t1w.nii", "optional": True}}}}
ds = BidsDataset.from_bids({str(tree)!r}, schema)
ds.push_to_hub("alice/method", num_shards=2, private=True)
assert ds.info.splits["train"].num_examples == {ROWS - 1} and ds.info.download_size > ds.info.dataset_size > 0
"""
    )
    assert len([path for path in hub.tree("alice/method") if path.startswith("data/")]) == 2


def test_paths_alone(hub, client, tree, stock):
    client.run(script(tree, "alice/paths", num_shards=2, embed_external_files=False))
    rows = stock.run(
        "import datasets\nds = datasets.load_dataset('alice/paths', split='train', streaming=True)\n"
        "result = [row['t1w'] for row in ds.cast_column('t1w', datasets.Nifti(decode=False))]"
    )
    assert rows[0] == {"bytes": None, "path": str(tree / "sub-00" / "t1w.nii")}


# -- killed --------------------------------------------------------------------------------------------------------------


def wait_for(hub: HubServer, route: str, run, count: int = 1) -> None:
    deadline = time.monotonic() + 60
    while len(hub.log(route)) < count:
        assert time.monotonic() < deadline, f"{route} never came: {run.text}"
        time.sleep(0.005)


def kill_and_resume(hub, client, tree, repo_id, log, moments, **options) -> int:
    """Starts a push and kills it with SIGKILL so many seconds later, for each moment; then lets one end. Kills that hit."""
    hits = 0
    for moment in moments:
        run = client.start(script(tree, repo_id, log=str(log), **options))
        time.sleep(moment)
        run.kill_group(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.text
        hits += status != 0
    client.run(script(tree, repo_id, log=str(log), **options))
    return hits


def assert_resumed_well(hub, log: Path, kills: int, workers: int) -> None:
    embedded = log.read_text().split()
    again = len(embedded) - len(set(embedded))
    assert len(set(embedded)) == 8
    assert again <= kills * workers
    assert set(uploads(hub).values()) == {1}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(hub, client, stock, tree, tmp_path, workers):
    client.run(script(tree, f"alice/whole-{workers}"))
    hub.clear_log()
    rng, repo_id = random.Random(workers), f"org/whole-{workers}"
    processes = None if workers == 1 else workers
    moments = [rng.uniform(0.02, 0.4) + (processes is not None) * 0.8 for _ in range(5)]
    kills = kill_and_resume(hub, client, tree, repo_id, tmp_path / "log", moments, processes=processes)
    assert hub.tree(repo_id) == hub.tree(f"alice/whole-{workers}")
    assert_resumed_well(hub, tmp_path / "log", kills, workers)
    assert_atomic(hub, repo_id, hub.tree(repo_id))
    assert hub.refs(repo_id).keys() == {"refs/heads/main"}
    assert read(stock, repo_id) == truth(tree)


PLACES = [
    ("create_repo", 0, "slow"),
    pytest.param("create_repo", 0, "lost", marks=pytest.mark.deep),
    pytest.param("branch", 0, "slow", marks=pytest.mark.deep),
    pytest.param("commit", 0, "slow", marks=pytest.mark.deep),
    ("commit", 0, "lost"),
    ("lfs_upload", 0, "reset_upload"),
    ("lfs_upload", 3, "lost"),
    pytest.param("lfs_verify", 5, "slow", marks=pytest.mark.deep),
    ("commit", 1, "lost"),
    pytest.param("commit", 3, "slow", marks=pytest.mark.deep),
    ("commit", 4, "slow"),
    ("commit", 4, "lost"),
    pytest.param("tree", 3, "slow", marks=pytest.mark.deep),
    pytest.param("resolve", 3, "slow", marks=pytest.mark.deep),
    ("branch", 1, "lost"),
]


@pytest.mark.parametrize(("route", "skip", "kind"), PLACES)
def test_killed_while_the_hub_is_at_it(hub, client, tree, tmp_path, route, skip, kind):
    """The request is held (or done, and its answer lost), and the push killed before it can go on."""
    repo_id = f"alice/at-{route.replace('_', '-')}-{skip}-{kind.replace('_', '-')}"
    hub.set_faults(
        Fault(route, kind=kind, skip=skip, seconds=0.3), Fault(route, kind="slow", count=99, skip=skip, seconds=0.3)
    )
    run = client.start(script(tree, repo_id, log=str(tmp_path / "log")))
    deadline = time.monotonic() + 60
    while not any(entry.get("fault") for entry in hub.log(route)):
        assert time.monotonic() < deadline, run.text
        time.sleep(0.005)
    run.kill_group(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    time.sleep(0.4)  # what the server was at is done, as it would be on the Hub
    hub.set_faults()
    client.run(script(tree, repo_id, log=str(tmp_path / "log")))
    assert sorted(hub.tree(repo_id)) == [".gitattributes", "README.md", *SHARDS]
    assert_resumed_well(hub, tmp_path / "log", 1, 1)
    assert_atomic(hub, repo_id, hub.tree(repo_id))
    assert hub.refs(repo_id).keys() == {"refs/heads/main"}


def interrupted(hub, client, tree, repo_id, after: int = 4, **options) -> None:
    """A push killed when `after` shards were uploaded."""
    hub.clear_log()
    hub.set_faults(Fault("lfs_upload", kind="slow", skip=after, count=99, seconds=0.5))
    run = client.start(script(tree, repo_id, **options))
    wait_for(hub, "lfs_upload", run, after + 1)
    run.kill_group(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    time.sleep(0.6)
    hub.set_faults()


def test_goes_on_from_another_machine(hub, client, tree, stock, tmp_path):
    """Without the working directory, what the working branch holds is neither embedded nor uploaded again."""
    interrupted(hub, client, tree, "alice/elsewhere", after=6)
    for folder in Path(hub.env()["HF_HOME"], "datasets-bids").glob("alice--elsewhere-*"):
        shutil.rmtree(folder)
    client.run(script(tree, "alice/elsewhere", log=str(tmp_path / "log")))
    assert len((tmp_path / "log").read_text().split()) <= 5
    assert set(uploads(hub).values()) == {1}
    assert read(stock, "alice/elsewhere") == truth(tree)


def test_changed_sources_are_noticed(hub, client, stock, tmp_path):
    tree = make_tree(tmp_path / "tree")
    interrupted(hub, client, tree, "alice/changed", after=6)
    changed = tree / "sub-01" / "t1w.nii"
    nib.save(nib.Nifti1Image(np.ones((30, 30, 30), "int16"), np.eye(4)), changed)
    client.run(script(tree, "alice/changed", log=str(tmp_path / "log")))
    again = (tmp_path / "log").read_text().split()
    assert "sub-00" in again or "sub-01" in again
    assert len(again) <= 4
    assert read(stock, "alice/changed") == truth(tree)
    assert len(hub.tree("alice/changed")) == 10


def test_another_plan_is_said_and_not_mixed(hub, client, stock, tree):
    interrupted(hub, client, tree, "alice/plans")
    run = client.start(script(tree, "alice/plans", num_shards=5))
    assert run.wait() == 1
    assert "num_shards was 8, now 5" in run.text and "--abort" in run.text
    client.run(script(tree, "alice/plans", num_shards=5, config_name="other"))
    client.run(script(tree, "alice/plans"))
    assert read(stock, "alice/plans", "default") == read(stock, "alice/plans", "other") == truth(tree)


def test_uploads_that_the_hub_dropped_are_made_again(hub, client, stock, tree):
    interrupted(hub, client, tree, "alice/dropped", after=2)
    for path in (hub.root / "datasets" / "alice" / "dropped" / "lfs").iterdir():
        path.unlink()
    client.run(script(tree, "alice/dropped"))
    assert read(stock, "alice/dropped") == truth(tree)


def test_interrupted_from_the_keyboard(hub, client, tree):
    hub.set_faults(Fault("lfs_upload", kind="slow", skip=3, count=99, seconds=3))
    code = "from datasets_bids import push\nimport os, sys\n"
    schema = client.folder / "t1w.yaml"
    schema.write_text("schema:\n  t1w: {path: '{subject}/t1w.nii', optional: true}\n")
    args = ["bids", "--data-dir", str(tree), "--schema", str(schema), "--repo-id", "alice/ctrl-c", "--num-shards", "8"]
    args.append("--affirm-defaced")
    run = client.start(code + f"status = push.main({args!r}); sys.stderr.flush(); os._exit(status)")
    wait_for(hub, "lfs_upload", run, 4)
    start = time.monotonic()
    run.kill_group(signal.SIGINT)
    assert run.wait() == 130 and "goes on where it stopped" in run.text and "Traceback" not in run.text
    assert time.monotonic() - start < 2.5
    hub.set_faults()
    client.run(code + f"assert push.main({args!r}) == 0")


def test_two_pushes_at_once(hub, client, tree):
    with Client(hub.env(), client.folder / "second", imports="hub_scripts") as other:
        other.run("")  # has imported all it needs
        hub.set_faults(Fault("lfs_upload", kind="slow", seconds=1, count=2))
        first = client.start(script(tree, "alice/twice"))
        wait_for(hub, "lfs_upload", first)
        run = other.start(script(tree, "alice/twice"))
        assert run.wait() == 1 and "is running already" in run.text
        first.result()


# -- faults --------------------------------------------------------------------------------------------------------------


FAULTS = [
    Fault("commit", status=429, retry_after=1),
    Fault("commit", kind="lost", skip=4),
    Fault("commit", status=412, skip=4),
    Fault("commit", status=409, skip=1, count=2),
    Fault("lfs_upload", kind="reset_upload", skip=2),
    Fault("lfs_verify", kind="lost", skip=2),
    Fault("repo_info", kind="reset", count=2),
    Fault("create_repo", kind="lost"),
    Fault("cdn", kind="truncate", count=2),
    Fault("validate_yaml", kind="truncate"),
    pytest.param(Fault("commit", status=429, count=2), marks=pytest.mark.deep),
    pytest.param(Fault("commit", status=500, skip=3), marks=pytest.mark.deep),
    pytest.param(Fault("commit", kind="truncate", skip=4), marks=pytest.mark.deep),
    pytest.param(Fault("whoami", status=504), marks=pytest.mark.deep),
    pytest.param(Fault("tree", kind="truncate", count=1), marks=pytest.mark.deep),
    pytest.param(Fault("resolve", status=502, count=2), marks=pytest.mark.deep),
    pytest.param(Fault("preupload", kind="slow", seconds=2, count=2), marks=pytest.mark.deep),
    pytest.param(Fault("refs", status=500), marks=pytest.mark.deep),
    pytest.param(Fault("lfs_upload", status=503, skip=2), marks=pytest.mark.deep),
    pytest.param(Fault("branch", kind="lost", count=2), marks=pytest.mark.deep),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.route}-{fault.kind}-{fault.status}-{fault.skip}")
def test_faults_are_outlived(hub, client, tree, fault):
    repo_id = (
        f"alice/outlived-{fault.route.replace('_', '-')}-{fault.kind[:5]}-{fault.status}-{fault.skip}-{fault.count}"
    )
    hub.set_faults(fault)
    client.run(script(tree, repo_id))
    assert hub.pending_faults() == 0
    assert sorted(hub.tree(repo_id)) == [".gitattributes", "README.md", *SHARDS]
    assert_atomic(hub, repo_id, hub.tree(repo_id))
    assert set(uploads(hub).values()) == {1}
    assert hub.refs(repo_id).keys() == {"refs/heads/main"}


def test_a_connection_that_went_dead_is_given_up(hub, client, tree):
    hub.set_faults(
        *(Fault(route, kind="slow", seconds=30) for route in ("whoami", "lfs_upload", "commit", "paths_info"))
    )
    start = time.monotonic()
    client.run(script(tree, "alice/dead", timeout=0.5))
    assert time.monotonic() - start < 20
    assert sorted(hub.tree("alice/dead")) == [".gitattributes", "README.md", *SHARDS]


def test_a_full_disk_is_said_first(hub, client, tree):
    run = client.start(
        "from datasets_bids import upload\nfrom types import SimpleNamespace\n"
        "upload.shutil.disk_usage = lambda path: SimpleNamespace(free=1000)\n" + script(tree, "alice/full")
    )
    assert run.wait() == 1 and "1.0 kB are free" in run.text
    assert not hub.log("preupload")


def test_a_lost_answer_opens_no_second_pull_request(hub, client, tree):
    hub.set_faults(Fault("commit", kind="lost", skip=4))
    client.run(script(tree, "alice/one-pull", create_pr=True))
    assert hub.pending_faults() == 0
    assert sorted(hub.refs("alice/one-pull")) == ["refs/heads/main", "refs/pr/1"]


def test_somebody_else_commits_meanwhile(hub, client, stock, tree):
    """Their file stays, and the commit starts over from their state."""
    client.run(script(tree, "alice/raced", num_shards=2))
    hub.clear_log()
    hub.set_faults(Fault("validate_yaml", kind="slow", seconds=1))  # just before the commit on main
    run = client.start(script(tree, "alice/raced", num_shards=3))
    wait_for(hub, "validate_yaml", run)
    stock.run(
        "import huggingface_hub as h\nh.HfApi().upload_file(path_or_fileobj=b'theirs', path_in_repo='theirs.txt', "
        "repo_id='alice/raced', repo_type='dataset')"
    )
    run.result()
    assert 412 in [entry.get("status") for entry in hub.log("commit")]
    assert hub.read("alice/raced", "theirs.txt") == b"theirs"
    assert len([path for path in hub.tree("alice/raced") if path.startswith("data/")]) == 3


FINAL = [
    (Fault("lfs_upload", status=403, message="no more room", count=99), "403 no more room"),
    (Fault("commit", status=413, message="too large", skip=2, count=99), "413 too large"),
    (Fault("commit", status=401, message="token expired", skip=1, count=99), "401 token expired"),
    (Fault("repo_info", status=404, message="not here", count=99), "404 not here"),
    (Fault("commit", status=503, message="down", skip=2, count=999), "gave up after"),
]


@pytest.mark.parametrize(("fault", "words"), FINAL, ids=[words.replace(" ", "-") for _, words in FINAL])
def test_what_no_retry_mends_ends_in_one_line(hub, client, stock, tree, tmp_path, fault, words):
    repo_id = f"alice/final-{fault.route.replace('_', '-')}-{fault.status}"
    client.run(script(tree, repo_id, num_shards=2))
    before = hub.tree(repo_id)
    hub.set_faults(fault)
    start = time.monotonic()
    status, text = command(client, repo_id, make_tree(tmp_path / "new", rows=9, seed=5), "--num-shards", "9")
    hub.set_faults()
    assert status == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in line and text.splitlines()[-1] == line and "Traceback" not in text
    assert hub.tree(repo_id) == before
    assert read(stock, repo_id) == truth(tree)
    assert "hf_alice" not in text
    if fault.status != 503:
        assert time.monotonic() - start < 30


def test_quota(hub, client, tree):
    hub.settings(quota=10)
    status, text = command(client, "alice/quota-push", tree)
    assert status == 1 and "storage limit reached" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, "alice/x", "no Hub token"),
        ("hf_wrong", "alice/x", "401"),
        ("hf_alice_read", "alice/x", "may only read"),
        ("hf_bob_write", "org/x", "no write access to org"),
        ("hf_rita_write", "org/x", "no write access to org"),
        ("hf_bob_write", "alice/theirs", "403"),
    ],
)
def test_access_is_checked_before_a_byte_moves(hub, client, tree, tmp_path, token, repo_id, words):
    client.run("import huggingface_hub as h; h.create_repo('alice/theirs', repo_type='dataset', exist_ok=True)")
    hub.clear_log()
    env = hub.env(token, home=tmp_path)
    if token is None:
        env["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "0"
    with Client(env, tmp_path / "client", imports="hub_scripts") as other:
        status, text = command(other, repo_id, tree)
        assert status == 1 and words in text.splitlines()[-1], text
        if token:
            assert token not in text
        assert command(other, repo_id, tree, "--dry-run")[0] == 0
    assert {entry["route"] for entry in hub.log()} <= {"whoami", "repo_info", "auth_check"}


# -- private, verified, aborted ------------------------------------------------------------------------------------------


def test_what_must_be_private_is(hub, client, tree):
    reason = {"private_because": "its data use agreement forbids to redistribute it"}
    for repo_id, options in (("alice/atlas", {}), ("alice/open", {"private": True})):
        if repo_id == "alice/open":
            client.run(script(tree, repo_id))
        run = client.start(script(tree, repo_id, **options, **reason))
        assert run.wait() == 1 and reason["private_because"] in run.text
    assert not hub.exists("alice/atlas")
    client.run(script(tree, "alice/atlas", private=True, **reason))
    client.run(script(tree, "alice/atlas", **reason))
    state = json.loads((hub.root / "datasets" / "alice" / "atlas" / "repo.json").read_text())
    assert state["private"] is True


def test_a_builder_says_what_must_be_private(hub, client, tree, tmp_path):
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "atlas.py").write_text(
        "from datasets_bids import BidsBuilder, BidsConfig\n\n\n"
        "class Atlas(BidsBuilder):\n"
        '    PRIVATE_BECAUSE = "its data use agreement forbids to redistribute it"\n'
        '    BUILDER_CONFIGS = [BidsConfig(schema={"t1w": {"path": "{subject}/t1w.nii", "optional": True}})]\n'
    )
    args = [str(tmp_path / "atlas"), "--data-dir", str(tree), "--repo-id", "alice/by-builder"]
    code = "from datasets_bids import push\nresult = push.main({!r})"
    run = client.start(code.format(args))
    assert run.result() == 1 and "alice/by-builder must be private (--private): its data use" in run.text
    assert not hub.exists("alice/by-builder")
    assert client.run(code.format([*args, "--private"])) == 0


def test_the_token_is_nowhere(hub, client, tree, tmp_path):
    home = tmp_path / "home"
    env = hub.env("hf_alice_write", home=home)
    with Client(env, tmp_path / "client", imports="hub_scripts") as other:
        run = other.start(
            "import logging; logging.basicConfig(level=logging.INFO)\n"
            + script(tree, "alice/token", token="hf_alice_write", num_proc=2)
        )
        time.sleep(1.2)
        run.kill_group(signal.SIGKILL)
        run.wait()
        texts = [run.text]
        texts += [path.read_text(errors="replace") for path in home.rglob("*") if path.is_file()]
        assert other.run(script(tree, "alice/token"))
    texts.append(hub.read("alice/token", "README.md").decode())
    assert len(texts) > 2
    assert not [text for text in texts if "hf_alice_write" in text]


def test_verify_only(hub, client, tree):
    command(client, "alice/verified", tree, "--num-shards", "4", check=True)
    status, text = command(client, "alice/verified", tree, "--num-shards", "4", "--verify-only")
    assert status == 0 and "4 shards" in text
    for folder in Path(hub.env()["HF_HOME"], "datasets-bids").glob("alice--verified-*"):
        shutil.rmtree(folder)
    assert command(client, "alice/verified", tree, "--num-shards", "4", "--verify-only")[0] == 0
    status, text = command(client, "alice/verified", tree, "--num-shards", "5", "--verify-only")
    assert status == 1 and "is missing" in text.splitlines()[-1]
    client.run(
        "import huggingface_hub as h\nh.HfApi().upload_file(path_or_fileobj=b'PAR1', repo_id='alice/verified', "
        "path_in_repo='data/train-00001-of-00004.parquet', repo_type='dataset')"
    )
    status, text = command(client, "alice/verified", tree, "--num-shards", "4", "--verify-only")
    assert status == 1 and "data/train-00001-of-00004.parquet is another file" in text.splitlines()[-1]


def abort(client, tree, repo_id, **options) -> list[str]:
    return client.run(
        f"""
import hub_scripts
from datasets_bids import hub, upload
from huggingface_hub import DatasetCard
options = {{"num_shards": 8, **{options!r}}}
plan = hub.plan_push({{"train": hub_scripts.dataset({str(tree)!r})}}, num_shards=options["num_shards"])
result = upload.HubPush(plan, upload.make_target({repo_id!r}), DatasetCard("---\\n{{}}\\n---\\n"), options=options).abort()
"""
    )


def test_abort_of_a_first_push_removes_the_repository(hub, client, tree):
    interrupted(hub, client, tree, "alice/aborted")
    said = abort(client, tree, "alice/aborted")
    assert any("Deleted alice/aborted" in line for line in said)
    assert not hub.exists("alice/aborted")
    client.run(script(tree, "alice/aborted", num_shards=3))


def test_abort_leaves_a_finished_dataset_and_its_uploads(hub, client, stock, tree, tmp_path):
    client.run(script(tree, "alice/kept"))
    before, objects = hub.tree("alice/kept"), set((hub.root / "datasets/alice/kept/lfs").iterdir())
    assert "nothing was done" in abort(client, tree, "alice/kept")[0]
    other = make_tree(tmp_path / "other", seed=7)
    interrupted(hub, client, other, "alice/kept")
    said = abort(client, other, "alice/kept")
    assert any("working branch" in line for line in said) and any("uploads" in line for line in said)
    assert hub.tree("alice/kept") == before and list(hub.refs("alice/kept")) == ["refs/heads/main"]
    assert objects <= set((hub.root / "datasets/alice/kept/lfs").iterdir())
    assert not list(Path(hub.env()["HF_HOME"], "datasets-bids").glob("alice--kept-*"))
    assert read(stock, "alice/kept") == truth(tree)


def test_abort_never_removes_a_repository_with_something_in_it(hub, client, tree):
    interrupted(hub, client, tree, "alice/notes")
    client.run(
        "import huggingface_hub as h\nh.HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='notes.txt', "
        "repo_id='alice/notes', repo_type='dataset')"
    )
    abort(client, tree, "alice/notes")
    assert sorted(hub.tree("alice/notes")) == [".gitattributes", "notes.txt"]


def test_files_that_cannot_be_stored_are_all_named(hub, client, tmp_path):
    tree = make_tree(tmp_path / "tree")
    (tree / "sub-05" / "t1w.nii").write_bytes(b"")
    (tree / "sub-07" / "t1w.nii").write_bytes(b"")
    status, text = command(client, "alice/unstorable", tree, "--num-shards", "4")
    assert status == 1 and "sub-05/t1w.nii" in text and "sub-07/t1w.nii" in text and "Traceback" not in text
    assert not hub.exists("alice/unstorable")


def test_the_command(hub, client, stock, tree):
    status, text = command(client, "alice/command", tree, "--max-shard-size", "30KB", "--num-proc", "2")
    assert status == 0, text
    lines = text.splitlines()
    assert f"Found {ROWS} subjects" in lines and "Done and verified: " in text
    assert lines[-1] == "Load it with load_dataset('alice/command')"
    assert re.search(r"^embedded (\S+ kB) and uploaded \1 of \1, (\d+) of \2 shards$", text, re.MULTILINE)
    found = stock.run(
        "import datasets, hashlib\nds = datasets.load_dataset('alice/command', split='train').cast_column('t1w', datasets.Nifti(decode=False))\n"
        "result = {r['subject_id']: r['t1w'] and hashlib.sha256(r['t1w']['bytes']).hexdigest() for r in ds}"
    )
    assert found == {subject: files[0] for subject, files in truth(tree).items()}
    status, text = command(client, "alice/command", tree, "--abort")
    assert status == 0 and "nothing was done" in text


# -- the full numbers ----------------------------------------------------------------------------------------------------


def report(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}")


@pytest.mark.deep
def test_fifty_killed_pushes(hub, client, stock, tree, tmp_path, capsys):
    """Each is killed once to four times, by turns of one worker and of two, and then left to end."""
    for workers in (1, 2):
        client.run(script(tree, f"alice/fifty-{workers}"))
    hub.clear_log()
    rng = random.Random(50)
    kills = embedded_again = 0
    for number in range(50):
        workers = 1 + number % 2
        repo_id, log = f"org/fifty-{number}", tmp_path / f"log-{number}"
        moments = [rng.uniform(0.02, 0.45) + (workers > 1) * rng.uniform(0, 0.9) for _ in range(rng.randint(1, 4))]
        hits = kill_and_resume(hub, client, tree, repo_id, log, moments, processes=None if workers == 1 else workers)
        assert hub.tree(repo_id) == hub.tree("alice/fifty-1")
        assert_resumed_well(hub, log, hits, workers)
        assert_atomic(hub, repo_id, hub.tree(repo_id))
        assert hub.refs(repo_id).keys() == {"refs/heads/main"}
        assert read(stock, repo_id) == truth(tree)
        kills += hits
        embedded_again += len(log.read_text().split()) - 8
        hub.clear_log()
    report(capsys, f"50 pushes, {kills} kills, {embedded_again} shards embedded again, none uploaded twice")


def schedule(rng: random.Random) -> list[Fault]:
    """A handful of faults, from passing ones to a Hub that is down for longer than the push's patience."""
    routes = [
        "whoami repo_info auth_check create_repo branch refs tree resolve cdn preupload lfs_batch lfs_upload lfs_verify",
        "commit commit commit lfs_upload lfs_verify validate_yaml *",
    ]
    faults = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["status"] * 6 + ["reset", "lost", "lost", "truncate", "slow", "reset_upload"])
        status = rng.choice([429, 429, 500, 502, 503, 504, 409, 412, 503, 500, 401, 403, 413, 404])
        faults.append(
            Fault(
                rng.choice(" ".join(routes).split()),
                kind=kind,
                status=status,
                count=rng.choice([1, 1, 1, 2, 2, 3, 30]) if kind != "slow" else 1,
                skip=rng.choice([0, 0, 1, 2, 3, 4, 6]),
                retry_after=rng.choice([None, None, 1, 2]) if status == 429 else None,
                seconds=rng.uniform(0.1, 2),
            )
        )
    return faults


@pytest.mark.deep
def test_two_hundred_schedules_of_faults(tmp_path, capsys):
    """Every one ends in the right repository, or in one clear line with the old state intact. Six servers at a time."""
    from concurrent.futures import ThreadPoolExecutor

    old, new = make_tree(tmp_path / "old", rows=5, seed=1), make_tree(tmp_path / "new")
    seeds = iter(range(200))

    def one(seed: int, hub: HubServer, client: Client, stock: Client) -> str:
        rng = random.Random(seed)
        repo_id = f"alice/schedule-{seed}"
        replaces = rng.random() < 0.5
        if replaces:
            client.run(script(old, repo_id, num_shards=3))
        hub.set_faults(*schedule(rng))
        status, text = command(client, repo_id, new, "--num-shards", "8")
        hub.set_faults()
        if status == 0:
            assert read(stock, repo_id) == truth(new)
            assert len(data_of(hub, repo_id)) == 8
            return "right"
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and "Traceback" not in text, text
        if replaces:
            # The push may have been cut off after its commit, while it was checking it.
            assert len(data_of(hub, repo_id)) in (3, 8)
            assert read(stock, repo_id) == truth(old if len(data_of(hub, repo_id)) == 3 else new)
        elif hub.exists(repo_id):
            assert len(data_of(hub, repo_id)) in (0, 8)
        command(client, repo_id, new, "--num-shards", "8", check=True)
        assert read(stock, repo_id) == truth(new)
        return errors[0]

    def worker(number: int) -> dict[int, str]:
        folder, outcomes = tmp_path / f"worker-{number}", {}
        with (
            HubServer(folder / "server") as hub,
            Client(hub.env(), folder / "client", imports="hub_scripts") as client,
            Client(hub.env(home=folder / "stock"), folder / "stock", imports="datasets, hashlib") as stock,
        ):
            for seed in seeds:
                try:
                    outcomes[seed] = one(seed, hub, client, stock)
                except Exception as error:
                    outcomes[seed] = f"FAILED {error!r}"
                    hub.set_faults()
        return outcomes

    with ThreadPoolExecutor(6) as pool:
        outcomes = {seed: text for found in pool.map(worker, range(6)) for seed, text in found.items()}
    assert len(outcomes) == 200
    failed = {seed: text for seed, text in outcomes.items() if text.startswith("FAILED")}
    assert not failed, "\n".join(f"{seed}: {text}" for seed, text in failed.items())
    right = sum(text == "right" for text in outcomes.values())
    report(
        capsys,
        f"200 schedules: {right} ended in the right repository, {200 - right} in one line and were gone on with",
    )


def data_of(hub: HubServer, repo_id: str) -> list[str]:
    return [path for path in hub.tree(repo_id) if path.startswith("data/")]


def make_big_tree(folder: Path, rows: int, nbytes: int) -> Path:
    """Volumes that gzip could not make smaller, one a row."""
    rng = np.random.default_rng(3)
    block = rng.bytes(nbytes)
    for row in range(rows):
        (folder / f"sub-{row:03d}").mkdir(parents=True)
        header = nib.Nifti1Image(np.zeros((1000, 500, nbytes // 10**6), "int16"), np.eye(4)).header
        with open(folder / f"sub-{row:03d}" / "t1w.nii", "wb") as file:
            file.write(header.binaryblock + b"\0\0\0\0" + row.to_bytes(4, "little") + block[4:])
    return folder


@pytest.mark.deep
def test_memory_and_disk_of_two_hundred_rows_of_40_mb(hub, client, tmp_path, capsys):
    import psutil

    rows, nbytes, shard = 200, 40_000_000, 500_000_000
    tree = make_big_tree(tmp_path / "big", rows, nbytes)
    try:
        for workers in (1, 2):
            repo_id, disk, memory = f"alice/big-{workers}", 0, 0
            run = client.start(
                script(tree, repo_id, num_shards=None, max_shard_size=shard, num_proc=workers, patience=600)
            )
            work = Path(hub.env()["HF_HOME"], "datasets-bids")
            while psutil.pid_exists(run.pid) and psutil.Process(run.pid).status() != psutil.STATUS_ZOMBIE:
                try:
                    process = psutil.Process(run.pid)
                    tree_of = [process, *process.children(recursive=True)]
                    memory = max(memory, *(p.memory_info().rss for p in tree_of))
                    disk = max(disk, sum(p.stat().st_size for p in work.glob(f"*big-{workers}*/shards/*")))
                except (psutil.NoSuchProcess, FileNotFoundError):
                    pass
                time.sleep(0.02)
            run.result()
            report(
                capsys,
                f"{workers} workers: peak RSS of a process {memory / 1e6:.0f} MB, disk {disk / shard:.2f} shards",
            )
            assert memory <= 2.5 * nbytes + 250e6 + 150e6
            assert disk <= (workers + 2) * shard
            assert len([path for path in hub.tree(repo_id) if path.startswith("data/")]) == 17
            shutil.rmtree(hub.root / "datasets" / "alice" / f"big-{workers}" / "lfs")
    finally:
        shutil.rmtree(tree)


@pytest.mark.deep
def test_902_shards_take_few_commits(hub, client, stock, tmp_path):
    tree = tmp_path / "arc"
    for row in range(902):
        (tree / f"sub-{row:03d}").mkdir(parents=True)
        image = nib.Nifti1Image(np.full((4, 4, 4), row, "int16"), np.eye(4))
        nib.save(image, tree / f"sub-{row:03d}" / "t1w.nii")
    client.run(script(tree, "alice/arc", num_shards=902, commit_shards=100, patience=300))
    assert len([path for path in hub.tree("alice/arc") if path.startswith("data/")]) == 902
    assert len(hub.log("commit")) <= 12
    assert len(read(stock, "alice/arc")) == 902
