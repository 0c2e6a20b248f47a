"""The test server itself, driven by the stock clients: what the tests of `hub.py` stand on."""

import pytest

from .hub_server import Client, Fault, HubServer


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub.env(), tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture(autouse=True)
def no_faults_left(hub):
    yield
    hub.set_faults()
    hub.settings(quota=None)
    hub.clear_log()


API = "from huggingface_hub import *; from huggingface_hub.utils import *; api = HfApi(); repo = {!r}\n"


def test_files_go_up_and_come_down(hub, client):
    result = client.run(
        API.format("alice/files")
        + """
import hashlib, os
url = api.create_repo(repo, repo_type="dataset")
api.create_repo(repo, repo_type="dataset", exist_ok=True)
api.upload_file(path_or_fileobj=b"words", path_in_repo="notes/a b.txt", repo_id=repo, repo_type="dataset")
big = os.urandom(300_000)
info = api.create_commit(
    repo, [CommitOperationAdd("data/x.parquet", big), CommitOperationAdd("data/y.parquet", big[::-1])],
    commit_message="two", repo_type="dataset",
)
read = [open(api.hf_hub_download(repo, path, repo_type="dataset"), "rb").read() for path in ("notes/a b.txt", "data/x.parquet")]
tree = list(api.list_repo_tree(repo, recursive=True, repo_type="dataset"))
infos = api.get_paths_info(repo, ["data/x.parquet", "data", "nothing"], repo_type="dataset")
meta = get_hf_file_metadata(hf_hub_url(repo, "data/x.parquet", repo_type="dataset"))
fs = HfFileSystem()
with fs.open(f"datasets/{repo}/data/x.parquet") as file:
    file.seek(1000)
    part = file.read(50)
result = {
    "url": str(url), "equal": read == [b"words", big], "part": part == big[1000:1050],
    "paths": [entry.path for entry in tree],
    "lfs": [i.lfs and i.lfs.sha256 for i in infos if hasattr(i, "size")], "sha": hashlib.sha256(big).hexdigest(),
    "etag": meta.etag, "size": meta.size, "commit": meta.commit_hash == info.oid,
    "titles": [commit.title for commit in api.list_repo_commits(repo, repo_type="dataset")],
    "who": api.whoami()["name"], "exists": api.file_exists(repo, "notes/none", repo_type="dataset"),
}
"""
    )
    assert result["equal"] and result["part"] and result["commit"] and result["who"] == "alice"
    assert result["url"] == f"{hub.endpoint}/datasets/alice/files"
    assert result["paths"] == [".gitattributes", "data", "data/x.parquet", "data/y.parquet", "notes", "notes/a b.txt"]
    assert result["lfs"] == [result["sha"]] and result["etag"] == result["sha"] and result["size"] == 300_000
    assert result["titles"] == ["two", "Upload notes/a b.txt with huggingface_hub", "initial commit"]
    assert result["exists"] is False
    assert hub.tree("alice/files")["data/x.parquet"] == result["sha"]
    assert len(hub.log("lfs_upload")) == 2


def test_branches_copies_and_deletions(hub, client):
    result = client.run(
        API.format("org/branches")
        + """
kind = dict(repo_type="dataset")
api.create_repo(repo, **kind)
api.create_branch(repo, branch="work/one", **kind)
api.create_branch(repo, branch="work/one", exist_ok=True, **kind)
adds = [CommitOperationAdd(f"data/{i}.parquet", bytes([i]) * 100) for i in range(4)]
api.preupload_lfs_files(repo, adds, revision="work/one", **kind)
work = api.create_commit(repo, adds, commit_message="work", revision="work/one", **kind)
api.upload_file(path_or_fileobj=b"x", path_in_repo="old.parquet", repo_id=repo, **kind)
head = api.repo_info(repo, **kind).sha
ops = [CommitOperationCopy(f"data/{i}.parquet", f"data/{i}.parquet", src_revision=work.oid) for i in range(4)]
ops += [CommitOperationDelete("old.parquet"), CommitOperationAdd("README.md", b"---\\nlicense: cc0-1.0\\n---\\n# Words\\n")]
last = api.create_commit(repo, ops, commit_message="all", parent_commit=head, **kind)
codes = []
for operations in (ops[-1:], [CommitOperationDelete("nothing.txt")]):
    try:
        operations = [CommitOperationAdd("README.md", b"other")] if len(codes) == 0 else operations
        api.create_commit(repo, operations, commit_message="raced", parent_commit=head if not codes else None, **kind)
    except HfHubHTTPError as error:
        codes.append(error.response.status_code)
again = api.create_commit(repo, [CommitOperationAdd("README.md", b"---\\nlicense: cc0-1.0\\n---\\n# Words\\n")], commit_message="same", **kind)
api.create_tag(repo, tag="v1", **kind)
refs = api.list_repo_refs(repo, **kind)
api.delete_branch(repo, branch="work/one", **kind)
result = {"codes": codes, "again": again.oid == last.oid, "branches": sorted(b.name for b in refs.branches), "tags": [t.name for t in refs.tags]}
"""
    )
    assert result == {"codes": [412, 404], "again": True, "branches": ["main", "work/one"], "tags": ["v1"]}
    assert sorted(hub.tree("org/branches")) == [
        ".gitattributes",
        "README.md",
        *(f"data/{i}.parquet" for i in range(4)),
    ]
    assert list(hub.refs("org/branches")) == ["refs/heads/main"]


