"""Files by path or by URL: on this machine, or wherever fsspec reads from.

A URL carries no credentials, and rows of a dataset are URLs that any process may open: a worker of a push, a DataLoader.
So the storage options of a root (as `load_dataset(..., storage_options=...)` takes them) are kept by URL in an
environment variable, which every kind of child process inherits.
"""

import errno
import functools
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeVar

from datasets import DownloadConfig
from datasets.utils.file_utils import _prepare_path_and_storage_options, xopen
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs


# JSON: URL of a root -> its storage options.
_VARIABLE = "DATASETS_BIDS_STORAGE_OPTIONS"

# Seconds before a request is made again: a minute in all, on top of what the file system itself does.
WAITS = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

PIECE_NBYTES = 8 * 1024**2  # what one request asks for when a file is read whole

T = TypeVar("T")

# What tells two versions of a remote file apart, whatever file system says it.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "sha256",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "CRC",
)


def is_url(path: str) -> bool:
    return "://" in path


def remember(root: str, options: Mapping[str, Any] | None) -> None:
    """Has every file under `root` opened with `options`, in this process and in those it starts from now on.

    Raises:
        ValueError: the options are no plain data
    """
    if not options:
        return
    try:
        os.environ[_VARIABLE] = json.dumps({**remembered(), root: dict(options)})
    except TypeError as e:
        raise ValueError(f"storage_options: {e}; pass plain data (texts, numbers, true or false)") from None


def options_for(url: str) -> dict[str, Any]:
    """The storage options of the innermost root that `url` lies under."""
    known = remembered()
    # zip://sub-01.nii::s3://bucket/x.zip lies under zip://::s3://bucket/x.zip
    head, _, rest = url.partition("::")
    roots = []
    for root in known:
        root_head, _, root_rest = root.partition("::")
        if rest == root_rest and (head + "/").startswith(root_head.rstrip("/") + "/"):
            roots.append(root)
    return dict(known[max(roots, key=len)]) if roots else {}


def remembered() -> dict[str, dict[str, Any]]:
    """URL of a root -> its storage options."""
    return _parsed(os.environ.get(_VARIABLE, "{}"))


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, dict[str, Any]]:
    return json.loads(text)


def filesystem(url: str, config: DownloadConfig | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path in it.

    Args:
        config (`DownloadConfig`, *optional*): what `datasets` opens the URL with, by default the options of its root

    Raises:
        ImportError: the package for this kind of URL is not installed
        ValueError: there is no such kind of URL
    """
    # By way of `datasets`, so that this is the very instance, with its listings, that its functions look files up in.
    config = config or DownloadConfig(storage_options=options_for(url))
    path, options = _prepare_path_and_storage_options(url, config)
    try:
        return url_to_fs(path, **options)
    except ImportError as e:
        extra = "; pip install 'datasets-bids[s3]'" if url.startswith("s3://") else ""
        raise ImportError(f"{url}: {e}{extra}") from None


def open_file(path: str, config: DownloadConfig | None = None) -> BinaryIO:
    """Opens a local file or a URL for reading bytes, from its beginning to its end."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path, config)
    if fs.async_impl and "http" not in fs.protocol:
        return ObjectFile(fs, inner)
    return xopen(path, "rb", download_config=config or DownloadConfig(storage_options=options_for(path)))


class ObjectFile(io.RawIOBase):
    """An object of a bucket, read by ranges, each of which is asked for again when the connection fails.

    The file objects of fsspec give up half-way through: what they fetch lies between calls that are retried, and some of
    them fail on the error itself.
    """

    def __init__(self, fs: AbstractFileSystem, path: str):
        self._fs, self._path, self._position = fs, path, 0
        self._size, self._version = self._look_up()

    def _look_up(self) -> tuple[int, str]:
        try:
            info = self._patiently(lambda: self._fs.info(self._path, refresh=True))
        except TypeError:  # a file system that keeps no listings
            info = self._patiently(lambda: self._fs.info(self._path))
        return int(info["size"]), version(info)

    def _patiently(self, ask: Callable[[], T]) -> T:
        for wait in WAITS:
            try:
                return ask()
            except (FileNotFoundError, PermissionError, TypeError):
                raise
            except Exception:  # each file system has its own, down to an IndexError where s3fs looks into a reset
                time.sleep(wait)
        try:
            return ask()
        except OSError:
            raise
        except Exception as e:
            raise OSError(errno.EIO, f"{type(e).__name__} {e}", self._path) from e

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        """Fills all of `target`, but at the end of the object.

        Raises:
            OSError: the object was replaced while it was read
        """
        wanted = min(len(target), self._size - self._position)
        if wanted <= 0:
            if self._look_up() != (self._size, self._version):
                raise OSError(errno.EIO, "was changed while it was read", self._path)
            return 0
        stop = self._position + wanted
        data = self._patiently(lambda: self._read_range(self._position, stop))
        target[:wanted] = data
        self._position = stop
        return wanted

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(PIECE_NBYTES), b""))

    def _read_range(self, start: int, stop: int) -> bytes:
        data = self._fs.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} bytes came where {stop - start} were asked for", self._path)
        return data


def version(info: Mapping[str, Any]) -> str:
    """What changes when a remote file does, from what its file system says of it."""
    return " ".join(str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None)


def stamp(path: str) -> str:
    """Changes when the file does: its size and time, or what its file system has instead. Empty for no file."""
    try:
        if not is_url(path):
            stat = os.stat(path)
            return f"{stat.st_size} {stat.st_mtime_ns}"
        fs, inner = filesystem(path)
        info = fs.info(inner)
        return f"{info['size']} {version(info)}"
    except FileNotFoundError:
        return ""
