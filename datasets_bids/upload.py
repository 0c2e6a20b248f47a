"""Where a dataset goes: a repository of the Hub.

How it works:

- A shard is a task of its own (`push_shard`): embed it into a temporary Parquet file, upload that (content-addressed, so nothing
  refers to it yet), write down its SHA-256, delete the file. Tasks go through any `concurrent.futures.Executor`; each may
  run twice, or on another machine, with the same outcome.
- The **coordinator** (caller's thread) hands out tasks, collects their records, and every few minutes commits what was uploaded
  to a **working branch**, with the plan and the records beside it in one JSON file. The Hub forgets uploads that no commit
  refers to within a day; a push may take a week.
- When all shards are there, **one commit** on the target adds them (by SHA-256: no byte moves), deletes the shards of the former
  state and writes the card. It names its parent, so that whoever else committed meanwhile makes it start over from their state.
  Until then the former state loads, from then on the new one.
- Started again, a push asks three places for records whose sources (values, paths, sizes, times) are still the same: the
  working branch, the target, and the working directory on disk, where tasks leave a record before they delete a file.
- After the commit, the listing is compared with the records and the first and last example are read back. Only then the
  working branch and the working directory go.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from filelock import FileLock, Timeout
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    HfFileSystem,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, http_backoff

from . import __version__
from .card import update_card
from .embed import write_shard
from .hub import PushPlan, dataset_info, fingerprint, plan_push, size
from .shards import Shard, embedded_nbytes
from .storage import remember, remembered


# A working-branch commit is made when so many shards were uploaded since the last one, or after so many seconds: far below
# the Hub's limit (about 320 commits an hour), far above what an upload without a commit is kept for (a day).
COMMIT_SHARDS = 100
COMMIT_SECONDS = 300.0

# Seconds a request is tried again for, on top of the client library's own retries (half a minute): longer than a
# deployment of the Hub or a rate limit's window (5 minutes) takes.
PATIENCE = 30 * 60.0
FIRST_WAIT, LAST_WAIT = 1.0, 60.0  # seconds between tries, doubling

# Seconds without a byte after which a connection counts as dead. The client library waits forever, for example on a connection
# that did not survive a laptop's sleep. The Hub may take a minute to answer for a large shard.
TIMEOUT = 180.0

# A shard whose worker died so often is not tried again: it is probably what kills the worker (out of memory).
MAX_DEATHS = 3

READ_NBYTES = (
    8 * 1024**2
)  # bytes of one request when an example is read back: a whole volume would be held three times

TICK = 0.5  # seconds between two looks at the tasks
LINE_SECONDS = 60.0  # between two lines of progress where there is no terminal

_PLAN_FILE = ".datasets-bids/push.json"  # on the working branch only

# Held while a shard is embedded: one at a time in a process, so that memory is one row's, while another thread uploads the
# one before. Processes of a local pool share a semaphore instead.
_EMBEDDING: Any = threading.Lock()

# Set when the coordinator gave up, so that threads in the middle of their patience do too.
_STOP = threading.Event()

_TRANSIENT_STATUS = {408, 409, 412, 425, 429}  # and every 5xx
# httpx in huggingface_hub 1, httpx2 in huggingface_hub 2
_HTTPError = HfHubHTTPError.__bases__[0]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class PushError(OSError):
    """A push that cannot go on, in one line that says what to do."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Record:
    """A shard that the Hub holds: its path in the repository, what it was made from, and what it is."""

    path: str
    source: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Target:
    """Where a push goes."""

    repo_id: str
    revision: str = "main"
    create_pr: bool = False
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def api(self) -> HfApi:
        return HfApi(
            endpoint=self.endpoint, token=self.token, library_name="datasets-bids", library_version=__version__
        )


# -- patience ------------------------------------------------------------------------------------------------------------


def patiently(call: Callable[[], T], what: str, patience: float | None = None) -> T:
    """Calls until it works, for at most `patience` seconds (default: PATIENCE).

    Args:
        call: a request, or several that start over together; it must be idempotent
        what (`str`): what it is for, in messages

    Raises:
        PushError: the Hub refuses for good (a status no retry mends), or did not answer all this time
    """
    patience = PATIENCE if patience is None else patience
    start, wait = time.monotonic(), FIRST_WAIT
    while True:
        get_session().timeout = TIMEOUT
        try:
            return call()
        except Exception as error:
            verdict = _judge(error)
            if verdict is None:
                raise
            reason, status, transient, pause = verdict
            if not transient:
                raise PushError(f"{what}: {reason}", status) from None
            wait_now = max(wait, pause or 0)
            if time.monotonic() - start + wait_now > patience:
                message = f"{what}: {reason}; gave up after {time.monotonic() - start:.0f} s. The same command goes on from here"
                raise PushError(message, status) from None
            logger.warning(f"{what}: {reason}; trying again in {wait_now:.0f} s")
        if _STOP.wait(wait_now):
            raise PushError(f"{what}: stopped")
        wait = min(wait * 2, LAST_WAIT)


