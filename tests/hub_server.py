"""A Hub-compatible server on loopback, for the real `huggingface_hub` and `datasets` clients.

How it works:

- It runs in a process of its own (`python tests/hub_server.py ROOT`), so that a client killed with SIGKILL leaves it
  alone, and keeps everything on disk below ROOT: one folder a repository with its references (`repo.json`), commits
  (one JSON file each, with the whole tree), git blobs and LFS objects.
- Every request is one row of `ROUTES`: a method, a path and a name. Tests speak of routes by that name, in the request
  log and in the fault schedule.
- Errors carry the status, `X-Error-Code` and `X-Error-Message` that the Hub sends, since the client's exceptions depend
  on them.
- Files matched by `.gitattributes` are LFS files, uploaded by the basic transfer, or by the multipart transfer above
  `multipart_above` bytes. `resolve` redirects them to another host name (`localhost` for `127.0.0.1`), as the Hub does
  to its CDN, so the client drops its token on the way.
- The fault schedule is a list of rules (see `Fault`), set over HTTP and consumed in order.

What the Hub does and this server does not: Xet storage. A client with `hf_xet` installed uploads through Xet whatever the
server says, so tests set HF_HUB_DISABLE_XET=1 and the same files go through LFS. The commit that names them is the same
for both.
"""

import argparse
import base64
import contextlib
import email.utils
import fnmatch
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


CHUNK = 1 << 20  # bytes read from a socket at once
PAGE = 1000  # files in one page of a tree listing, as on the Hub
GIT_ATTRIBUTES = "*.parquet filter=lfs diff=lfs merge=lfs -text\n*.arrow filter=lfs diff=lfs merge=lfs -text\n"
REGULAR_LIMIT = 10 * 1024**2  # bytes; larger files are LFS files whatever their name
TYPES = {"datasets": "dataset", "models": "model", "spaces": "space"}

# Who may do what: the server's accounts, by token. "org" is an organization that alice and rita belong to.
TOKENS = {
    "hf_alice_write": {"user": "alice", "role": "write", "orgs": {"org": "write"}},
    "hf_alice_read": {"user": "alice", "role": "read", "orgs": {"org": "write"}},
    "hf_rita_write": {"user": "rita", "role": "write", "orgs": {"org": "read"}},
    "hf_bob_write": {"user": "bob", "role": "write", "orgs": {}},
}


@dataclass
class Fault:
    """One rule of the fault schedule: the `count` requests to `route` after the next `skip` ones go wrong.

    kind: "status" (answers `status`, with Retry-After if `retry_after` is given), "reset" (the connection is reset and
    nothing is done), "reset_upload" (reset in the middle of the request's body), "lost" (the request is done and its
    answer lost by a reset), "truncate" (done, and half of the answer is sent), "slow" (done after `seconds`).
    """

    route: str
    kind: str = "status"
    count: int = 1
    skip: int = 0
    status: int = 503
    retry_after: float | None = None
    message: str = "scheduled fault"
    seconds: float = 1.0

    def matches(self, route: str) -> bool:
        if self.count <= 0 or not fnmatch.fnmatch(route, self.route):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.count -= 1
        return True


class ApiError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def write_json(path: Path, value) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