def test_pull_requests(hub, client):
    result = client.run(
        API.format("alice/pulls")
        + """
kind = dict(repo_type="dataset")
api.create_repo(repo, **kind)
add = CommitOperationAdd("data/1.parquet", b"one")
info = api.create_commit(repo, [add], commit_message="Upload", commit_description="d", create_pr=True, **kind)
draft = api.create_pull_request(repo, "By hand", **kind)
found = [(d.num, d.title, d.status) for d in api.get_repo_discussions(repo, discussion_type="pull_request", **kind)]
before = api.list_repo_files(repo, **kind)
pulled = api.list_repo_files(repo, revision=info.pr_revision, **kind)
api.upload_file(path_or_fileobj=b"2", path_in_repo="2.parquet", repo_id=repo, revision=info.pr_revision, **kind)
api.merge_pull_request(repo, info.pr_num, **kind)
api.change_discussion_status(repo, draft.num, "closed", **kind)
status = [api.get_discussion_details(repo, n, **kind).status for n in (info.pr_num, draft.num)]
result = [found, before, pulled, status, api.list_repo_files(repo, **kind)]
"""
    )
    assert result[0] == [[1, "Upload", "open"], [2, "By hand", "draft"]]
    assert result[1] == [".gitattributes"] and result[2] == [".gitattributes", "data/1.parquet"]
    assert result[3] == ["merged", "closed"]
    assert result[4] == [".gitattributes", "2.parquet", "data/1.parquet"]


def test_multipart_upload(hub, client):
    hub.settings(multipart_above=1000, part_size=400)
    try:
        client.run(
            API.format("alice/parts")
            + """
api.create_repo(repo, repo_type="dataset")
api.upload_file(path_or_fileobj=bytes(range(256)) * 5, path_in_repo="x.parquet", repo_id=repo, repo_type="dataset")
"""
        )
    finally:
        hub.settings(multipart_above=64 * 1024**2, part_size=16 * 1024**2)
    assert len(hub.log("lfs_part")) == 4
    assert hub.read("alice/parts", "x.parquet") == bytes(range(256)) * 5


def test_who_may_see_and_write(hub, client):
    result = client.run(
        API.format("org/secret")
        + """
kind = dict(repo_type="dataset")
api.create_repo(repo, private=True, **kind)
def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', None)}"
result = [api.repo_info(repo, **kind).private, api.auth_check(repo, write=True, **kind)]
for token in ("hf_rita_write", "hf_bob_write", "hf_alice_read", "hf_wrong", False):
    other = HfApi(token=token)
    result.append([
        outcome(lambda: other.repo_info(repo, **kind)),
        outcome(lambda: other.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, **kind)),
        outcome(lambda: other.create_repo("org/another", **kind)),
    ])
"""
    )
    read_only = [None, "HfHubHTTPError 403", "HfHubHTTPError 403"]
    hidden = ["RepositoryNotFoundError 404", "RepositoryNotFoundError 404", "HfHubHTTPError 403"]
    assert result[:4] == [True, None, read_only, hidden]
    assert result[4] == read_only
    assert result[5] == ["HfHubHTTPError 401"] * 3
    assert result[6][0] == "RepositoryNotFoundError 401"


