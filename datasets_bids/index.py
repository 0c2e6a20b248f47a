"""The files under a root, walked once.

Everything downstream asks this table; nothing asks the tree again.
"""

import contextlib
import gc
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

from .schema import Pattern, entities
from .shards import local_path
from .storage import filesystem, is_url, open_file, remember, version


# What nibabel reads as a single NIfTI file from its path: NIfTI-1, NIfTI-2 and CIFTI-2, plain or compressed.
NIFTI_EXTENSIONS = (".nii", ".nii.gz", ".nii.bz2", ".nii.zst")


class File(NamedTuple):
    """One file of a tree.

    Attributes:
        path (`str`): path relative to the root, with `/` on every platform
        size (`int`): bytes, or -1 for a link that leads nowhere (git-annex content that was not fetched)
        mtime_ns (`int`): time of the last change of the content, ns since the epoch; 0 for a URL
        ctime_ns (`int`): time of the last change of the entry, ns since the epoch; 0 for a URL
        version (`str`): what else changes with the content: of a URL, its ETag and times as its file system has them
    """

    path: str
    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    version: str = ""


@dataclass(frozen=True)
class Index:
    """The files under `root`, sorted by path, without hidden files and directories (`.git`, `.bidsignore`, `._T1w.nii`)."""

    root: str
    files: tuple[File, ...]

    @cached_property
    def images(self) -> list[str]:
        """Relative paths of the NIfTI files, sorted."""
        return [file.path for file in self.files if file.path.endswith(NIFTI_EXTENSIONS)]

    @cached_property
    def tree(self) -> dict[str, list[str]]:
        """Directory -> the names in it, both relative to the root, which is `""`."""
        tree: dict[str, list[str]] = {"": []}
        for file in self.files:
            directory, _, name = file.path.rpartition("/")
            while directory not in tree:
                tree[directory] = [name]
                directory, _, name = directory.rpartition("/")
            tree[directory].append(name)
        return tree

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, edited or replaced. Reads no file."""
        digest = hashlib.sha256(self.root.encode(errors="surrogateescape"))
        for file in self.files:
            entry = f"\0{file.path}\0{file.size}\0{file.mtime_ns}\0{file.ctime_ns}\0{file.version}"
            digest.update(entry.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    @cached_property
    def datasets(self) -> set[str]:
        """Directories of the datasets in the tree: its root, and (BIDS, "Storage of derived datasets") every directory
        with a `dataset_description.json` and every child of a `derivatives` directory that is no subject's.
        """
        roots = {""}
        for directory, names in self.tree.items():
            if "dataset_description.json" in names:
                roots.add(directory)
            if directory.rpartition("/")[2] == "derivatives":
                children = (f"{directory}/{name}" for name in names if not name.startswith("sub-"))
                roots.update(child for child in children if child in self.tree)
        return roots

    def dataset_of(self, path: str) -> str:
        """Directory of the dataset that a file belongs to, the innermost one."""
        directory = path.rpartition("/")[0]
        while directory not in self.datasets:
            directory = directory.rpartition("/")[0]
        return directory

    def companions(self, image: str, extension: str) -> list[str]:
        """The files with `extension` that describe `image`, the nearest first, as BIDS' inheritance principle has it:
        of the same suffix, with no other entities than the image's, in its directory or one above, up to its dataset.
        """
        found = []
        stem = _stem(image)
        named, suffix = entities(stem), stem.rpartition("_")[2]
        directory = image.rpartition("/")[0]
        while True:
            # Those of other subjects are left aside at once: a directory may hold one file of each of thousands.
            described = self._by_extension(extension).get(directory, {})
            candidates = described.get((suffix, None), []) + described.get((suffix, named.get("sub")), [])
            names = [name for name, its in candidates if its.items() <= named.items()]
            # "There MUST NOT be multiple metadata files applicable at one level": the most specific one is taken.
            if names:
                name = max(names, key=lambda name: (_stem(name) == stem, len(entities(name)), name))
                found.append(f"{directory}/{name}" if directory else name)
            if directory in self.datasets:
                return found
            directory = directory.rpartition("/")[0]

    def _by_extension(self, extension: str) -> dict[str, dict[tuple, list[tuple[str, dict[str, str]]]]]:
        """Directory -> (suffix, subject) -> names with `extension` and their entities."""
        if extension not in self._extensions:
            directories = self._extensions[extension] = {}
            for file in self.files:
                if file.path.endswith(extension):
                    directory, _, name = file.path.rpartition("/")
                    named = entities(name)
                    key = (_stem(name).rpartition("_")[2], named.get("sub"))
                    directories.setdefault(directory, {}).setdefault(key, []).append((name, named))
        return self._extensions[extension]

    @cached_property
    def _extensions(self) -> dict[str, dict[str, dict[tuple, list[tuple[str, dict[str, str]]]]]]:
        return {}

    def absolute(self, path: str) -> str:
        if not is_url(self.root):
            return os.path.join(self.root, *path.split("/"))
        # zip://::s3://bucket/x.zip, whose files are zip://<path>::s3://bucket/x.zip
        head, chain, rest = self.root.partition("::")
        return f"{head}{'' if head.endswith('://') else '/'}{path}{chain}{rest}"

    def prefetch(self, paths: Iterable[str]) -> None:
        """Reads these (small) files of a URL at once, where one after the other would take a round trip each."""
        wanted = list(dict.fromkeys(path for path in paths if path not in self._contents))
        if not is_url(self.root) or not wanted:
            return
        fs, _ = filesystem(self.root)
        inner = {fs._strip_protocol(self.absolute(path).partition("::")[0]): path for path in wanted}
        found = fs.cat(list(inner), on_error="omit")
        self._contents.update((path, found[name]) for name, path in inner.items() if name in found)

    @cached_property
    def _contents(self) -> dict[str, bytes]:
        return {}

    def open(self, path: str) -> BinaryIO:
        """Opens a file of the tree for reading bytes."""
        if path in self._contents:
            return io.BytesIO(self._contents[path])
        return open_file(self.absolute(path))

    def read_text(self, path: str) -> str:
        try:
            with self.open(path) as file:
                return file.read().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{path}: cannot be read as text ({e})") from e


def index_tree(root: str, storage_options: Mapping[str, Any] | None = None) -> Index:
    """Walks `root` once.

    Args:
        root (`str`): a local directory, or a URL that fsspec reads (`s3://bucket/ds004884`)
        storage_options (`dict`, *optional*): what fsspec opens the URL with, such as `{"anon": True}`

    Raises:
        FileNotFoundError: there is no such directory
        NotADirectoryError: it is a file
        OSError: the URL cannot be listed
    """
    root = local_path(root) or root
    if is_url(root):
        return _index_url(root if root.endswith("://") else root.rstrip("/"), storage_options)
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.exists(root):
        raise FileNotFoundError(f"There is no directory {root}: check data_dir")
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{root} is a file: data_dir takes the directory that holds the dataset")
    with without_gc():
        return Index(root, tuple(sorted(_walk(root))))


def _index_url(root: str, storage_options: Mapping[str, Any] | None) -> Index:
    remember(root, storage_options)
    fs, top = filesystem(root)
    fs.invalidate_cache()
    try:
        found = fs.find(top, detail=True)
    except Exception as e:  # every file system has its own: no credentials, no bucket, no network
        hint = '; for a public bucket pass storage_options={"anon": True}' if root.startswith("s3:") else ""
        raise OSError(f"{root}: cannot be listed ({str(e).strip() or type(e).__name__}){hint}") from e
    prefix = top.rstrip("/") + "/" if top.strip("/") else ""
    files = []
    for name, info in found.items():
        name = name.lstrip("/") if not prefix.startswith("/") else name
        path = name.removeprefix(prefix)
        if path == name and prefix:
            raise NotADirectoryError(f"{root} is a file: data_dir takes the directory that holds the dataset")
        # Consoles of object stores make empty objects named "directory/".
        if not path.endswith("/") and not any(part.startswith(".") for part in path.split("/")):
            files.append(File(path, int(info["size"] or 0), version=version(info)))
    if not files:
        raise FileNotFoundError(f"There is no file under {root}: check data_dir")
    return Index(root, tuple(sorted(files)))


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Lets the garbage collector rest. A tree makes many objects that all stay; looking through them, and through those of
    all imported packages, time and again would take a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _walk(root: str) -> list[File]:
    files = []
    # (path of a directory, the same relative to the root with a "/", the real directories that links were followed from)
    todo: list[tuple[str, str, tuple[str, ...]]] = [(root, "", ())]
    while todo:
        directory, prefix, followed = todo.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                try:
                    # What an entry is, most file systems say without a stat.
                    if entry.is_dir():
                        below = followed
                        if entry.is_symlink():
                            # A link to one of its own parents would be walked for ever.
                            real, here = os.path.realpath(entry.path), os.path.realpath(directory)
                            if any((above + os.sep).startswith(real + os.sep) for above in (here, *followed)):
                                continue
                            below = (*followed, here)
                        todo.append((entry.path, prefix + name + "/", below))
                        continue
                    stat = entry.stat()
                except OSError:
                    # DataLad and git-annex leave a dangling link for content that was not fetched. The file belongs to
                    # the dataset all the same: whoever embeds it says by name that it is missing.
                    files.append(File(prefix + name, -1, -1, -1))
                    continue
                files.append(File(prefix + name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return files


def find_all_niftis(path: str | os.PathLike, pattern: str) -> list[str]:
    """Absolute paths of the NIfTI files under `path` that match `pattern`, sorted.

    Args:
        path (`str` or `os.PathLike`): a directory
        pattern (`str`): a glob relative to it; `*` stays within a path part, `**` crosses them

    Raises:
        FileNotFoundError: there is no such directory
    """
    index = index_tree(os.fspath(path))
    glob = Pattern(pattern, anchored=True)
    return [index.absolute(image) for image in index.images if glob.match(image) is not None]


def find_nifti(path: str | os.PathLike, pattern: str) -> str | None:
    """Absolute path of the one NIfTI file under `path` that matches `pattern`, or `None`.

    Raises:
        FileNotFoundError: there is no such directory
        ValueError: several files match; all are named
    """
    niftis = find_all_niftis(path, pattern)
    if len(niftis) > 1:
        raise ValueError(f"{len(niftis)} files match {pattern!r}, expected one: " + ", ".join(niftis))
    return niftis[0] if niftis else None