def _judge(error: BaseException) -> tuple[str, int | None, bool, float | None] | None:
    """(reason in one line, HTTP status, whether to try again, seconds the Hub asks to wait), or None: not about the Hub."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, LocalTokenNotFoundError):
            return "there is no Hub token; run `hf auth login` or set HF_TOKEN", 401, False, None
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            message = (link.server_message or "").strip() or link.response.reason_phrase
            after = link.response.headers.get("Retry-After", "")
            transient = status in _TRANSIENT_STATUS or status >= 500
            return _one_line(f"{status} {message}"), status, transient, float(after) if after.isdigit() else None
        if isinstance(link, _HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError):
            return _one_line(f"{type(link).__name__} {link}"), None, True, None
        link = link.__cause__ or link.__context__
    if isinstance(error, ValueError) and "LFS batch API" in str(error):  # quota, for one
        return _one_line(str(error)), None, False, None
    if type(error) is RuntimeError:  # what hf_xet raises, after retries of its own
        return _one_line(str(error)), None, True, None
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- one shard -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """All that `push_shard` needs, on whatever machine."""

    dataset: datasets.Dataset = field(repr=False)  # the rows of this shard alone, as paths
    shard: Shard  # within `dataset`
    first_row: int  # of the split
    path: str
    source: str
    target: Target
    branch: str
    work_dir: str
    embed: bool
    patience: float
    storage_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # of remote sources

    @property
    def stem(self) -> str:
        return f"{self.path.replace('/', '--').removesuffix('.parquet')}-{self.source}"

    @property
    def parquet(self) -> Path:
        return Path(self.work_dir, "shards", f"{self.stem}.parquet")

    @property
    def record(self) -> Path:
        return Path(self.work_dir, "records", f"{self.stem}.json")


def push_shard(task: ShardTask) -> Record:
    """Embeds and uploads a shard. Goes on with what an earlier call left: a record, or a whole Parquet file."""
    for root, options in task.storage_options.items():
        remember(root, options)
    if task.record.exists():
        return Record(**json.loads(task.record.read_text()))
    if not task.parquet.exists():
        with _EMBEDDING:
            embed_shard(task, task.parquet)
    addition = CommitOperationAdd(task.path, str(task.parquet))
    info = addition.upload_info
    record = Record(task.path, task.source, info.sha256.hex(), info.size)

    def upload():
        addition = CommitOperationAdd(task.path, str(task.parquet))
        addition.upload_info = info  # hashed once
        task.target.api.preupload_lfs_files(
            task.target.repo_id, [addition], repo_type="dataset", revision=task.branch, num_threads=1
        )
        if addition.path_or_fileobj:  # set to b"" once it is uploaded
            raise PushError(
                f"{task.target.repo_id} keeps Parquet files out of LFS: add the line '*.parquet filter=lfs diff=lfs merge=lfs "
                "-text' to its .gitattributes"
            )

    patiently(upload, f"uploading {task.path}", task.patience)
    # The record is there before the file goes: no moment at which a killed push has neither.
    _write_json(task.record, asdict(record))
    task.parquet.unlink(missing_ok=True)
    return record


def embed_shard(task: ShardTask, path: Path) -> None:
    """Writes the shard under a temporary name and renames it, so that a file of its own name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        if task.embed:
            write_shard(task.dataset, task.shard, str(temporary))
        else:
            pq.write_table(task.dataset.with_format("arrow")[:], temporary)
        os.replace(temporary, path)
    except ValueError as error:
        raise ValueError(f"{error} (rows count from row {task.first_row} of {task.path.split('/')[-1]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _uploaded(record: Record) -> CommitOperationAdd:
    """The operation that commits a file which the Hub already holds, as `upload_large_folder` makes it."""
    addition = CommitOperationAdd(record.path, b"")
    addition.upload_info = UploadInfo(size=record.size, sample=b"", sha256=bytes.fromhex(record.sha256))
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = "lfs", True, False
    return addition


# -- workers -------------------------------------------------------------------------------------------------------------


class Workers:
    """An executor that outlives the death of a worker, and how many tasks it should hold."""

    def __init__(self, num_proc: int = 1, executor: concurrent.futures.Executor | None = None):
        self.num_proc, self.given = num_proc, executor
        _STOP.clear()
        self.executor = executor or self._open()

    def _open(self) -> concurrent.futures.Executor:
        if self.num_proc == 1:
            return concurrent.futures.ThreadPoolExecutor(self._tasks, thread_name_prefix="push-shard")
        # Spawned, since a fork of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        embedding = context.Semaphore(self.num_proc)
        return concurrent.futures.ProcessPoolExecutor(self._tasks, context, _start_worker, (embedding,))

    @property
    def _tasks(self) -> int:
        """Of `num_proc` workers each embeds a shard and uploads the one before; but not more than two shards wait on disk."""
        return min(2 * self.num_proc, self.num_proc + 2)

    @property
    def width(self) -> int:
        """Tasks in flight. A worker's disk holds one shard for each task it runs."""
        if hasattr(self.given, "_client"):  # distributed: workers come and go
            return sum(self.given._client.nthreads().values()) + 1
        return getattr(self.executor, "_max_workers", None) or self.num_proc

    def restart(self) -> None:
        if self.given is not None:
            raise PushError("the executor broke; start the same command again to go on")
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.executor = self._open()

    def close(self, failed: bool) -> None:
        if failed:
            _STOP.set()
        if self.given is None:
            if failed:  # they have a patience of their own
                for process in list((getattr(self.executor, "_processes", None) or {}).values()):
                    process.terminate()
            self.executor.shutdown(wait=not failed, cancel_futures=True)


def _result(future: concurrent.futures.Future, task: ShardTask) -> Record:
    """What the task returned; what became of its worker in the words of this module."""
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise PushError("the executor dropped its tasks; start the same command again to go on") from None
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # distributed's, after several workers died of the task
            raise _deadly(task, task.shard.nbytes) from None
        raise


def _deadly(task: ShardTask, nbytes: int) -> PushError:
    return PushError(
        f"workers died again and again while {task.path} ({size(nbytes)}) was in work; they may have run out of memory: give "
        "them more, or use fewer at a time"
    )


def _start_worker(embedding: Any) -> None:
    """In a worker process: shares the semaphore, and dies with the push, which must not leave workers that go on uploading."""
    global _EMBEDDING
    _EMBEDDING = embedding

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def dask_executor(address: str) -> Iterator[concurrent.futures.Executor]:
    """An executor on an existing Dask cluster.

    Raises:
        ImportError: `distributed` is not installed
        PushError: there is no scheduler at the address
    """
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--dask needs distributed: pip install 'datasets-bids[dask]'") from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PushError(f"there is no Dask scheduler at {address}: {_one_line(str(error))}") from None
    with client:
        # pure=False: a task has effects, so two equal ones are two.
        yield client.get_executor(pure=False)


# -- progress ------------------------------------------------------------------------------------------------------------


class Progress:
    """One line: bytes embedded, bytes uploaded, shards done, time left."""

    def __init__(self, total: int, shards: int, done: int, shards_done: int):
        self.total, self.shards, self.uploaded, self.shards_done = total, shards, done, shards_done
        self.start, self.first, self.last = time.monotonic(), done, 0.0
        self.terminal = sys.stderr.isatty()
        self.quiet = datasets.utils.are_progress_bars_disabled()

    def show(self, in_work: int, finish: bool = False) -> None:
        now = time.monotonic()
        if self.quiet or not finish and now - self.last < (TICK if self.terminal else LINE_SECONDS):
            return
        self.last = now
        embedded = min(self.total, self.uploaded + in_work)
        rate = (self.uploaded - self.first) / max(now - self.start, 1e-9)
        left = f", {_duration((self.total - self.uploaded) / rate)} left" if rate and not finish else ""
        line = (
            f"embedded {size(embedded)} and uploaded {size(self.uploaded)} of {size(self.total)}, "
            f"{self.shards_done} of {self.shards} shards{left}"
        )
        end = "\n" if finish or not self.terminal else ""
        print(f"\r{line:<100}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"


# -- the push ------------------------------------------------------------------------------------------------------------


class HubPush:
    """A push of one plan to one target.

    Args:
        plan (`PushPlan`): what to write
        target (`Target`): where
        card (`DatasetCard`): the builder's card
        options (`dict`): what the plan was made with; a push that is gone on with must have the same
        private (`bool`, *optional*): of a repository that is created
        private_because (`str`, *optional*): why the dataset may not be in a public repository
        work_dir (`str` or `os.PathLike`, *optional*): for temporary files; by default in `datasets`' cache
    """

    def __init__(
        self,
        plan: PushPlan,
        target: Target,
        card: DatasetCard,
        *,
        options: Mapping[str, Any] | None = None,
        private: bool | None = None,
        private_because: str | None = None,
        embed: bool = True,
        work_dir: str | os.PathLike | None = None,
        commit_message: str | None = None,
    ):
        self.plan, self.target, self.card, self.embed = plan, target, card, embed
        self.private, self.private_because = private, private_because
        self.api = target.api
        name = re.sub(r"[^\w.-]", "-", plan.config_name)
        self.branch = f"datasets-bids-push-{name}"
        if target.revision != "main":
            self.branch += "-" + re.sub(r"[^\w.-]", "-", target.revision)
        key = hashlib.sha256(f"{self.api.endpoint} {target.repo_id} {self.branch}".encode()).hexdigest()[:8]
        folder = Path(
            datasets.config.HF_CACHE_HOME, "datasets-bids", f"{target.repo_id.replace('/', '--')}-{name}-{key}"
        )
        self.work_dir = Path(work_dir) / folder.name if work_dir else folder
        self.message = commit_message or f"Upload {plan.config_name}"
        features = next(iter(plan.splits.values())).features
        self.identity = {
            "config": plan.config_name,
            "revision": target.revision,
            "create_pr": target.create_pr,
            **(options or {}),
            "rows": {split: len(dataset) for split, dataset in plan.splits.items()},
            "columns": hashlib.sha256(repr(features).encode()).hexdigest()[:16],
        }
        self.created_repo = False
        self.records: dict[str, Record] = {}
        self.committed: set[str] = set()  # paths that a commit on the working branch or the target refers to

    # -- before a byte moves

    def check_access(self) -> bool:
        """Whether the repository exists. Nothing is written.

        Raises:
            PushError: no token, no write access, or a public repository for what may not be public
        """
        self.api = self.target.api
        who = patiently(self.api.whoami, "checking the token")
        repo_id = self.target.repo_id
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PushError(f"the Hub token of {who['name']} may only read; make one that may write", 403)
        try:
            info = patiently(lambda: self._repo_info(), f"looking for {repo_id}")
        except PushError as error:
            if error.status not in (401, 404):
                raise
            namespace = repo_id.split("/")[0]
            orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
            if namespace != who["name"] and orgs.get(namespace) in (None, "read"):
                raise PushError(
                    f"{who['name']} has no write access to {namespace}, and there is no dataset {repo_id} to be seen",
                    403,
                ) from None
            if self.private_because and not self.private:
                raise PushError(f"{repo_id} must be private (--private): {self.private_because}") from None
            return False
        patiently(
            lambda: self.api.auth_check(repo_id, repo_type="dataset", write=True),
            f"checking write access to {repo_id}",
        )
        if not info.private and (self.private_because or self.private):
            reason = self.private_because or "--private was asked for"
            raise PushError(f"{repo_id} is public, and must be private: {reason}")
        return True

    def will_be_public(self) -> bool:
        """Whether everyone will see what is pushed. Nothing is written.

        Raises:
            PushError: see `check_access`
        """
        if not self.check_access():
            return not self.private
        return not patiently(self._repo_info, f"looking for {self.target.repo_id}").private

    def _repo_info(self, revision: str | None = None):
        return self.api.repo_info(self.target.repo_id, repo_type="dataset", revision=revision, timeout=TIMEOUT)

    def _head(self, revision: str) -> str | None:
        """The commit at the head of a revision, None if there is no such revision."""
        try:
            return self._repo_info(revision).sha
        except RevisionNotFoundError:
            return None

    def _listing(self, commit: str) -> dict[str, Any]:
        tree = self.api.list_repo_tree(self.target.repo_id, repo_type="dataset", recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if hasattr(entry, "size")}

    def _read(self, path: str, commit: str) -> bytes | None:
        url = hf_hub_url(self.target.repo_id, path, repo_type="dataset", revision=commit, endpoint=self.api.endpoint)
        response = http_backoff("GET", url, headers=build_hf_headers(token=self.target.token))
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError:
            return None
        return response.content

    def _existing_card(self, commit: str) -> DatasetCard | None:
        content = self._read("README.md", commit)
        if content is None:
            return None
        try:
            return DatasetCard(content.decode(), ignore_metadata_errors=False)
        except ValueError as error:
            raise PushError(
                f"the YAML header of README.md in {self.target.repo_id} cannot be read: {_one_line(str(error))}; mend it first"
            ) from None

    # -- what is there already

    def _state(self) -> dict | None:
        """What the working branch says of an unfinished push, None without one."""
        try:
            head = self._head(self.branch)
        except RepositoryNotFoundError:
            return None
        content = head and self._read(_PLAN_FILE, head)
        return json.loads(content) if content else None

    def _adopt(self, state: dict) -> None:
        """Takes over an unfinished push's plan, or says why not."""
        if state["identity"] != self.identity:
            before = state["identity"]
            keys = [key for key in before.keys() | self.identity.keys() if before.get(key) != self.identity.get(key)]
            difference = "; ".join(
                f"{key} was {before.get(key)}, now {self.identity.get(key)}" for key in sorted(keys)
            )
            raise PushError(
                f"{self.target.repo_id} has an unfinished push with another plan ({difference}). Go on with that plan, or drop "
                "it with --abort"
            )
        self.created_repo = state["created_repo"]
        shards = {}
        for split, dataset in self.plan.splits.items():
            # A file that grew must not move the bounds of all shards after its own.
            stops = state["stops"][split]
            planned = self.plan.shards[split]
            if [shard.stop for shard in planned] != stops:
                nbytes = embedded_nbytes(dataset)
                bounds = zip([0, *stops[:-1]], stops, strict=True)
                planned = [Shard(i, len(stops), a, b, int(nbytes[a:b].sum())) for i, (a, b) in enumerate(bounds)]
            shards[split] = planned
        self.plan = replace(self.plan, shards=shards)

    def _recognise(self, state: dict | None, listings: list[dict[str, Any]]) -> None:
        """Fills `records` with what the Hub holds of the present sources."""
        sources = self.sources = {
            path: fingerprint(self.plan.splits[split], shard) + ("" if self.embed else "-paths")
            for path, (split, shard) in self.shards.items()
        }
        known = [Record(**record) for record in (state or {}).get("records", [])]
        done = self.work_dir / "done.json"
        if done.exists():
            known += [Record(**record) for record in json.loads(done.read_text())]
        local = {}
        for path in (self.work_dir / "records").glob("*.json"):
            record = Record(**json.loads(path.read_text()))
            local[record.path, record.source] = record
        known += local.values()
        for record in known:
            if sources.get(record.path) != record.source:
                continue
            entries = [listing.get(record.path) for listing in listings]
            if any(entry is not None and entry.lfs and entry.lfs.sha256 == record.sha256 for entry in entries):
                self.committed.add(record.path)
            elif (record.path, record.source) not in local:
                continue  # committed once, and gone since
            self.records[record.path] = record

    @property
    def shards(self) -> dict[str, tuple[str, Shard]]:
        """Path in the repository -> split and shard."""
        return {
            self.plan.path_in_repo(split, shard): (split, shard)
            for split, shards in self.plan.shards.items()
            for shard in shards
        }

    def task(self, path: str, split: str, shard: Shard) -> ShardTask:
        dataset = self.plan.splits[split]
        # In memory and alone: a task may run where the Arrow cache is not.
        table = dataset.with_format("arrow")[shard.start : shard.stop]
        rows = datasets.Dataset(
            datasets.table.InMemoryTable(table.combine_chunks()),
            info=datasets.DatasetInfo(features=dataset.features),
            fingerprint=self.sources[path],
        )
        return ShardTask(
            dataset=rows,
            shard=replace(shard, start=0, stop=len(rows)),
            first_row=shard.start,
            path=path,
            source=self.sources[path],
            target=self.target,
            branch=self.branch,
            work_dir=str(self.work_dir),
            embed=self.embed,
            patience=PATIENCE,
            storage_options=remembered(),
        )

    # -- the way through

    def run(self, workers: Workers) -> CommitInfo:
        """Pushes, or goes on with a push.

        Raises:
            PushError: see `patiently`; another plan's push is unfinished; the disk is full; or what stands on the Hub
                afterwards is not what was to be pushed
            ValueError: a file cannot be stored, or changed meanwhile
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work_dir / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PushError(f"the same push is running already (its files are in {self.work_dir})") from None
        with lock:
            return self._run(workers)

    def _run(self, workers: Workers) -> CommitInfo:
        self._open_repository()
        state = patiently(self._state, "reading the working branch")
        if state:
            self._adopt(state)
        listings = patiently(self._look, "listing the repository")
        self._recognise(state, listings)
        missing = self.sources.keys() - self.records.keys()
        self._check_disk(missing, workers.width)
        for leftover in (self.work_dir / "shards").glob("*"):
            if leftover.suffix == ".part" or not any(leftover.stem.endswith(f"-{s}") for s in self.sources.values()):
                leftover.unlink()
        try:
            if missing or self.records.keys() - self.committed:
                self._open_branch(state)
                self._upload(workers, missing)
        except BaseException:
            workers.close(failed=True)
            raise
        workers.close(failed=False)
        commit = patiently(self._finish, f"committing to {self.target.repo_id}")
        self.verify(commit.oid)
        self._tidy(state)
        return commit

    def _look(self) -> list[dict[str, Any]]:
        target = self._head(self.target.revision)
        self._updated_card(target or "main", [])  # a card that cannot be read is said now, not after days of uploading
        pull = self._open_pull_request() if self.target.create_pr else None
        heads = dict.fromkeys(head for head in (self._head(self.branch), target, pull) if head)
        return [self._listing(head) for head in heads]

    def _open_repository(self) -> None:
        marker = self.work_dir / "creates-repository"
        if not self.check_access():
            marker.touch()  # before, so that --abort knows even if we are killed in between
            patiently(self._create_repository, f"creating {self.target.repo_id}")
        self.created_repo = marker.exists()

    def _create_repository(self) -> None:
        try:
            self.api.create_repo(self.target.repo_id, repo_type="dataset", private=self.private)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            try:
                self._repo_info()  # the answer to the request that created it was lost
            except RepositoryNotFoundError:
                raise error from None

    def _open_branch(self, state: dict | None) -> None:
        if state is None:
            patiently(
                lambda: self.api.create_branch(
                    self.target.repo_id, branch=self.branch, repo_type="dataset", exist_ok=True
                ),
                f"creating the branch {self.branch}",
            )
            self._commit_work([])

    def _commit_work(self, records: list[Record]) -> None:
        """Commits uploads to the working branch, with all that a later start has to know."""
        committed = self.committed | {record.path for record in records}
        state = {
            "identity": self.identity,
            "created_repo": self.created_repo,
            "stops": {split: [shard.stop for shard in shards] for split, shards in self.plan.shards.items()},
            "records": [asdict(self.records[path]) for path in sorted(committed) if path in self.records],
        }

        def commit():
            operations = [_uploaded(record) for record in records]
            operations.append(CommitOperationAdd(_PLAN_FILE, json.dumps(state, indent=1).encode()))
            self.api.create_commit(
                self.target.repo_id,
                operations,
                commit_message=f"Work on {self.plan.config_name}: {len(committed)} of {len(self.sources)} shards",
                repo_type="dataset",
                revision=self.branch,
            )

        patiently(commit, f"committing to the branch {self.branch}")
        self.committed = committed

    def _upload(self, workers: Workers, missing: set[str]) -> None:
        """The coordinator: tasks out, records in, a commit to the working branch now and then."""
        shards = self.shards
        nbytes = {path: shard.nbytes for path, (_, shard) in shards.items()}
        done = sum(nbytes[path] for path in self.records)
        progress = Progress(sum(nbytes.values()), len(nbytes), done, len(self.records))
        queue = deque(path for path in shards if path in missing)
        in_flight: dict[concurrent.futures.Future, ShardTask] = {}
        deaths: Counter[str] = Counter()
        expired: Counter[str] = Counter()
        last_commit = time.monotonic()
        while queue or in_flight or self.records.keys() - self.committed:
            broken = False
            try:
                while queue and len(in_flight) < workers.width:
                    task = self.task(queue[0], *shards[queue[0]])
                    in_flight[workers.executor.submit(push_shard, task)] = task
                    queue.popleft()
            except concurrent.futures.BrokenExecutor:
                broken = True
            finished, _ = concurrent.futures.wait(in_flight, TICK, concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                try:
                    record = _result(future, in_flight[future])
                except concurrent.futures.BrokenExecutor:
                    broken = True
                    continue
                except Exception:
                    for other in in_flight:
                        other.cancel()
                    raise
                task = in_flight.pop(future)
                if not task.record.exists():  # a worker on another machine
                    _write_json(task.record, asdict(record))
                self.records[task.path] = record
                progress.uploaded += nbytes[task.path]
                progress.shards_done += 1
            if broken:
                for task in in_flight.values():
                    deaths[task.path] += 1
                    if deaths[task.path] >= MAX_DEATHS:
                        raise _deadly(task, nbytes[task.path])
                logger.warning(f"a worker died; {len(in_flight)} shards are done again")
                queue.extendleft(task.path for task in reversed(in_flight.values()))
                in_flight.clear()
                workers.restart()
            waiting = [self.records[path] for path in sorted(self.records.keys() - self.committed)]
            due = len(waiting) >= COMMIT_SHARDS or time.monotonic() - last_commit > COMMIT_SECONDS
            if waiting and (due or not (queue or in_flight)):
                try:
                    self._commit_work(waiting)
                    last_commit = time.monotonic()
                except PushError as error:
                    if error.status != 400 or "does not exist" not in str(error):
                        raise
                    # The Hub has dropped uploads that no commit referred to for too long.
                    for record in waiting:
                        expired[record.path] += 1
                        if expired[record.path] > 1:
                            raise
                        del self.records[record.path]
                        self.task(record.path, *shards[record.path]).record.unlink(missing_ok=True)
                        queue.append(record.path)
            progress.show(self._on_disk())
        progress.show(0, finish=True)

    def _on_disk(self) -> int:
        """Bytes embedded and not uploaded yet."""
        total = 0
        for path in (self.work_dir / "shards").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _check_disk(self, missing: set[str], width: int) -> None:
        sizes = sorted(shard.nbytes for path, (_, shard) in self.shards.items() if path in missing)
        needed, free = sum(sizes[-width:]), shutil.disk_usage(self.work_dir).free
        if needed > free:
            raise PushError(
                f"{self.work_dir}: {width} shards of up to {size(sizes[-1])} are on this disk at a time, and {size(free)} are "
                "free; use smaller shards, or set HF_HOME to a directory on another disk"
            )

    # -- the one commit

    def _stale(self, listing: Mapping[str, Any]) -> list[str]:
        """Shards of the splits that are pushed, from a former state."""
        prefixes = tuple(f"{self.plan.directory}/{split}-" for split in self.plan.splits)
        return sorted(path for path in listing if path.startswith(prefixes) and path not in self.sources)

    def _finish(self) -> CommitInfo:
        """The commit that makes the new state visible; started over if somebody else was first."""
        repo_id, revision = self.target.repo_id, self.target.revision
        head = self._head(revision)
        if head is None:
            self.api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
            head = self._repo_info(revision).sha
        if self.target.create_pr and (pull := self._open_pull_request()):
            if self._is_complete(self._listing(pull)):
                return self._commit_info(pull)
        listing = self._listing(head)
        operations: list = [
            _uploaded(record)
            for path, record in sorted(self.records.items())
            if not (path in listing and listing[path].lfs and listing[path].lfs.sha256 == record.sha256)
        ]
        operations += [CommitOperationDelete(path) for path in self._stale(listing)]
        card = self._updated_card(head, list(self.records.values())).encode()
        if operations or self._read("README.md", head) != card:
            operations.append(CommitOperationAdd("README.md", card))
            return self.api.create_commit(
                repo_id,
                operations,
                commit_message=self.message,
                commit_description=self._marker(),
                repo_type="dataset",
                revision=revision,
                parent_commit=head,
                create_pr=self.target.create_pr,
            )
        return self._commit_info(head)

    def _commit_info(self, oid: str) -> CommitInfo:
        url = f"{self.api.endpoint}/datasets/{self.target.repo_id}/commit/{oid}"
        return CommitInfo(commit_url=url, commit_message=self.message, commit_description="", oid=oid)

    def _is_complete(self, listing: Mapping[str, Any]) -> bool:
        return not self._differences(listing)

    def _marker(self) -> str:
        """Tells a pull request of this very push, whose answer may have been lost."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        return f"Pushed with datasets-bids ({digest})."

    def _open_pull_request(self) -> str | None:
        """The head of an open pull request with this push's commit, None without one."""
        found = self.api.get_repo_discussions(
            self.target.repo_id, repo_type="dataset", discussion_type="pull_request", discussion_status="open"
        )
        for pull in found:
            if pull.title == self.message:
                commits = self.api.list_repo_commits(
                    self.target.repo_id, repo_type="dataset", revision=f"refs/pr/{pull.num}"
                )
                if any(commit.message.strip() == self._marker() for commit in commits[:1]):
                    return self._head(f"refs/pr/{pull.num}")
        return None

    def _updated_card(self, head: str, records: list[Record]) -> str:
        """The card that is at `head`, or else the builder's, with this push's splits in it."""
        existing = self._existing_card(head)
        info = dataset_info(self.plan, sum(record.size for record in records))
        data_files = self.plan.data_files()
        if existing is not None:
            configs = MetadataConfigs.from_dataset_card_data(existing.data).get(self.plan.config_name, {})
            former = DatasetInfosDict.from_dataset_card_data(existing.data).get(self.plan.config_name)
            others = [entry for entry in configs.get("data_files") or [] if isinstance(entry, dict)]
            data_files = {entry["split"]: entry["path"] for entry in others} | data_files
            if former is not None:
                for split, split_info in (former.splits or {}).items():
                    if split not in info.splits and split in data_files:
                        if former.features and former.features != info.features:
                            raise PushError(
                                f"split {split} of config {self.plan.config_name} in {self.target.repo_id} has other columns than this "
                                "push; push both, or choose another config name"
                            )
                        info.splits[split] = split_info
                        info.dataset_size += split_info.num_bytes
        return str(update_card(self.card, existing, info, data_files))

    # -- afterwards

    def _differences(self, listing: Mapping[str, Any]) -> list[str]:
        wrong = [f"{path} is left of a former state" for path in self._stale(listing)]
        for path in self.sources:
            entry, record = listing.get(path), self.records[path]
            if entry is None:
                wrong.append(f"{path} is missing")
            elif entry.lfs is None or entry.lfs.sha256 != record.sha256 or entry.size != record.size:
                wrong.append(f"{path} is another file")
        return wrong

    def verify(self, revision: str) -> None:
        """Compares the repository at `revision` with the records, and reads the first and last example back.

        Raises:
            PushError: names what is different
        """
        repo_id = self.target.repo_id
        wrong = self._differences(patiently(lambda: self._listing(revision), f"listing {repo_id}"))
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise PushError(f"{repo_id} is not what was pushed: {'; '.join(wrong[:3])}{more}")
        for split, dataset in self.plan.splits.items():
            if len(dataset) == 0:
                continue
            shards = self.plan.shards[split]
            for shard, row in ((shards[0], 0), (shards[-1], len(dataset) - 1)):
                path = self.plan.path_in_repo(split, shard)
                with self._local_example(dataset, row) as example:
                    remote = patiently(
                        lambda path=path, last=row > 0: self._read_example(path, revision, last),
                        f"reading {path} back",
                    )
                    pa.default_memory_pool().release_unused()
                    if not remote.equals(_read_row(example)):
                        raise PushError(f"{repo_id}: row {row} of {path} does not read back as it is on disk")

    def _read_example(self, path: str, revision: str, last: bool):
        fs = HfFileSystem(endpoint=self.api.endpoint, token=self.target.token, skip_instance_cache=True)
        with fs.open(f"datasets/{self.target.repo_id}@{revision}/{path}", "rb", cache_type="none") as file:
            return _read_row(file, last)

    @contextlib.contextmanager
    def _local_example(self, dataset: datasets.Dataset, row: int) -> Iterator[str]:
        """A Parquet file of one row, embedded anew."""
        with tempfile.TemporaryDirectory(dir=self.work_dir) as folder:
            path = os.path.join(folder, "example.parquet")
            if self.embed:
                nbytes = int(embedded_nbytes(dataset, row, row + 1).sum())
                write_shard(dataset, Shard(0, 1, row, row + 1, nbytes), path)
            else:
                pq.write_table(dataset.with_format("arrow")[row : row + 1], path)
            pa.default_memory_pool().release_unused()
            yield path

    def verify_only(self) -> None:
        """Checks an existing repository against the plan; shards without a record of their SHA-256 are embedded again.

        Raises:
            PushError: names what is different
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        head = patiently(lambda: self._head(self.target.revision), f"looking for {self.target.repo_id}")
        if head is None:
            raise PushError(f"{self.target.repo_id} has no revision {self.target.revision}")
        listing = patiently(lambda: self._listing(head), f"listing {self.target.repo_id}")
        self._recognise(None, [listing])
        for path in [path for path in self.records if path not in self.committed]:
            del self.records[path]
        absent = [path for path in self.sources if path not in listing]
        if absent:
            raise PushError(f"{self.target.repo_id} is not what is to be checked: {absent[0]} is missing")
        for path, (split, shard) in self.shards.items():
            if path in self.records:
                continue
            task, path = self.task(path, split, shard), self.work_dir / "verify.parquet"
            try:
                embed_shard(task, path)
                info = CommitOperationAdd(task.path, str(path)).upload_info
                self.records[task.path] = Record(task.path, task.source, info.sha256.hex(), info.size)
            finally:
                path.unlink(missing_ok=True)
        self.verify(head)

    def _tidy(self, state: dict | None) -> None:
        """After the verification: the working branch and the temporary files go; the records stay, for the next push."""
        _write_json(self.work_dir / "done.json", [asdict(record) for record in self.records.values()])
        patiently(self._delete_branch, f"deleting the branch {self.branch}")
        for name in ("records", "shards"):
            shutil.rmtree(self.work_dir / name, ignore_errors=True)
        (self.work_dir / "creates-repository").unlink(missing_ok=True)

    def _delete_branch(self) -> bool:
        refs = self.api.list_repo_refs(self.target.repo_id, repo_type="dataset")
        if all(branch.name != self.branch for branch in refs.branches):
            return False
        self.api.delete_branch(self.target.repo_id, branch=self.branch, repo_type="dataset")
        return True

    def abort(self) -> list[str]:
        """Removes what an unfinished push left; never a finished dataset. Says what it did, a line each."""
        said, repo_id = [], self.target.repo_id
        if (self.work_dir / "creates-repository").exists():
            self.created_repo = True
        try:
            state = patiently(self._state, "reading the working branch")
            refs = patiently(
                lambda: self.api.list_repo_refs(repo_id, repo_type="dataset", include_pull_requests=True),
                f"looking at {repo_id}",
            )
        except PushError as error:
            if error.status not in (401, 404):
                raise
            state = refs = None
        if refs is not None:
            self.created_repo |= bool(state and state["created_repo"])
            others = [branch.target_commit for branch in refs.branches if branch.name != self.branch]
            others += [ref.target_commit for ref in [*refs.tags, *refs.converts, *(refs.pull_requests or [])]]
            kept = {
                entry.lfs.sha256
                for commit in dict.fromkeys(others)
                for entry in patiently(lambda commit=commit: self._listing(commit), f"listing {repo_id}").values()
                if entry.lfs
            }
            files = patiently(lambda: self._listing("main"), f"listing {repo_id}")
            if (
                self.created_repo
                and len(set(others)) == 1
                and not refs.pull_requests
                and set(files) <= {".gitattributes"}
            ):
                patiently(
                    lambda: self.api.delete_repo(repo_id, repo_type="dataset", missing_ok=True), f"deleting {repo_id}"
                )
                said.append(f"Deleted {repo_id}: this push created it, and it held nothing else.")
            else:
                said += self._delete_uploads(state, kept)
                if patiently(self._delete_branch, f"deleting the branch {self.branch}"):
                    said.append(f"Deleted the working branch {self.branch} of {repo_id}.")
        if any((self.work_dir / name).exists() for name in ("records", "shards", "creates-repository")):
            said.append(f"Deleted the temporary files in {self.work_dir}.")
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return said or [
            f"There is no unfinished push of config {self.plan.config_name} to {repo_id}; nothing was done."
        ]

    def _delete_uploads(self, state: dict | None, kept: set[str]) -> list[str]:
        """Deletes uploads of the unfinished push that no other revision refers to, and that were not there before it."""
        records = [Record(**record) for record in (state or {}).get("records", [])]
        for path in (self.work_dir / "records").glob("*.json"):
            records.append(Record(**json.loads(path.read_text())))
        ours = {record.sha256 for record in records} - kept
        if not ours or state is None:
            return []
        repo_id = self.target.repo_id
        work = patiently(
            lambda: self.api.list_repo_commits(repo_id, repo_type="dataset", revision=self.branch),
            "reading the branch",
        )
        began = min(commit.created_at for commit in work if commit.title.startswith("Work on "))

        def delete() -> int:
            found = [file for file in self.api.list_lfs_files(repo_id, repo_type="dataset") if file.file_oid in ours]
            found = [file for file in found if file.pushed_at >= began]
            # Without rewriting history: the only commits that name them are those of the working branch.
            self.api.permanently_delete_lfs_files(repo_id, found, rewrite_history=False, repo_type="dataset")
            return len(found)

        try:
            count = patiently(delete, "deleting the uploads")
        except PushError as error:
            return [f"The uploads stay until the Hub collects them ({error})."]
        return [f"Deleted {count} uploads of the unfinished push."] if count else []


def _read_row(source: Any, last: bool = False) -> pa.Table:
    """The first or last row of a Parquet file, and no more than its row group in memory."""
    local = isinstance(source, str)
    parquet = pq.ParquetFile(source, pre_buffer=False, memory_map=local, buffer_size=0 if local else READ_NBYTES)
    group = parquet.read_row_group(parquet.num_row_groups - 1 if last else 0, use_threads=False)
    return group.slice(len(group) - 1 if last else 0, 1)


def push_dataset_to_hub(
    ds: datasets.Dataset | datasets.DatasetDict,
    repo_id: str,
    num_shards: int | None = None,
    embed_external_files: bool = True,
    *,
    config_name: str = "default",
    split: str | None = None,
    max_shard_size: int | str | None = None,
    private: bool | None = None,
    private_because: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    num_proc: int | None = None,
    executor: concurrent.futures.Executor | None = None,
    card: DatasetCard | None = None,
    work_dir: str | os.PathLike | None = None,
) -> CommitInfo:
    """Pushes a dataset of files to the Hub: one row in memory, one commit, and killed anywhere it goes on when called again.

    Args:
        ds (`Dataset` or `DatasetDict`): rows of paths (or bytes)
        repo_id (`str`): `ORG/NAME`, or `NAME` for the own namespace; created if it is not there
        num_shards (`int`, *optional*): of each split; never more than rows
        embed_external_files (`bool`, defaults to `True`): store the files' bytes; else their paths
        config_name (`str`, defaults to `"default"`): other configs in the repository are left alone
        split (`str`, *optional*): of a `Dataset`; by default its own, or `train`. Other splits are left alone
        max_shard_size (`int` or `str`, defaults to `"500MB"`): bound of a shard's size, unless one row exceeds it
        private (`bool`, *optional*): of a repository that is created; refused if there is a public one
        private_because (`str`, *optional*): why this dataset may not be in a public repository
        revision (`str`, *optional*): the branch to commit to, created from `main` if it is not there
        create_pr (`bool`): commit to a new pull request instead
        num_proc (`int`, *optional*): local worker processes
        executor (`concurrent.futures.Executor`, *optional*): instead of local processes, for example Dask's
            `Client.get_executor(pure=False)`
        card (`DatasetCard`, *optional*): for a repository without one
        work_dir (`str` or `os.PathLike`, *optional*): for temporary files, at most a few shards

    Returns:
        `CommitInfo`: of the commit that made the dataset visible

    Raises:
        ValueError: files that cannot be stored, all of them by name
        PushError: no access, or the Hub refuses, or did not answer for half an hour
    """
    if isinstance(ds, datasets.Dataset):
        ds = {split or str(ds.split or "train"): ds}
    options = {
        "num_shards": num_shards,
        "max_shard_size": max_shard_size,
        "embed_external_files": embed_external_files,
    }
    plan = plan_push(ds, config_name, max_shard_size, num_shards)
    push = HubPush(
        plan,
        make_target(repo_id, revision, create_pr, token),
        card or DatasetCard(f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n"),
        options=options,
        private=private,
        private_because=private_because,
        embed=embed_external_files,
        work_dir=work_dir,
        commit_message=commit_message,
    )
    workers = Workers(num_proc or 1, executor)
    failed = True
    try:
        commit = push.run(workers)
        failed = False
    finally:
        workers.close(failed)
    for name, dataset in ds.items():
        info = dataset_info(plan, sum(record.size for record in push.records.values()))
        for key in ("config_name", "splits", "download_size", "dataset_size"):
            setattr(dataset.info, key, getattr(info, key))
        dataset.info.size_in_bytes = info.dataset_size + info.download_size
        logger.info(f"{repo_id}: {name} is at {commit.commit_url}")
    return commit


def make_target(
    repo_id: str, revision: str | None = None, create_pr: bool = False, token: str | None = None
) -> Target:
    endpoint = datasets.config.HF_ENDPOINT
    if "/" not in repo_id:
        name = patiently(lambda: HfApi(endpoint=endpoint, token=token).whoami()["name"], "checking the token")
        repo_id = f"{name}/{repo_id}"
    return Target(repo_id, revision or "main", create_pr, endpoint, token)