class Repo:
    """A repository on disk. Callers hold `lock` for whatever changes references."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.RLock()
        self.state = json.loads((folder / "repo.json").read_text())
        self.cache: dict[str, dict] = {}

    @classmethod
    def create(cls, folder: Path, **state) -> "Repo":
        for name in ("commits", "blobs", "lfs", "parts"):
            (folder / name).mkdir(parents=True)
        write_json(folder / "repo.json", {**state, "refs": {}, "tags": {}, "pulls": {}})
        repo = cls(folder)
        first = repo.commit(
            [("file", ".gitattributes", GIT_ATTRIBUTES.encode())], None, "initial commit", "", "system"
        )
        repo.set_ref("refs/heads/main", first)
        return repo

    def save(self) -> None:
        write_json(self.folder / "repo.json", self.state)

    def set_ref(self, ref: str, commit: str) -> None:
        self.state["refs"][ref] = commit
        self.save()

    def resolve(self, revision: str) -> str:
        refs = self.state["refs"]
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in refs:
                return refs[ref]
        if revision in self.state["tags"]:
            return self.state["tags"][revision]
        if re.fullmatch("[0-9a-f]{40}", revision) and (self.folder / "commits" / revision).is_file():
            return revision
        raise ApiError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def read_commit(self, oid: str) -> dict:
        if oid not in self.cache:
            self.cache[oid] = json.loads((self.folder / "commits" / oid).read_text())
        return self.cache[oid]

    def tree(self, oid: str) -> dict[str, dict]:
        return self.read_commit(oid)["tree"]

    def has_lfs(self, oid: str, size: int | None = None) -> bool:
        path = self.folder / "lfs" / oid
        return path.is_file() and (size is None or path.stat().st_size == size)

    def commit(self, operations, parent: str | None, title: str, message: str, author: str) -> str:
        """Writes a commit (and moves no reference). operations: (key, path, content or (oid, size) or None)."""
        tree = dict(self.tree(parent)) if parent else {}
        for key, path, value in operations:
            if key == "deletedFile":
                if path not in tree:
                    raise ApiError(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            elif key == "deletedFolder":
                below = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
                if not below:
                    raise ApiError(404, "A folder with this name doesn't exist", "EntryNotFound")
                for name in below:
                    del tree[name]
            elif key == "file":
                oid = blob_oid(value)
                (self.folder / "blobs" / oid).write_bytes(value)
                tree[path] = {"oid": oid, "size": len(value)}
            elif key == "lfsFile":
                oid, size = value
                if not self.has_lfs(oid, size):
                    raise ApiError(
                        400, "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    )
                size = (self.folder / "lfs" / oid).stat().st_size
                text = pointer(oid, size)
                lfs = {"oid": oid, "size": size, "pointerSize": len(text)}
                tree[path] = {"oid": blob_oid(text), "size": size, "lfs": lfs}
            else:
                raise ApiError(400, f"unknown operation {key}")
        record = {
            "parents": [parent] if parent else [],
            "title": title,
            "message": message,
            "author": author,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            "tree": dict(sorted(tree.items())),
            "nonce": uuid.uuid4().hex,
        }
        oid = hashlib.sha1(json.dumps(record).encode()).hexdigest()
        write_json(self.folder / "commits" / oid, record)
        return oid

    def history(self, oid: str):
        while oid:
            record = self.read_commit(oid)
            yield oid, record
            oid = record["parents"][0] if record["parents"] else None


@dataclass
class Hub:
    """Everything that the request handlers share."""

    root: Path
    multipart_above: int = 64 * 1024**2  # bytes; the Hub's own limit is 5 GB
    part_size: int = 16 * 1024**2
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    quota: int | None = None  # bytes of LFS objects a repository may hold
    upload_rate: float | None = None  # bytes a second that one connection uploads at most, as over a network
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self):
        for path in sorted(self.root.glob("*/*/*/repo.json")):
            self.repos["/".join(path.parts[-4:-1])] = Repo(path.parent)

    def fault(self, route: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(route):
                    return fault
        return None


def can_write(account: dict | None, namespace: str) -> bool:
    return bool(account) and account["role"] == "write" and _belongs(account, namespace) == "write"


def _belongs(account: dict, namespace: str) -> str | None:
    return "write" if account["user"] == namespace else account["orgs"].get(namespace)


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str):
    """Registers a handler method under its own name; {repo} and {rev} stand for their regular expressions."""
    repo = r"(?P<kind>datasets|models|spaces)/(?P<namespace>[\w.-]+)/(?P<name>[\w.-]+?)"
    pattern = pattern.replace("{repo}", repo).replace("{rev}", r"(?P<rev>[^/]+)")

    def register(function):
        ROUTES.append((method, re.compile(pattern + r"\Z"), function.__name__))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rbufsize = 1 << 18
    hub: Hub

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        # A client that was killed, or a fault that closed the connection: nothing to report.
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do(self):
        parts = urllib.parse.urlsplit(self.path)
        self.query = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.entry = {"time": time.time(), "method": self.command, "path": parts.path, "bytes": self.unread}
        self.fate: Fault | None = None
        for method, pattern, name in ROUTES:
            match = pattern.match(parts.path)
            if method in (self.command, "*") and match:
                break
        else:
            return self.answer_error(ApiError(404, f"no such route: {self.command} {parts.path}"))
        self.args = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items() if value is not None}
        if name != "control":
            self.entry["route"] = name
            self.fate = self.hub.fault(name)
            with self.hub.lock:
                self.hub.log.append(self.entry)
        try:
            if self.fate:
                self.entry["fault"] = self.fate.kind
                if self.fate.kind == "status":
                    raise ApiError(self.fate.status, self.fate.message)
                if self.fate.kind == "reset":
                    return self.reset()
                if self.fate.kind == "reset_upload":
                    for _ in self.chunks(self.unread // 2):
                        pass
                    return self.reset()
                if self.fate.kind == "slow":
                    time.sleep(self.fate.seconds)
            getattr(self, name)()
        except ApiError as error:
            self.answer_error(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def chunks(self, total: int | None = None):
        left = self.unread if total is None else total
        buffer = memoryview(bytearray(min(CHUNK, left)))  # one for all chunks: allocating each took half of the time
        while left:
            count = self.rfile.readinto1(buffer[: min(CHUNK, left)])
            if not count:
                raise ConnectionResetError
            left -= count
            self.unread -= count
            yield buffer[:count]
            if self.hub.upload_rate:
                time.sleep(count / self.hub.upload_rate)

    def body(self) -> bytes:
        return b"".join(bytes(chunk) for chunk in self.chunks())

    def json(self):
        data = self.body()
        return json.loads(data) if data else {}

    def answer(self, value=None, status: int = 200, headers: dict | None = None, body: bytes | None = None):
        for _ in self.chunks():
            pass
        if body is None:
            body = json.dumps(value).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.entry["status"] = status
        if self.fate and self.fate.kind == "lost":
            return self.reset()
        self.send_response(status)
        for key, header in (headers or {}).items():
            self.send_header(key, header)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fate and self.fate.kind == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self.reset()
        self.wfile.write(body)

    def answer_error(self, error: ApiError):
        headers = {"X-Error-Message": error.message, "X-Request-Id": uuid.uuid4().hex}
        if error.code:
            headers["X-Error-Code"] = error.code
        if self.fate and self.fate.retry_after is not None:
            headers["Retry-After"] = f"{self.fate.retry_after:g}"
        self.answer({"error": error.message}, status=error.status, headers=headers)

    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def account(self) -> dict | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in TOKENS:
            raise ApiError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repo_id(self) -> str:
        return f"{self.args['namespace']}/{self.args['name']}"

    def repo(self, write: bool = False) -> Repo:
        account, namespace = self.account(), self.args["namespace"]
        repo = self.hub.repos.get(f"{self.args['kind']}/{self.repo_id()}")
        if repo is None or (repo.state["private"] and not (account and _belongs(account, namespace))):
            raise ApiError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not can_write(account, namespace):
            if account is None:
                raise ApiError(401, "Invalid username or password.")
            raise ApiError(403, "You do not have write access to this repository")
        return repo

    # -- control: what tests ask of the server itself ------------------------------------------------------------------

    @route("*", r"/_test/(?P<what>faults|log|settings)")
    def control(self):
        what = self.args["what"]
        with self.hub.lock:
            if what == "log":
                log = list(self.hub.log)
                if self.command == "DELETE":
                    self.hub.log.clear()
                return self.answer(log)
            if what == "settings":
                for key, value in self.json().items():
                    setattr(self.hub, key, value)
                return self.answer({})
            if self.command == "PUT":
                self.hub.faults = [Fault(**fault) for fault in self.json()]
            return self.answer([vars(fault) for fault in self.hub.faults])

    # -- accounts and repositories -------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        account = self.account()
        if account is None:
            raise ApiError(401, "Invalid credentials in Authorization header")
        orgs = [{"name": org, "roleInOrg": role, "type": "org"} for org, role in account["orgs"].items()]
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": account["role"]}}
        self.answer({"type": "user", "id": account["user"], "name": account["user"], "orgs": orgs, "auth": auth})

    @route("POST", "/api/repos/create")
    def create_repo(self):
        payload, account = self.json(), self.account()
        if account is None:
            raise ApiError(401, "Invalid username or password.")
        namespace = payload.get("organization") or account["user"]
        kind = payload.get("type", "model") + "s"
        if not can_write(account, namespace):
            message = f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"'
            raise ApiError(403, message)
        key = f"{kind}/{namespace}/{payload['name']}"
        url = f"{self.base()}/{'' if kind == 'models' else kind + '/'}{namespace}/{payload['name']}"
        with self.hub.lock:
            if key in self.hub.repos:
                return self.answer({"error": f"You already created this {kind[:-1]} repo", "url": url}, status=409)
            private = payload.get("private") or payload.get("visibility") == "private"
            self.hub.repos[key] = Repo.create(self.hub.root / key, private=bool(private))
        self.answer({"url": url, "name": f"{namespace}/{payload['name']}"})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        payload, account = self.json(), self.account()
        namespace = payload.get("organization") or (account or {}).get("user", "")
        kind = payload.get("type", "model") + "s"
        self.args = {"kind": kind, "namespace": namespace, "name": payload["name"]}
        repo = self.repo(write=True)
        with self.hub.lock:
            del self.hub.repos[f"{kind}/{self.repo_id()}"]
            shutil.rmtree(repo.folder)
        self.answer({})

    @route("PUT", "/api/{repo}/settings")
    def settings(self):
        repo, payload = self.repo(write=True), self.json()
        if "visibility" in payload or "private" in payload:
            repo.state["private"] = payload.get("private") or payload.get("visibility") == "private"
            repo.save()
        self.answer({})

    @route("GET", "/api/{repo}(?:/revision/{rev})?")
    def repo_info(self):
        repo = self.repo()
        oid = repo.resolve(self.args.get("rev", "main"))
        siblings = [{"rfilename": path} for path in repo.tree(oid)]
        if self.query.get("blobs"):
            siblings = [
                {
                    "rfilename": path,
                    "size": entry["size"],
                    "blobId": entry["oid"],
                    **({"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}),
                }
                for path, entry in repo.tree(oid).items()
            ]
        date = repo.read_commit(oid)["date"]
        info = {"_id": self.repo_id(), "id": self.repo_id(), "author": self.args["namespace"], "sha": oid}
        info |= {"private": repo.state["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self.answer({**info, "tags": [], "createdAt": date, "lastModified": date, "siblings": siblings})

    @route("GET", "/api/{repo}/auth-check(?P<write>/write)?")
    def auth_check(self):
        self.repo(write="write" in self.args)
        self.answer({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        import yaml

        content = self.json()["content"]
        match = re.match(r"\A---\n(.*?)\n---(\n|\Z)", content, re.DOTALL)
        if not match:
            return self.answer(
                {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        try:
            metadata = yaml.safe_load(match[1])
            if metadata is not None and not isinstance(metadata, dict):
                raise yaml.YAMLError("the metadata is not a mapping")
        except yaml.YAMLError as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        self.answer({"errors": [], "warnings": []})

    # -- references ----------------------------------------------------------------------------------------------------

    @route("GET", "/api/{repo}/refs")
    def refs(self):
        repo = self.repo()
        found = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, oid in repo.state["refs"].items():
            kind = "branches" if ref.startswith("refs/heads/") else "pullRequests"
            name = ref.removeprefix("refs/heads/").removeprefix("refs/pr/")
            if kind == "branches" or self.query.get("include_prs"):
                found[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        for tag, oid in repo.state["tags"].items():
            found["tags"].append({"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid})
        self.answer(found)

    @route("*", "/api/{repo}/branch/{rev}")
    def branch(self):
        repo, ref, payload = self.repo(write=True), f"refs/heads/{self.args['rev']}", self.json()
        if self.args["rev"].startswith("refs/"):
            raise ApiError(400, "Invalid reference for a branch")
        with repo.lock:
            if self.command == "POST":
                if ref in repo.state["refs"]:
                    raise ApiError(409, f"Reference already exists: {ref}")
                repo.set_ref(ref, repo.resolve(payload.get("startingPoint", "main")))
            else:
                if ref == "refs/heads/main":
                    raise ApiError(403, "Cannot delete branch main")
                if ref not in repo.state["refs"]:
                    raise ApiError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
                del repo.state["refs"][ref]
                repo.save()
        self.answer({})

    @route("*", "/api/{repo}/tag/{rev}")
    def tag(self):
        repo, payload = self.repo(write=True), self.json()
        with repo.lock:
            if self.command == "POST":
                if payload["tag"] in repo.state["tags"]:
                    raise ApiError(409, "Tag already exists")
                repo.state["tags"][payload["tag"]] = repo.resolve(self.args["rev"])
            else:
                repo.state["tags"].pop(self.args["rev"], None)
            repo.save()
        self.answer({})

    @route("GET", "/api/{repo}/commits/{rev}")
    def commits(self):
        repo = self.repo()
        oid = repo.resolve(self.args["rev"])
        self.answer(
            [
                {
                    "id": oid,
                    "title": record["title"],
                    "message": record["message"],
                    "date": record["date"],
                    "authors": [{"user": record["author"]}],
                }
                for oid, record in repo.history(oid)
            ]
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def listing(self, path: str, entry: dict) -> dict:
        return {"type": "file", "path": path, **entry}

    def expanded(self, repo: Repo, oid: str, found: list[dict], expand: bool) -> list[dict]:
        if expand:
            record = repo.read_commit(oid)
            last = {"id": oid, "title": record["title"], "date": record["date"]}
            found = [{**entry, "lastCommit": last} for entry in found]
        return found

    @route("GET", "/api/{repo}/tree/{rev}(?:/(?P<path>.+))?")
    def tree(self):
        repo = self.repo()
        oid = repo.resolve(self.args["rev"])
        prefix = self.args["path"].rstrip("/") + "/" if "path" in self.args else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        found, folders = [], {}
        for path, entry in repo.tree(oid).items():
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
                folder = prefix + "/".join(parents[:depth])
                if folder not in folders:
                    folders[folder] = hashlib.sha1(f"{oid}{folder}".encode()).hexdigest()
                    found.append({"type": "directory", "path": folder, "oid": folders[folder], "size": 0})
            if recursive or not parents:
                found.append(self.listing(path, entry))
        if prefix and not found:
            raise ApiError(404, f"{prefix} does not exist on {self.args['rev']}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        page, headers = found[start : start + PAGE], {}
        if start + PAGE < len(found):
            query = urllib.parse.urlencode({**self.query, "cursor": start + PAGE})
            path = urllib.parse.urlsplit(self.path).path
            headers["Link"] = f'<{self.base()}{path}?{query}>; rel="next"'
        expand = self.query.get("expand", "").lower() in ("true", "1")
        self.answer(self.expanded(repo, oid, page, expand), headers=headers)

    @route("POST", "/api/{repo}/paths-info/{rev}")
    def paths_info(self):
        repo, body = self.repo(), self.body().decode()
        oid = repo.resolve(self.args["rev"])
        form = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        tree, found = repo.tree(oid), []
        if len(form.get("paths", [])) > PAGE:
            raise ApiError(413, "too many parameters")
        for path in form.get("paths", []):
            if path in tree:
                found.append(self.listing(path, tree[path]))
            elif any(name.startswith(path.rstrip("/") + "/") for name in tree):
                found.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
        expand = str(form.get("expand", [""])[-1]).lower() in ("true", "1")
        self.answer(self.expanded(repo, oid, found, expand))

    @route("*", "/(?:{repo})/resolve/{rev}/(?P<path>.+)")
    def resolve(self):
        repo = self.repo()
        oid = repo.resolve(self.args["rev"])
        entry = repo.tree(oid).get(self.args["path"])
        if entry is None:
            headers = {"X-Repo-Commit": oid, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, status=404, headers=headers)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if "lfs" not in entry:
            return self.send_file(repo.folder / "blobs" / entry["oid"], {**headers, "ETag": f'"{entry["oid"]}"'})
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        port = self.headers["Host"].rpartition(":")[2]
        key = f"{self.args['kind']}/{self.repo_id()}"
        headers["Location"] = f"http://localhost:{port}/_cdn/{key}/{entry['lfs']['oid']}"
        self.answer(status=302, headers=headers, body=b"")

    @route("*", "/_cdn/{repo}/(?P<oid>[0-9a-f]{64})")
    def cdn(self):
        if self.headers.get("Authorization"):
            raise ApiError(400, "a token was sent to the CDN")
        repo = self.hub.repos.get(f"{self.args['kind']}/{self.repo_id()}")
        path = repo and repo.folder / "lfs" / self.args["oid"]
        if not path or not path.is_file():
            raise ApiError(404, "Not found")
        self.send_file(path, {"ETag": f'"{self.args["oid"]}"', "Accept-Ranges": "bytes"})

    def send_file(self, path: Path, headers: dict):
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match and (match[1] or match[2]):
            start = int(match[1]) if match[1] else max(0, size - int(match[2]))
            stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
            if start >= size:
                headers = {**headers, "Content-Range": f"bytes */{size}"}
                return self.answer({"error": "Range not satisfiable"}, status=416, headers=headers)
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.entry["status"] = status
        self.entry["sent"] = stop - start
        if self.fate and self.fate.kind == "lost":
            return self.reset()
        self.send_response(status)
        modified = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        for key, header in {**headers, "Last-Modified": modified, "Content-Length": str(stop - start)}.items():
            self.send_header(key, header)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fate and self.fate.kind == "truncate":
            stop = start + (stop - start) // 2
        with open(path, "rb") as file:
            self.wfile.flush()
            self.connection.sendfile(file, start, stop - start)
        if self.fate and self.fate.kind == "truncate":
            self.close_connection = True

    # -- uploads -------------------------------------------------------------------------------------------------------

    @route("POST", "/api/{repo}/preupload/{rev}")
    def preupload(self):
        creates_pr = bool(self.query.get("create_pr"))
        repo, payload = self.repo(write=not creates_pr), self.json()
        tree = repo.tree(repo.resolve(self.args["rev"]))
        attributes = b""
        if ".gitattributes" in tree:
            attributes = (repo.folder / "blobs" / tree[".gitattributes"]["oid"]).read_bytes()
        patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
        files = []
        for file in payload["files"]:
            path, known = file["path"], tree.get(file["path"], {})
            lfs = file["size"] > REGULAR_LIMIT or any(
                fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path.rpartition("/")[2], pattern)
                for pattern in patterns
            )
            oid = known.get("lfs", known).get("oid")
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self):
        repo, payload = self.repo(write=True), self.json()
        key, objects, host = f"{self.args['kind']}/{self.repo_id()}", [], self.base()
        held = sum(path.stat().st_size for path in (repo.folder / "lfs").iterdir()) if self.hub.quota else 0
        for item in payload["objects"]:
            oid, size = item["oid"], item["size"]
            found = {"oid": oid, "size": size}
            if not repo.has_lfs(oid, size):
                if self.hub.quota and held + size > self.hub.quota:
                    objects.append(
                        {**found, "error": {"code": 403, "message": "Private repository storage limit reached"}}
                    )
                    continue
                header = {}
                href = f"{host}/_lfs/{key}/{oid}"
                if "multipart" in payload["transfers"] and size > self.hub.multipart_above:
                    header = {"chunk_size": str(self.hub.part_size)}
                    for number in range(1, -(-size // self.hub.part_size) + 1):
                        header[f"{number:05d}"] = f"{host}/_lfs/{key}/{oid}/{number}"
                    href = f"{host}/_lfs/{key}/{oid}/complete"
                verify = {"href": f"{host}/{key}.git/info/lfs/objects/verify"}
                found["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def store_lfs(self, repo: Repo, oid: str, chunks) -> None:
        temporary = repo.folder / "parts" / uuid.uuid4().hex
        digest = hashlib.sha256()
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != oid:
                raise ApiError(400, "the content does not have the announced SHA-256")
            os.replace(temporary, repo.folder / "lfs" / oid)
        finally:
            temporary.unlink(missing_ok=True)

    # Uploads go to signed addresses, so these take no token, as on the Hub's storage.
    @route("PUT", "/_lfs/{repo}/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self):
        repo = self.hub.repos[f"{self.args['kind']}/{self.repo_id()}"]
        self.entry["oid"] = self.args["oid"]
        self.store_lfs(repo, self.args["oid"], self.chunks())
        self.answer(body=b"")

    @route("PUT", r"/_lfs/{repo}/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)")
    def lfs_part(self):
        repo = self.hub.repos[f"{self.args['kind']}/{self.repo_id()}"]
        self.entry["oid"] = self.args["oid"]
        temporary, digest = repo.folder / "parts" / uuid.uuid4().hex, hashlib.md5()
        with open(temporary, "wb") as file:
            for chunk in self.chunks():
                digest.update(chunk)
                file.write(chunk)
        os.replace(temporary, repo.folder / "parts" / f"{self.args['oid']}-{self.args['part']}")
        self.answer(body=b"", headers={"ETag": f'"{digest.hexdigest()}"'})

    @route("POST", "/_lfs/{repo}/(?P<oid>[0-9a-f]{64})/complete")
    def lfs_complete(self):
        repo, payload = self.hub.repos[f"{self.args['kind']}/{self.repo_id()}"], self.json()
        self.entry["oid"] = self.args["oid"]
        parts = [repo.folder / "parts" / f"{self.args['oid']}-{part['partNumber']}" for part in payload["parts"]]
        if not all(part.is_file() for part in parts):
            raise ApiError(400, "a part is missing")

        def chunks():
            for part in parts:
                with open(part, "rb") as file:
                    yield from iter(lambda file=file: file.read(CHUNK), b"")

        self.store_lfs(repo, self.args["oid"], chunks())
        for part in parts:
            part.unlink()
        self.answer({})

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def lfs_verify(self):
        repo, payload = self.repo(write=True), self.json()
        self.entry["oid"] = payload["oid"]
        if not repo.has_lfs(payload["oid"], payload["size"]):
            raise ApiError(404, "the object was not uploaded")
        self.answer({})

    @route("GET", "/api/{repo}/lfs-files")
    def lfs_files(self):
        repo, found = self.repo(write=True), {}
        for ref, head in repo.state["refs"].items():
            for oid, record in repo.history(head):
                for path, entry in record["tree"].items():
                    if "lfs" in entry and (repo.folder / "lfs" / entry["lfs"]["oid"]).is_file():
                        found.setdefault(entry["lfs"]["oid"], (path, ref, oid, record["date"]))
        for path in sorted((repo.folder / "lfs").iterdir()):
            found.setdefault(path.name, (None, None, None, time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())))
        self.answer(
            [
                {
                    "fileOid": oid,
                    "oid": oid,
                    "filename": path,
                    "ref": ref and ref.removeprefix("refs/heads/"),
                    "size": (repo.folder / "lfs" / oid).stat().st_size,
                    "pushedAt": date,
                }
                for oid, (path, ref, _, date) in found.items()
            ]
        )

    @route("POST", "/api/{repo}/lfs-files/batch")
    def lfs_files_batch(self):
        repo = self.repo(write=True)
        for oid in self.json()["deletions"]["sha"]:
            (repo.folder / "lfs" / oid).unlink(missing_ok=True)
        self.answer({})

    @route("POST", "/api/{repo}/commit/{rev}")
    def commit(self):
        creates_pr = bool(self.query.get("create_pr"))
        repo, account = self.repo(write=not creates_pr), self.account()
        if account is None:
            raise ApiError(401, "Invalid username or password.")
        header, operations = {}, []
        for line in self.body().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                content = value["content"]
                data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                operations.append(("file", value["path"], data))
            elif item["key"] == "lfsFile":
                operations.append(("lfsFile", value["path"], (value["oid"], value.get("size"))))
            else:
                operations.append((item["key"], value["path"], None))
        title, message = header.get("summary", ""), header.get("description", "")
        with repo.lock:
            rev = self.args["rev"]
            head = repo.resolve(rev)
            parent = header.get("parentCommit") or head
            if parent != head and not creates_pr:
                raise ApiError(412, "A commit has happened since. Please refresh and try again.")
            # Deletions first: a file deleted and added in one commit ends up there, as with git.
            operations.sort(key=lambda operation: not operation[0].startswith("deleted"))
            oid = repo.commit(operations, repo.resolve(parent), title, message, account["user"])
            url = f"{self.base()}/{self.args['kind']}/{self.repo_id()}"
            answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
            if creates_pr:
                number = self.open_discussion(repo, title, message, True, rev)
                repo.set_ref(f"refs/pr/{number}", oid)
                answer["pullRequestUrl"] = f"{url}/discussions/{number}"
            elif rev in repo.state["refs"] or f"refs/heads/{rev}" in repo.state["refs"]:
                repo.set_ref(rev if rev in repo.state["refs"] else f"refs/heads/{rev}", oid)
            else:
                raise ApiError(400, f"{rev} is not a branch")
        self.entry["oid"] = oid
        self.entry["files"] = len(operations)
        self.answer(answer)

    # -- discussions and pull requests ---------------------------------------------------------------------------------

    def open_discussion(self, repo: Repo, title: str, description: str, pull_request: bool, base: str = "main") -> int:
        number = len(repo.state["pulls"]) + 1
        repo.state["pulls"][str(number)] = {
            "num": number,
            "title": title,
            "description": description,
            "isPullRequest": pull_request,
            "status": "draft" if pull_request and not description else "open",
            "author": {"name": self.account()["user"]},
            "createdAt": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            "repo": {"name": self.repo_id(), "type": TYPES[self.args["kind"]]},
            "base": base if base.startswith("refs/") else f"refs/heads/{base}",
        }
        repo.save()
        return number

    @route("*", "/api/{repo}/discussions")
    def discussions(self):
        repo = self.repo()
        if self.command == "POST":
            payload = self.json()
            with repo.lock:
                pull_request = bool(payload.get("pullRequest"))
                number = self.open_discussion(repo, payload["title"], payload["description"], pull_request)
                if pull_request:
                    repo.state["pulls"][str(number)]["status"] = "draft"
                    repo.set_ref(f"refs/pr/{number}", repo.resolve("main"))
            return self.answer({"num": number})
        found = list(repo.state["pulls"].values())
        if self.query.get("type"):
            found = [d for d in found if d["isPullRequest"] == (self.query["type"] == "pull_request")]
        if self.query.get("status"):
            closed = self.query["status"] == "closed"
            found = [d for d in found if (d["status"] in ("closed", "merged")) == closed]
        self.answer({"count": len(found), "start": 0, "discussions": found})

    def discussion(self) -> tuple[Repo, dict]:
        repo = self.repo()
        if self.args["number"] not in repo.state["pulls"]:
            raise ApiError(404, "Discussion not found")
        return repo, repo.state["pulls"][self.args["number"]]

    def event(self, kind: str, data: dict) -> dict:
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        return {"id": uuid.uuid4().hex, "type": kind, "createdAt": now, "author": {"name": "alice"}, "data": data}

    @route("GET", r"/api/{repo}/discussions/(?P<number>\d+)")
    def discussion_details(self):
        _, found = self.discussion()
        changes = {"base": found["base"], "mergeCommitId": found.get("merged")}
        self.answer({**found, "changes": changes, "filesWithConflicts": [], "events": [], "diff": ""})

    @route("POST", r"/api/{repo}/discussions/(?P<number>\d+)/status")
    def discussion_status(self):
        repo, found = self.discussion()
        found["status"] = self.json()["status"]
        repo.save()
        self.answer({"newStatus": self.event("status-change", {"status": found["status"]})})

    @route("POST", r"/api/{repo}/discussions/(?P<number>\d+)/merge")
    def merge(self):
        repo, found = self.discussion()
        self.repo(write=True)
        with repo.lock:
            if found["status"] != "open":
                raise ApiError(400, f"this pull request is {found['status']}")
            head, base = repo.state["refs"][f"refs/pr/{self.args['number']}"], found["base"]
            root = next(o for o, _ in repo.history(head) if o in dict(repo.history(repo.state["refs"][base])))
            before, after, tree = repo.tree(root), repo.tree(head), dict(repo.tree(repo.state["refs"][base]))
            for path in before.keys() | after.keys():
                if before.get(path) != after.get(path):
                    if tree.get(path) != before.get(path):
                        raise ApiError(409, "there are conflicts")
                    tree.pop(path, None)
                    if path in after:
                        tree[path] = after[path]
            oid = repo.commit([], repo.state["refs"][base], found["title"], "", self.account()["user"])
            record = repo.read_commit(oid)
            record["tree"] = dict(sorted(tree.items()))
            write_json(repo.folder / "commits" / oid, record)
            found |= {"status": "merged", "merged": oid}
            repo.set_ref(base, oid)
        self.answer({})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    Handler.hub = Hub(args.root)
    server = Server(("127.0.0.1", args.port), Handler)
    print(server.server_address[1], flush=True)
    # The parent holds our standard input: when it is gone, so are we.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


# -- the tests' side -----------------------------------------------------------------------------------------------------


class HubServer:
    """Starts the server in its own process and speaks to its control routes. A context manager."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.endpoint = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exc) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()

    def call(self, method: str, what: str, value=None):
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{self.endpoint}/_test/{what}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def set_faults(self, *faults: Fault) -> None:
        self.call("PUT", "faults", [vars(fault) for fault in faults])

    def pending_faults(self) -> int:
        return sum(fault["count"] for fault in self.call("GET", "faults"))

    def settings(self, **values) -> None:
        self.call("PUT", "settings", values)

    def log(self, route: str | None = None) -> list[dict]:
        return [entry for entry in self.call("GET", "log") if route in (None, entry.get("route"))]

    def clear_log(self) -> None:
        self.call("DELETE", "log")

    def env(self, token: str | None = "hf_alice_write", home: str | os.PathLike | None = None) -> dict[str, str]:
        """The environment of a client of this server: documented variables of `huggingface_hub` only."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home or self.root.parent / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token:
            env["HF_TOKEN"] = token
        return env

    def tree(self, repo_id: str, revision: str = "main") -> dict[str, str]:
        """path -> SHA-256 (LFS files) or git object id, read from the disk rather than through a client."""
        folder = self.root / "datasets" / repo_id
        refs = json.loads((folder / "repo.json").read_text())["refs"]
        head = refs[revision if revision in refs else f"refs/heads/{revision}"]
        tree = json.loads((folder / "commits" / head).read_text())["tree"]
        return {path: entry.get("lfs", entry)["oid"] for path, entry in tree.items()}

    def refs(self, repo_id: str) -> dict[str, str]:
        return json.loads((self.root / "datasets" / repo_id / "repo.json").read_text())["refs"]

    def exists(self, repo_id: str) -> bool:
        return (self.root / "datasets" / repo_id / "repo.json").is_file()

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        oid = self.tree(repo_id, revision)[path]
        folder = self.root / "datasets" / repo_id
        return (folder / ("lfs" if len(oid) == 64 else "blobs") / oid).read_bytes()


_serial = itertools.count()


class ClientError(AssertionError):
    pass


class Client:
    """A warm process that has imported the libraries with this server's environment, and forks for every script.

    The endpoint of `huggingface_hub` and `datasets` is read when they are imported, so a client of the server is another
    process; importing takes seconds, forking milliseconds.
    """

    def __init__(self, env: dict[str, str], folder: Path, imports: str = "datasets, huggingface_hub"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path[:1]]!r}; import {imports}; "
        code += "import hub_server; hub_server.fork_scripts()"
        root = str(Path(__file__).parent.parent)
        env = {**env, "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def start(self, script: str, env: dict[str, str] | None = None) -> "Script":
        output = self.folder / f"script-{os.getpid()}-{next(_serial)}"
        self.process.stdin.write(json.dumps({"script": script, "output": str(output), "env": env or {}}) + "\n")
        self.process.stdin.flush()
        # Statuses of scripts that nobody waited for come first.
        _, number = next(line.split() for line in self.process.stdout if line.startswith("pid"))
        return Script(int(number), output, self)

    def run(self, script: str, env: dict[str, str] | None = None, check: bool = True):
        """Runs `script`; returns what it assigned to the variable `result` (anything JSON has)."""
        return self.start(script, env).result(check)


@dataclass
class Script:
    pid: int
    output: Path
    client: Client
    status: int | None = None

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        if self.status is None:
            self.status = int(self.client.process.stdout.readline().removeprefix("status "))
        return self.status

    @property
    def text(self) -> str:
        return self.output.read_text()

    def kill_group(self, signal: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal)

    def result(self, check: bool = True):
        status = self.wait()
        if check and status != 0:
            raise ClientError(f"exit status {status}\n{self.text}")
        path = self.output.with_suffix(".json")
        return json.loads(path.read_text()) if path.exists() else None


def fork_scripts() -> None:
    """The loop of a `Client`'s process: one script a line; prints the child's id, then its exit status."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            with open(job["output"], "wb", buffering=0) as output, open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.environ.update(job["env"])
            status = 1
            try:
                names = {"__name__": "__script__"}
                exec(compile(job["script"], "script", "exec"), names)
                if "result" in names:
                    Path(job["output"]).with_suffix(".json").write_text(json.dumps(names["result"]))
                status = 0
            except SystemExit as error:
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        print("pid", pid, flush=True)
        print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
