"""Files by path or by URL: on this machine, or wherever fsspec reads from.

A URL carries no credentials, and rows of a dataset are URLs that any process may open: a worker of a push, a DataLoader.
So the storage options of a root (as `load_dataset(..., storage_options=...)` takes them) are kept by URL in an
environment variable, which every kind of child process inherits.
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from datasets import DownloadConfig
from datasets.utils.file_utils import _prepare_path_and_storage_options
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs


# JSON: URL of a root -> its storage options.
_VARIABLE = "DATASETS_BIDS_STORAGE_OPTIONS"

# What tells two versions of a remote file apart, whatever file system says it.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "LastModified", "last_modified", "mtime", "updated", "CRC")


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
        os.environ[_VARIABLE] = json.dumps({**_remembered(), root: dict(options)})
    except TypeError as e:
        raise ValueError(f"storage_options: {e}; pass plain data (texts, numbers, true or false)") from None


def options_for(url: str) -> dict[str, Any]:
    """The storage options of the innermost root that `url` lies under."""
    roots = [root for root in _remembered() if url == root or url.startswith(root.rstrip("/") + "/")]
    return dict(_remembered()[max(roots, key=len)]) if roots else {}


def _remembered() -> dict[str, dict[str, Any]]:
    return _parsed(os.environ.get(_VARIABLE, "{}"))


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, dict[str, Any]]:
    return json.loads(text)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path in it.

    Raises:
        ImportError: the package for this kind of URL is not installed
        ValueError: there is no such kind of URL
    """
    # By way of `datasets`, so that this is the very instance, with its listings, that its functions look files up in.
    path, options = _prepare_path_and_storage_options(url, DownloadConfig(storage_options=options_for(url)))
    try:
        return url_to_fs(path, **options)
    except ImportError as e:
        extra = "; pip install 'datasets-bids[s3]'" if url.startswith("s3://") else ""
        raise ImportError(f"{url}: {e}{extra}") from None


def open_file(path: str) -> BinaryIO:
    """Opens a local file or a URL for reading bytes."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


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
