"""The files under a root, walked once.

Everything downstream asks this table; nothing asks the tree again.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .schema import Pattern, entities


# What nibabel reads as a single NIfTI file from its path: NIfTI-1, NIfTI-2 and CIFTI-2, plain or compressed.
NIFTI_EXTENSIONS = (".nii", ".nii.gz", ".nii.bz2", ".nii.zst")


@dataclass(frozen=True)
class File:
    """One file of a tree.

    Attributes:
        path (`str`): path relative to the root, with `/` on every platform
        size (`int`): bytes, or -1 for a link that leads nowhere (git-annex content that was not fetched)
        mtime_ns (`int`): time of the last change of the content, ns since the epoch
        ctime_ns (`int`): time of the last change of the entry, ns since the epoch
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int


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
        tree: dict[str, dict[str, None]] = {"": {}}
        for file in self.files:
            parts = file.path.split("/")
            for depth, name in enumerate(parts):
                tree.setdefault("/".join(parts[:depth]), {})[name] = None
        return {directory: list(names) for directory, names in tree.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, edited or replaced. Reads no file."""
        digest = hashlib.sha256(self.root.encode(errors="surrogateescape"))
        for file in self.files:
            entry = f"\0{file.path}\0{file.size}\0{file.mtime_ns}\0{file.ctime_ns}"
            digest.update(entry.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def companions(self, image: str, extension: str) -> list[str]:
        """The files with `extension` that describe `image`, the nearest first, as BIDS' inheritance principle has it:
        of the same suffix, with no other entities than the image's, in its directory or one above, up to its dataset.
        """
        found = []
        stem = _stem(image)
        directory = image.rpartition("/")[0]
        while True:
            names = [name for name in self._by_extension(extension).get(directory, ()) if _applies(_stem(name), stem)]
            # "There MUST NOT be multiple metadata files applicable at one level": the most specific one is taken.
            if names:
                name = max(names, key=lambda name: (len(entities(name)), name))
                found.append(f"{directory}/{name}" if directory else name)
            if not directory or "dataset_description.json" in self.tree[directory]:
                return found
            directory = directory.rpartition("/")[0]

    def _by_extension(self, extension: str) -> dict[str, list[str]]:
        if extension not in self._extensions:
            directories = self._extensions[extension] = {}
            for file in self.files:
                directory, _, name = file.path.rpartition("/")
                if name.endswith(extension):
                    directories.setdefault(directory, []).append(name)
        return self._extensions[extension]

    @cached_property
    def _extensions(self) -> dict[str, dict[str, list[str]]]:
        return {}

    def absolute(self, path: str) -> str:
        return os.path.join(self.root, *path.split("/"))

    def read_text(self, path: str) -> str:
        try:
            with open(self.absolute(path), encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{path}: cannot be read as text ({e})") from e


def index_tree(root: str) -> Index:
    """Walks `root` once.

    Raises:
        FileNotFoundError: there is no such directory
        NotADirectoryError: it is a file
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.exists(root):
        raise FileNotFoundError(f"There is no directory {root}: check data_dir")
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{root} is a file: data_dir takes the directory that holds the dataset")
    return Index(root, tuple(sorted(_walk(root, "", frozenset()), key=lambda file: file.path)))


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _applies(stem: str, image: str) -> bool:
    same_suffix = stem.rpartition("_")[2] == image.rpartition("_")[2]
    return stem == image or same_suffix and entities(stem).items() <= entities(image).items()


def _walk(directory: str, prefix: str, ancestors: frozenset) -> Iterator[File]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = prefix + entry.name
            try:
                stat = entry.stat()
            except FileNotFoundError:
                # DataLad and git-annex leave a dangling link for content that was not fetched. The file belongs to
                # the dataset all the same: whoever embeds it says by name that it is missing.
                yield File(path, -1, -1, -1)
                continue
            if entry.is_dir():
                # A link to one of its own parents would be walked for ever.
                identity = (stat.st_dev, stat.st_ino)
                if identity not in ancestors:
                    yield from _walk(entry.path, path + "/", ancestors | {identity})
            else:
                yield File(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


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