def test_stock_push_and_load(hub, client):
    result = client.run(
        """
import datasets
for name, n in (("default", 7), ("other", 3)):
    ds = datasets.Dataset.from_dict({"id": [f"sub-{i:02d}" for i in range(n)], "data": [bytes([i]) * 1000 for i in range(n)]})
    ds.push_to_hub("alice/stock", name, num_shards=3)
loaded = datasets.load_dataset("alice/stock", "default", split="train")
streamed = datasets.load_dataset("alice/stock", "other", split="train", streaming=True)
datasets.Dataset.from_dict({"id": ["a"]}).push_to_hub("alice/stock", "default")
again = datasets.load_dataset("alice/stock", "default", split="train", streaming=True)
result = [loaded["id"][:], [row["id"] for row in streamed], [row["id"] for row in again]]
"""
    )
    assert result == [[f"sub-{i:02d}" for i in range(7)], [f"sub-{i:02d}" for i in range(3)], ["a"]]
    data = [path for path in hub.tree("alice/stock") if path.startswith("data/")]
    assert data == ["data/train-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        (Fault("lfs_batch", status=503), 2),
        (Fault("lfs_batch", status=429, retry_after=1), 2),
        (Fault("lfs_batch", kind="reset"), 2),
        (Fault("lfs_batch", kind="truncate"), 2),
        (Fault("lfs_batch", kind="slow", seconds=0.5), 1),
        (Fault("lfs_batch", kind="status", status=500, skip=1), 1),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_faults_reach_the_client_and_end(hub, client, fault, requests):
    hub.set_faults(fault)
    repo = f"alice/fault-{fault.kind}-{fault.status}-{fault.skip}"
    client.run(
        API.format(repo)
        + """
api.create_repo(repo, repo_type="dataset")
api.upload_file(path_or_fileobj=b"x" * 1000, path_in_repo="x.parquet", repo_id=repo, repo_type="dataset")
"""
    )
    assert hub.read(repo, "x.parquet") == b"x" * 1000
    assert len(hub.log("lfs_batch")) == requests
    assert hub.pending_faults() == (1 if fault.skip else 0)


def test_a_lost_commit_has_happened_and_a_reset_one_has_not(hub, client):
    script = (
        API.format("alice/lost")
        + """
api.create_repo(repo, repo_type="dataset", exist_ok=True)
result = "answered"
try:
    api.create_commit(repo, [CommitOperationAdd(name, b"1")], commit_message="m", repo_type="dataset")
except Exception as error:
    result = type(error).__name__
"""
    )
    hub.set_faults(Fault("commit", kind="reset"))
    assert client.run("name = 'reset.txt'\n" + script) in ("ReadError", "RemoteProtocolError")
    hub.set_faults(Fault("commit", kind="lost"))
    assert client.run("name = 'lost.txt'\n" + script) in ("ReadError", "RemoteProtocolError")
    assert sorted(hub.tree("alice/lost")) == [".gitattributes", "lost.txt"]


def test_an_upload_reset_half_way_leaves_no_object(hub, client):
    hub.set_faults(Fault("lfs_upload", kind="reset_upload"))
    client.run(
        API.format("alice/half")
        + """
api.create_repo(repo, repo_type="dataset")
api.upload_file(path_or_fileobj=b"x" * 3_000_000, path_in_repo="x.parquet", repo_id=repo, repo_type="dataset")
"""
    )
    assert [entry.get("status") for entry in hub.log("lfs_upload")] == [None, 200]
    assert len(hub.read("alice/half", "x.parquet")) == 3_000_000


def test_quota_and_missing_objects_are_refused(hub, client):
    hub.settings(quota=1000)
    result = client.run(
        API.format("alice/quota")
        + """
api.create_repo(repo, repo_type="dataset")
result = []
try:
    api.upload_file(path_or_fileobj=b"x" * 2000, path_in_repo="x.parquet", repo_id=repo, repo_type="dataset")
except ValueError as error:
    result.append(str(error))
add = CommitOperationAdd("y.parquet", b"y")
add._upload_mode, add._is_uploaded, add._should_ignore = "lfs", True, False
try:
    api.create_commit(repo, [add], commit_message="m", repo_type="dataset")
except BadRequestError as error:
    result.append(error.server_message)
"""
    )
    assert "storage limit" in result[0] and "does not exist" in result[1]


def test_everything_is_on_disk(hub, client, tmp_path):
    client.run(
        API.format("alice/kept")
        + """
api.create_repo(repo, repo_type="dataset")
api.upload_file(path_or_fileobj=b"kept", path_in_repo="x.parquet", repo_id=repo, repo_type="dataset")
"""
    )
    with HubServer(hub.root) as second:
        script = API.format("alice/kept") + "result = api.list_repo_files(repo, repo_type='dataset')"
        with Client(second.env(), tmp_path / "client", imports="huggingface_hub") as other:
            assert other.run(script) == [".gitattributes", "x.parquet"]
