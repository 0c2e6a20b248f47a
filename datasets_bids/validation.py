"""Checks of a tree before a push, and of a repository after it.

How it works:

- What a release holds is declared by its builder, as plain data: `BidsConfig.expected` (see `parse_expected`). What any tree must
  be (images that can be read, sidecars and tables that parse, gradients as long as their image) needs no declaration.
- A check is one line of a table. Whatever it found is listed by file, so that a damaged tree is mended in one go.
- Of an image, the header is read, and the length that gzip notes at its end is compared with what the header says; only where the
  two differ, and with `deep`, is anything inflated.
- The same counts are taken of a repository from the footers of its Parquet files and the leaves that hold names of files.
- Whether a tree is valid BIDS is answered by the reference validator, if it is installed, and by nothing else.
"""

import concurrent.futures
import csv
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.utils import tqdm
from fsspec.core import url_to_fs

from . import privacy
from .index import Index
from .nifti import StoredFile, _load_stored
from .privacy import Finding
from .schema import Pattern, SchemaError, did_you_mean
from .shards import local_path
from .storage import open_file
from .tables import read_table


# Files are opened by that many threads: reading and inflating release the interpreter, and network disks answer late.
THREADS = min(16, 2 * (os.cpu_count() or 1) + 2)

# Of a check's findings, the table shows so many; JSON has all.
SHOWN = 5

# Two grids are one if no corner is further away than this part of a voxel.
GRID_TOLERANCE = 0.1

_DANGLING = "is a link to content that is not here: run `datalad get` or `git annex get`"

_NAMED = 20  # how many fields one refusal of a push names

_BUFFER = 1 << 20  # bytes read at once where a file is read whole


@dataclass(frozen=True)
class ValidationCheck:
    """One question and its answer.

    Attributes:
        name (`str`): what was looked at
        expected (`str`): what should be there
        actual (`str`): what is there
        passed (`bool`): false if it must be mended
        findings (`tuple[Finding, ...]`): what is wrong, by file; a check that passed may list warnings
        asked (`bool`): false if the question was not asked, for the reason that `actual` gives
    """

    name: str
    expected: str
    actual: str
    passed: bool
    findings: tuple[Finding, ...] = ()
    asked: bool = True

    @property
    def status(self) -> str:
        return "FAILED" if not self.passed else "warning" if self.findings else "ok" if self.asked else "-"


@dataclass(frozen=True)
class ValidationResult:
    """The answers to all questions."""

    checks: list[ValidationCheck]

    @property
    def all_passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def summary(self) -> str:
        """A table for a reader."""
        heads = ValidationCheck("check", "expected", "found", True)
        widths = [max(len(getattr(check, key)) for check in [heads, *self.checks]) for key in ("name", "expected")]
        lines = [f"{'':8}{heads.name:{widths[0]}}  {heads.expected:{widths[1]}}  {heads.actual}"]
        for check in self.checks:
            lines.append(
                f"{check.status:8}{check.name:{widths[0]}}  {check.expected:{widths[1]}}  {check.actual}".rstrip()
            )
            lines += [f"{'':10}{finding}" for finding in check.findings[:SHOWN]]
            if len(check.findings) > SHOWN:
                lines.append(f"{'':10}and {len(check.findings) - SHOWN} more (--json lists all)")
        statuses = [check.status for check in self.checks]
        words = {"ok": "ok", "warning": "with warnings", "-": "not asked", "FAILED": "failed"}
        counts = [f"{statuses.count(status)} {word}" for status, word in words.items() if status in statuses]
        return "\n".join([*lines, f"{len(self.checks)} checks: {', '.join(counts)}"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        checks = [{**asdict(check), "status": check.status} for check in self.checks]
        return {"all_passed": self.all_passed, "checks": checks}


def _check(name: str, expected: str, good: str, findings: Iterable[Finding]) -> ValidationCheck:
    findings = tuple(sorted(findings, key=lambda finding: (finding.severity, finding.path)))
    failed = any(finding.severity == "error" for finding in findings)
    files = len({finding.path for finding in findings})
    actual = f"{files} file{'s' * (files != 1)} to look at" if findings else good
    return ValidationCheck(name, expected, actual, not failed, findings)


# -- what a builder declares ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """How many there should be: `count`, give or take `tolerance`."""

    count: int
    tolerance: int = 0

    def __str__(self) -> str:
        return f"{self.count:,}" + (f" ± {self.tolerance}" if self.tolerance else "")

    def __contains__(self, number: int) -> bool:
        return abs(number - self.count) <= self.tolerance


@dataclass(frozen=True)
class Expected:
    """What `parse_expected` reads. In `subjects`, `sessions` and `rows`, the key `None` stands for all splits together."""

    paths: tuple[str, ...] = ()
    subjects: Mapping[str | None, Count] = field(default_factory=dict)
    sessions: Mapping[str | None, Count] = field(default_factory=dict)
    rows: Mapping[str | None, Count] = field(default_factory=dict)
    columns: Mapping[str, Count] = field(default_factory=dict)
    images: Mapping[str, Count] = field(default_factory=dict)
    same_grid: tuple[tuple[str, ...], ...] = ()
    archive_md5: str | None = None


def parse_expected(expected: Mapping[str, Any] | None) -> Expected:
    """Checks what a builder declares of its release.

    Args:
        expected (`dict`, *optional*): with any of
            `paths`: patterns of files and directories that must be there, relative to the root;
            `subjects`, `sessions`, `rows`: how many there are, a number or a dictionary split -> number;
            `columns`: column -> rows that have a value, `images`: column -> values in all lists together; a column may be a
            pattern (`bold_*`), which stands for all that match it, together;
            `same_grid`: lists of columns whose images have the same voxel grid within a row;
            `archive_md5`: of the archive that the release is downloaded as.
            A number is 149, or `{"count": 140, "tolerance": 5}`.

    Raises:
        SchemaError: names the key and the fix
    """
    expected = {} if expected is None else expected
    known = Expected.__dataclass_fields__
    if not isinstance(expected, Mapping):
        raise SchemaError(f"expected: a dictionary with the keys {', '.join(known)}, not {expected!r}")
    for key in expected:
        if key not in known:
            raise SchemaError(
                f"expected: unknown key {key!r}{did_you_mean(key, known)} (the keys are {', '.join(known)})"
            )
    parsed: dict[str, Any] = {}
    for key, value in expected.items():
        where = f"expected, {key!r}"
        if key == "paths":
            if not _is_list_of(value, str):
                raise SchemaError(f"{where}: a list of patterns, not {value!r}")
            for path in value:
                Pattern(path, anchored=True)
            parsed[key] = tuple(value)
        elif key == "same_grid":
            if not _is_list_of(value, list | tuple) or not all(_is_list_of(columns, str) for columns in value):
                raise SchemaError(f"{where}: a list of lists of columns, not {value!r}")
            parsed[key] = tuple(map(tuple, value))
        elif key == "archive_md5":
            if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
                raise SchemaError(f"{where}: 32 hexadecimal digits, not {value!r}")
            parsed[key] = value
        elif isinstance(value, Mapping) and "count" not in value:
            parsed[key] = {name: _parse_count(count, f"{where}, {name!r}") for name, count in value.items()}
        elif key in ("columns", "images"):
            raise SchemaError(f"{where}: a dictionary column -> number, not {value!r}")
        else:
            parsed[key] = {None: _parse_count(value, where)}
    return Expected(**parsed)


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _parse_count(value: Any, where: str) -> Count:
    spec = value if isinstance(value, Mapping) else {"count": value}
    for key in spec:
        if key not in Count.__dataclass_fields__:
            raise SchemaError(f"{where}: unknown key {key!r}{did_you_mean(key, Count.__dataclass_fields__)}")
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in spec.values()):
        raise SchemaError(f'{where}: a number, or {{"count": 140, "tolerance": 5}}, not {value!r}')
    return Count(**spec)


# -- counts, of rows of paths as of Parquet files ------------------------------------------------------------------------


@dataclass
class Tally:
    """What is counted of one split.

    Attributes:
        subjects (`list[str]`): of each row
        sessions (`list[str | None]`): of each row; empty where rows have none
        lengths (`dict[str, np.ndarray]`): column -> values of each row: 0 or 1, or the length of its list
    """

    subjects: list[str]
    sessions: list[str | None]
    lengths: dict[str, np.ndarray]

    def label(self, row: int) -> str:
        return "/".join(filter(None, (self.subjects[row], self.sessions[row] if self.sessions else None)))


def tally_rows(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> Tally:
    """Counts rows as `build_rows` gives them."""
    names = [name for name in features if name not in ("subject_id", "session_id")]
    return Tally(
        [row["subject_id"] for row in rows],
        [row["session_id"] for row in rows] if "session_id" in features else [],
        {name: np.array([_length(row[name]) for row in rows], dtype=np.int64) for name in names},
    )


def _length(value: Any) -> int:
    if isinstance(value, list):
        return sum(item is not None for item in value)
    return int(value is not None)


def check_counts(expected: Expected, splits: Mapping[str, Tally]) -> list[ValidationCheck]:
    """Compares the numbers of subjects, sessions, rows and values with what was declared."""
    checks = []
    for kind, counts in (("subjects", expected.subjects), ("sessions", expected.sessions), ("rows", expected.rows)):
        for split, count in counts.items():
            name = kind if split is None else f"{kind} of {split}"
            if split is not None and split not in splits:
                checks.append(ValidationCheck(name, str(count), f"no split {split}", False))
                continue
            names = splits if split is None else [split]
            number = len({label for each in names for label in _labels(kind, each, splits[each])})
            checks.append(ValidationCheck(name, str(count), f"{number:,}", number in count))
    for title, counts in (("rows with", expected.columns), ("images in", expected.images)):
        for pattern, count in counts.items():
            checks.append(_check_column(title, pattern, count, splits))
    return checks


def _labels(kind: str, split: str, tally: Tally) -> set:
    if kind == "subjects":
        return set(tally.subjects) - {None}
    if kind == "sessions":
        return {pair for pair in zip(tally.subjects, tally.sessions, strict=False) if pair[1] is not None}
    return {(split, row) for row in range(len(tally.subjects))}


def _check_column(title: str, pattern: str, count: Count, splits: Mapping[str, Tally]) -> ValidationCheck:
    number, without, known = 0, [], False
    rows = sum(len(tally.subjects) for tally in splits.values())
    for tally in splits.values():
        lengths = [values for name, values in tally.lengths.items() if fnmatch.fnmatchcase(name, pattern)]
        if lengths:
            known = True
            total = np.sum(lengths, axis=0)
            number += int(total.sum() if title == "images in" else np.count_nonzero(total))
            without += [tally.label(row) for row in np.flatnonzero(total == 0)]
    if not known:
        names = {name for tally in splits.values() for name in tally.lengths}
        hint = did_you_mean(pattern, names)
        return ValidationCheck(f"{title} {pattern}", str(count), f"there is no such column{hint}", False)
    findings = ()
    # Where some rows have none by right, nobody can say which of them should have one.
    if number < count.count - count.tolerance and count.count + count.tolerance >= rows:
        findings = tuple(Finding(label, f"has no {pattern}") for label in without)
    return ValidationCheck(f"{title} {pattern}", str(count), f"{number:,}", number in count, findings)


# -- the tree ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """What a builder made of a tree.

    Attributes:
        expected (`Expected`): what it declares
        features (`datasets.Features`, *optional*): `None` if it could not be built
        splits (`dict[str, list[dict]]`): split -> rows of absolute paths
        error (`str`, *optional*): why it could not be built
        warnings (`list[str]`): what it warned of
    """

    expected: Expected = Expected()
    features: datasets.Features | None = None
    splits: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class ImageFacts:
    """What was read of one image. `shape` is `None` where it cannot be read; `affine` maps voxels to mm."""

    shape: tuple[int, ...] | None = None
    affine: np.ndarray | None = None
    missing: list[Finding] = field(default_factory=list)
    damage: list[Finding] = field(default_factory=list)
    identity: list[Finding] = field(default_factory=list)
    gzip: list[Finding] = field(default_factory=list)


def validate_tree(
    index: Index,
    build: Built | None = None,
    *,
    deep: bool = False,
    archive: str | os.PathLike | None = None,
    bids: bool = False,
) -> ValidationResult:
    """Checks a tree.

    Args:
        index (`Index`): of the tree
        build (`Built`, *optional*): what a builder makes of it; without one, what it holds is not compared with anything
        deep (`bool`): inflate every compressed file and compare its checksum
        archive (`str`, *optional*): the file that the tree was unpacked from, to compare its MD5
        bids (`bool`): ask the reference validator whether the tree is valid BIDS
    """
    checks = []
    if build is not None:
        checks += [_check_path(path, index) for path in build.expected.paths]
        if build.expected.archive_md5:
            checks.append(_check_archive(build.expected.archive_md5, archive))
        checks.append(_check_build(build))
        if build.features is not None:
            tallies = {split: tally_rows(rows, build.features) for split, rows in build.splits.items()}
            checks += check_counts(build.expected, tallies)
    facts = _in_parallel(lambda image: inspect_image(index.absolute(image), image, deep), index.images, "Images")
    others, other_gzip = _other_gzip(index, deep)
    damage = [finding for fact in facts.values() for finding in fact.damage]
    checks.append(
        _check(
            "image files",
            "none empty or missing",
            f"{len(facts):,} images",
            [finding for fact in facts.values() for finding in fact.missing],
        )
    )
    whole = "readable, whole, CRC agrees" if deep else "readable, of full length"
    checks.append(_check("image data", whole, "all", [*damage, *others]))
    if build is not None:
        for columns in build.expected.same_grid:
            checks.append(_check_grid(columns, build, facts, index))
    sidecars, identity_sidecars = _sidecars(index)
    tables, identity_tables = _tables(index)
    checks.append(
        _check("sidecars", "JSON objects", f"{sum(f.path.endswith('.json') for f in index.files):,} files", sidecars)
    )
    checks.append(_check("tables", "one header, lines as long", f"{len(_table_paths(index)):,} files", tables))
    checks.append(_check("gradients", "bval, bvec as long as the image", "agree", _gradients(index, facts)))
    checks.append(_check("privacy: sidecars", "no identity fields", "none", identity_sidecars))
    checks.append(_check("privacy: tables", "no names, dates, ages > 89", "none", identity_tables))
    headers = [finding for fact in facts.values() for finding in fact.identity]
    checks.append(_check("privacy: image headers", "no names, dates, DICOM", "none", headers))
    gzips = [finding for fact in facts.values() for finding in fact.gzip] + other_gzip
    checks.append(_check("privacy: gzip headers", "no file names, no times", "none", gzips))
    return ValidationResult(checks + check_bids(index, bids))


def _in_parallel(function: Callable[[str], Any], paths: Iterable[str], what: str) -> dict[str, Any]:
    """path -> what `function` says of it, in the order of `paths`."""
    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        # Shown where it takes a while, on a terminal.
        results = tqdm(threads.map(function, paths), total=len(paths), desc=what, delay=2, leave=False, disable=None)
        return dict(zip(paths, results, strict=True))


def _check_path(text: str, index: Index) -> ValidationCheck:
    pattern = Pattern(text.rstrip("/"), anchored=True)
    known = [file.path for file in index.files] + list(index.tree)
    found = [path for path in known if path and pattern.match(path) is not None]
    actual = "there" if found else f"missing; {pattern.nearest(index.tree)}"
    findings = () if found else (Finding(text, "is not there"),)
    return ValidationCheck(f"path {text}", "there", actual, bool(found), findings)


def _check_archive(md5: str, archive: str | os.PathLike | None) -> ValidationCheck:
    if archive is None:
        return ValidationCheck("archive", f"MD5 {md5}", "give it with --archive", True, asked=False)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(archive, "rb") as file:
            while piece := file.read(_BUFFER):
                digest.update(piece)
    except OSError as e:
        reason = f"cannot be read ({e.strerror or e})"
        return ValidationCheck("archive", f"MD5 {md5}", reason, False, (Finding(os.fspath(archive), reason),))
    found = digest.hexdigest()
    findings = (
        () if found == md5 else (Finding(os.fspath(archive), "is not the release's archive: download it again"),)
    )
    return ValidationCheck("archive", f"MD5 {md5}", f"MD5 {found}", found == md5, findings)


def _check_build(build: Built) -> ValidationCheck:
    warnings = tuple(Finding("", warning, severity="warning") for warning in build.warnings)
    if build.error is not None:
        return ValidationCheck("build", "every row", "cannot be built", False, (Finding("", build.error), *warnings))
    rows = ", ".join(f"{len(rows):,} rows of {split}" for split, rows in build.splits.items())
    return ValidationCheck("build", "every row", rows, True, warnings)


def inspect_image(path: str, name: str, deep: bool = False) -> ImageFacts:
    """Reads the header of one image, and with `deep` all of it.

    Args:
        path (`str`): where the file is
        name (`str`): what to call it
    """
    facts = ImageFacts()

    def damaged(problem: str) -> ImageFacts:
        facts.damage.append(Finding(name, problem))
        return facts

    try:
        size = os.path.getsize(path)
        if size == 0:
            facts.missing.append(Finding(name, "is empty (0 bytes): fetch it again"))
            return facts
        with open(path, "rb") as raw:
            start = raw.read(1024)
            raw.seek(max(0, size - 4))
            end = raw.read(4)
        facts.gzip += privacy.in_gzip(start, name)
        file = StoredFile(path)
        image = _load_stored(file)
        header, shape = image.header, tuple(image.shape)
        affine = getattr(image, "affine", None)
        needed = file.expected_nbytes
    except FileNotFoundError:
        facts.missing.append(Finding(name, _DANGLING))
        return facts
    except (ValueError, OSError, EOFError) as e:
        return damaged(_after_path(e, path))
    except Exception as e:  # a header that nibabel itself trips over
        return damaged(f"the header cannot be read ({type(e).__name__}: {e})")
    facts.shape, facts.affine = shape, affine
    # CIFTI-2 keeps its NIfTI header, with the extensions, beside its own.
    facts.identity += privacy.in_header(getattr(image, "nifti_header", header), name)
    named = next((kind for ending, kind in _COMPRESSED.items() if name.endswith(ending)), None)
    if named != file.compression:
        damaged(f"holds {file.compression or 'uncompressed'} data, which its name does not say: rename it")
    if 0 in shape:
        damaged(f"has no voxels (its shape is {shape})")
    if affine is not None and not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0):
        damaged("has an affine that cannot be inverted: no voxel has a place")
    if file.compression is None and size < needed:
        damaged(f"is cut off: {size:,} of {needed:,} bytes")
    elif file.compression is not None and (deep or file.compression == "gzip" and not _ends_with(end, needed)):
        try:
            nbytes = _inflate(path, needed)
            if nbytes < needed:
                damaged(f"is cut off: {nbytes:,} of {needed:,} bytes")
        except OSError as e:
            damaged(_after_path(e, path))
    return facts


_COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}


def _ends_with(end: bytes, needed: int) -> bool:
    # RFC 1952: the last four bytes are the length, modulo 2^32, of what the (last) member inflates to.
    return int.from_bytes(end, "little") == needed % 2**32


def _inflate(path: str, needed: int = 0) -> int:
    """The length of what a file inflates to.

    Raises:
        OSError: it is damaged or cut off
    """
    file = StoredFile(path)
    file.expected_nbytes = needed
    total, buffer = 0, bytearray(_BUFFER)
    while n := file.readinto(buffer):
        total += n
    return total


def _after_path(error: Exception, path: str) -> str:
    """An error's message as it goes on after the path."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    text = " ".join(str(error).split()).removeprefix(path).lstrip(": ")
    return text or type(error).__name__


def _other_gzip(index: Index, deep: bool) -> tuple[list[Finding], list[Finding]]:
    """(damage, privacy) of compressed files that are no images, such as physiological recordings."""
    images = set(index.images)
    paths = [
        file.path for file in index.files if file.path.endswith(".gz") and file.path not in images and file.size > 0
    ]

    def inspect(name: str) -> tuple[list[Finding], list[Finding]]:
        path = index.absolute(name)
        try:
            with open(path, "rb") as raw:
                start = raw.read(1024)
            if deep:
                _inflate(path)
        except OSError as e:
            return [Finding(name, _after_path(e, path))], []
        return [], list(privacy.in_gzip(start, name))

    results = _in_parallel(inspect, paths, "Compressed files").values()
    return [item for damage, _ in results for item in damage], [item for _, found in results for item in found]


def _check_grid(
    columns: tuple[str, ...], build: Built, facts: Mapping[str, ImageFacts], index: Index
) -> ValidationCheck:
    name, findings, compared = f"grid of {', '.join(columns)}", [], 0
    unknown = [column for column in columns if build.features is not None and column not in build.features]
    if unknown:
        hint = did_you_mean(unknown[0], build.features)
        return ValidationCheck(name, "the same in a row", f"there is no column {unknown[0]!r}{hint}", False)
    for rows in build.splits.values():
        for row in rows:
            images = [row[column] for column in columns]
            paths = [path for value in images for path in (value if isinstance(value, list) else [value]) if path]
            paths = [os.path.relpath(path, index.root).replace(os.sep, "/") for path in paths]
            # What cannot be read is named already; surfaces and grayordinates (CIFTI-2) have no grid.
            grids = [(path, facts[path]) for path in paths if path in facts and facts[path].affine is not None]
            for path, fact in grids[1:]:
                compared += 1
                difference = _grid_difference(grids[0][1], fact)
                if difference:
                    findings.append(Finding(path, f"is not on the grid of {grids[0][0]}: {difference}"))
    return _check(name, "the same in a row", f"{compared:,} pairs agree", findings)


def _grid_difference(one: ImageFacts, other: ImageFacts) -> str | None:
    shape = one.shape[:3]
    if other.shape[:3] != shape:
        return f"{_times(other.shape[:3])} voxels instead of {_times(shape)}"
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]).T
    with np.errstate(all="ignore"):
        distances = np.linalg.norm(((one.affine - other.affine) @ corners)[:3], axis=0)
    voxel = np.linalg.norm(one.affine[:3, :3], axis=0).min()
    if not distances.max() <= GRID_TOLERANCE * voxel:
        return f"a corner is {distances.max():.2f} mm away"
    return None


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _sidecars(index: Index) -> tuple[list[Finding], list[Finding]]:
    """(damage, privacy) of all JSON files."""

    def inspect(path: str) -> tuple[list[Finding], list[Finding]]:
        try:
            with open(index.absolute(path), "rb") as file:
                content = file.read()
            value = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as e:
            return [Finding(path, f"is not UTF-8 ({e})")], []
        except FileNotFoundError:
            return [Finding(path, _DANGLING)], []
        except OSError as e:
            return [Finding(path, _after_path(e, path))], []
        except (ValueError, RecursionError) as e:
            return [Finding(path, f"is no JSON ({e})" if content else "is empty")], []
        # BIDS: a sidecar is one JSON object. Its name has entities or is a suffix; other JSON files are free.
        sidecar = "_" in path.rpartition("/")[2] or "/" not in path
        damage = (
            [Finding(path, f"is a JSON {type(value).__name__}, no object")]
            if sidecar and not isinstance(value, dict)
            else []
        )
        return damage, list(privacy.in_json(value, path))

    paths = [file.path for file in index.files if file.path.endswith(".json")]
    results = _in_parallel(inspect, paths, "Sidecars").values()
    return [item for damage, _ in results for item in damage], [item for _, found in results for item in found]


def _table_paths(index: Index) -> list[str]:
    return [file.path for file in index.files if file.path.endswith((".tsv", ".csv", ".xlsx"))]


# Other tables are recordings, dictionaries and results. BIDS' tables of people, and those that say so.
_PEOPLE = re.compile(r"(.*[/_])?(participants|sessions|scans|samples)\.tsv|(.*/)?phenotype/.*|.*sub-.*\.(csv|xlsx)")
_PEOPLE_HEADER = re.compile("subject|participant|patient", re.IGNORECASE)


def _about_people(path: str, columns: Iterable[str]) -> bool:
    told = path.endswith((".csv", ".xlsx")) and any(_PEOPLE_HEADER.search(name) for name in columns)
    return told or _PEOPLE.fullmatch(path) is not None


def _tables(index: Index) -> tuple[list[Finding], list[Finding]]:
    """(damage, privacy) of all tables."""

    def inspect(path: str) -> tuple[list[Finding], list[Finding]]:
        absolute = index.absolute(path)
        try:
            if path.endswith(".xlsx"):
                table = read_table(absolute)
                columns = {str(name): table.iloc[:, i].tolist() for i, name in enumerate(table.columns)}
            else:
                columns = _read_columns(absolute, "\t" if path.endswith(".tsv") else ",")
        except FileNotFoundError:
            return [Finding(path, _DANGLING)], []
        except UnicodeDecodeError as e:
            return [Finding(path, f"is not UTF-8 ({e})")], []
        except (OSError, ValueError, csv.Error) as e:
            return [Finding(path, _after_path(e, absolute))], []
        if not _about_people(path, columns):
            return [], []
        return [], list(privacy.in_table(columns, path, _units(index, path)))

    results = _in_parallel(inspect, _table_paths(index), "Tables").values()
    return [item for damage, _ in results for item in damage], [item for _, found in results for item in found]


def _read_columns(path: str, delimiter: str) -> dict[str, list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file, delimiter=delimiter))
    if not lines or not lines[0]:
        raise ValueError("has no header" if lines else "is empty")
    header, *lines = lines
    doubles = sorted({name for name in header if header.count(name) > 1})
    if doubles:
        raise ValueError(f"has two columns {doubles[0]!r}")
    for row, line in enumerate(lines, start=2):
        if line and len(line) != len(header):
            raise ValueError(f"row {row} has {len(line)} cells, the header has {len(header)}")
    return dict(zip(header, map(list, zip(*filter(None, lines), strict=True)), strict=False))


def _units(index: Index, path: str) -> dict[str, str]:
    dictionary = path.rpartition(".")[0] + ".json"
    try:
        columns = json.loads(index.read_text(dictionary))
        return {name: str(value["Units"]) for name, value in columns.items() if "Units" in value}
    except (ValueError, AttributeError, TypeError):
        return {}


def _gradients(index: Index, facts: Mapping[str, ImageFacts]) -> list[Finding]:
    findings = []
    cache: dict[str, list[list[float]] | str] = {}
    for image, fact in facts.items():
        stem = image.rpartition("/")[2].partition(".")[0]
        if fact.shape is None or not stem.endswith("_dwi") and not index.companions(image, ".bval"):
            continue
        volumes = fact.shape[3] if len(fact.shape) > 3 else 1
        files = {extension: next(iter(index.companions(image, extension)), None) for extension in (".bval", ".bvec")}
        for extension, path in files.items():
            other = files[".bvec" if extension == ".bval" else ".bval"]
            if path is None:
                # A single volume (a trace, an ADC map) goes without, as long as it has neither.
                if volumes > 1 or other is not None:
                    findings.append(Finding(image, f"has {volumes} volumes and no {extension} file"))
                continue
            if path not in cache:
                cache[path] = _numbers(index, path)
            lines = cache[path]
            if isinstance(lines, str):
                findings.append(Finding(path, lines))
                continue
            rows, columns = (1, [sum(map(len, lines))]) if extension == ".bval" else (3, [len(line) for line in lines])
            if extension == ".bvec" and len(lines) != rows:
                findings.append(Finding(path, f"has {len(lines)} lines instead of 3"))
            elif set(columns) != {volumes}:
                found = "/".join(map(str, dict.fromkeys(columns)))
                findings.append(Finding(path, f"has {found} values for the {volumes} volumes of {image}"))
    return list(dict.fromkeys(findings))


def _numbers(index: Index, path: str) -> list[list[float]] | str:
    """The lines of a .bval or .bvec file, or what is wrong with it."""
    try:
        lines = [list(map(float, line.split())) for line in index.read_text(path).splitlines() if line.strip()]
    except ValueError as e:
        return f"is no table of numbers ({_after_path(e, path)})"
    return (
        lines if np.isfinite([value for line in lines for value in line]).all() else "holds a value that is no number"
    )


# -- the reference validator ---------------------------------------------------------------------------------------------


def check_bids(index: Index, wanted: bool = True) -> list[ValidationCheck]:
    """What the reference validator finds, a check for each of its codes. Releases need not be valid, so it has to be `wanted`."""
    name, question = "BIDS", "valid BIDS"
    if not wanted:
        return [ValidationCheck(name, question, "ask with --bids", True, asked=False)]
    scripts = os.pathsep.join(
        [sysconfig.get_path("scripts"), os.path.dirname(sys.executable), os.environ.get("PATH", "")]
    )
    program = shutil.which("bids-validator-deno", path=scripts)
    if program is None:
        return [ValidationCheck(name, question, "pip install 'datasets-bids[validate]'", True, asked=False)]
    run = subprocess.run([program, index.root, "--format", "json"], capture_output=True, text=True, errors="replace")
    try:
        issues = json.loads(run.stdout)["issues"]["issues"]
    except (ValueError, KeyError, TypeError):
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [ValidationCheck(name, question, f"the reference validator failed: {last}", False)]
    by_code: dict[str, list[Finding]] = {}
    for issue in issues:
        severity = "error" if issue.get("severity", "error") == "error" else "warning"
        said = [str(issue.get(key, "")).strip().partition("\n")[0] for key in ("subCode", "issueMessage", "rule")]
        problem = ": ".join(filter(None, said[:2])) or said[2] or issue["code"]
        path = issue.get("location", "").lstrip("/")
        by_code.setdefault(issue["code"], []).append(Finding(path, problem, severity=severity))
    if not by_code:
        return [ValidationCheck(name, question, "valid", True)]
    return [_check(f"BIDS: {code}", question, "", findings) for code, findings in sorted(by_code.items())]


# -- a repository --------------------------------------------------------------------------------------------------------


def validate_repository(
    path: str, config_name: str | None, expected: Expected, features: Iterable[str] = ()
) -> ValidationResult:
    """Takes the same counts of a pushed dataset, from the footers of its Parquet files and from leaves that hold no volume.

    Args:
        path (`str`): a repository on the Hub, or a local directory with the layout of one
        config_name (`str`, *optional*): its config
        expected (`Expected`): what the builder declares
        features (`Iterable[str]`): columns that must be there

    Raises:
        ValueError, OSError: there is no such repository or config, or it cannot be read
    """
    builder = datasets.load_dataset_builder(path, config_name)
    tallies = {}
    for split, urls in (builder.config.data_files or {}).items():
        tallies[str(split)] = _tally_parquet(list(urls))
    names = {"subject_id", *next(iter(tallies.values())).lengths} if tallies else set()
    missing = [name for name in features if name not in names and name != "session_id"]
    checks = [
        ValidationCheck(
            "columns",
            "those of the builder",
            f"missing: {', '.join(missing)}" if missing else f"{len(names)} columns",
            not missing,
            tuple(Finding("", f"there is no column {name!r}") for name in missing),
        )
    ]
    for split, info in (builder.info.splits or {}).items():
        number = len(tallies[split].subjects) if split in tallies else 0
        said = info.num_examples
        checks.append(ValidationCheck(f"rows of {split} by the card", f"{said:,}", f"{number:,}", number == said))
    return ValidationResult(checks + check_counts(expected, tallies))


def _tally_parquet(urls: list[str]) -> Tally:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        tallies = list(threads.map(_tally_file, urls))
    names = tallies[0].lengths
    return Tally(
        [subject for tally in tallies for subject in tally.subjects],
        [session for tally in tallies for session in tally.sessions],
        {name: np.concatenate([tally.lengths[name] for tally in tallies]) for name in names},
    )


def _tally_file(url: str) -> Tally:
    fs, path = url_to_fs(url)
    # No read-ahead: the next bytes are those of a volume.
    with fs.open(path, "rb", cache_type="none") as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        ids = [name for name in ("subject_id", "session_id") if name in schema.names]
        table = parquet.read(columns=ids)
        lengths = {}
        for name in schema.names:
            if name in ids:
                continue
            # Of an image, the leaf with its name tells as much as the one with its bytes.
            own = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
            leaf = next((leaf for leaf in own if leaf.endswith(".path")), own[0])
            groups = [_group_lengths(parquet, group, leaves[leaf], leaf) for group in range(metadata.num_row_groups)]
            lengths[name] = np.concatenate([np.zeros(0, np.int64), *groups])
    sessions = table["session_id"].to_pylist() if "session_id" in ids else []
    return Tally(table["subject_id"].to_pylist() if "subject_id" in ids else [], sessions, lengths)


def _group_lengths(parquet: pq.ParquetFile, group: int, column: int, leaf: str) -> np.ndarray:
    row_group = parquet.metadata.row_group(group)
    chunk = row_group.column(column)
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count:
        values = chunk.num_values - statistics.null_count
        # One row in a group, or none or all of them with a value: the footer says it.
        if row_group.num_rows == 1 or values == 0:
            return np.full(row_group.num_rows, values, np.int64)
        if values == row_group.num_rows == chunk.num_values and ".list." not in leaf:
            return np.ones(row_group.num_rows, np.int64)
    array = parquet.read_row_group(group, columns=[leaf]).column(0)
    return np.array([_length(value) for value in array.to_pylist()], dtype=np.int64)


# -- before a public push ------------------------------------------------------------------------------------------------

# Suffixes of images that may show a face, in small letters: BIDS' anatomical ones, and CT.
_ANATOMICAL = set(
    """
    t1w t2w pdw pdt2 pdt2w inplanet1 inplanet2 flair t2star t2starw fgatir angio unit1 t1map t2map t2starmap r1map r2map
    pdmap mp2rage mpm mtw mts vfa irt1 megre mese qsm chimap t1rho ct ncct cta mra mprage spgr anat
    """.split()
)
_MASKS = ("mask", "msk", "dseg", "probseg", "seg", "roi")


def refuse_exposure(
    splits: Mapping[str, datasets.Dataset], *, defaced: bool = False, allow_identity_fields: bool = False
) -> None:
    """Stops a public push that nobody answers for.

    Args:
        splits (`dict[str, Dataset]`): rows of paths
        defaced (`bool`): someone affirms that anatomical images are defaced, or shared with explicit consent
        allow_identity_fields (`bool`): publish what identifies all the same

    Raises:
        ValueError: names the columns, or the files and fields, and the option
    """
    columns = [] if defaced else anatomical_columns(splits)
    if columns:
        raise ValueError(
            f"a public push of anatomical images ({', '.join(columns)}) needs --affirm-defaced: with it you affirm that they "
            "are defaced, or that the participants gave explicit consent to share them as they are; or push with --private"
        )
    findings = [] if allow_identity_fields else identity_in_rows(splits)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        more = f"\n  and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
        raise ValueError(
            f"participants can be identified by {len(errors)} field{'s' * (len(errors) > 1)}; remove what identifies, push "
            "with --private, or say --allow-identity-fields:\n  " + "\n  ".join(errors[:_NAMED]) + more
        )


def anatomical_columns(splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """The columns of images that may show a face, by column name, directory and suffix. Masks do not count."""
    found: dict[str, None] = {}
    for dataset in splits.values():
        for name, paths in _image_paths(dataset):
            words = set(re.split(r"[^a-z0-9]+", name.lower()))
            for path in paths:
                stem = os.path.basename(path).partition(".")[0].lower()
                suffix = stem.rpartition("_")[2]
                if suffix.endswith(_MASKS) or words & set(_MASKS):
                    continue
                if suffix in _ANATOMICAL or words & _ANATOMICAL or "anat" in path.replace(os.sep, "/").split("/"):
                    found[name] = None
                    break
    return list(found)


def identity_in_rows(splits: Mapping[str, datasets.Dataset]) -> list[Finding]:
    """What identifies a participant in what a push would publish: images' headers, table columns, texts of sidecars."""
    findings: dict[Finding, None] = {}
    for split, dataset in splits.items():
        table = dataset.with_format("arrow")[:]
        columns = {}
        for name, feature in dataset.features.items():
            if not isinstance(feature, datasets.Value) and not (
                isinstance(getattr(feature, "feature", None), datasets.Value)
            ):
                continue
            cells = table.column(name).to_pylist()
            if isinstance(feature, datasets.Value):
                columns[name] = cells
            for row, cell in enumerate(cells):
                for text in cell if isinstance(cell, list) else [cell]:
                    if isinstance(text, str) and text.lstrip()[:1] == "{":
                        try:
                            value = json.loads(text)
                        except ValueError:
                            continue
                        where = f"{split}, row {row}, column {name!r}"
                        findings |= dict.fromkeys(privacy.in_json(value, where))
        findings |= dict.fromkeys(privacy.in_table(columns, split, first_row=0))
        for _, paths in _image_paths(dataset):
            for found in _in_parallel(_identity_in_image, dict.fromkeys(paths), "Headers").values():
                findings |= dict.fromkeys(found)
    return list(findings)


def _identity_in_image(path: str) -> list[Finding]:
    local = local_path(path)
    try:
        if local is None:
            with open_file(path) as remote:
                file = StoredFile(remote.read(_BUFFER), path)
        else:
            file = StoredFile(local)
        image = _load_stored(file)
        return list(privacy.in_header(getattr(image, "nifti_header", image.header), path))
    except Exception as e:  # whatever it is: what nobody can look into, nobody can answer for
        return [Finding(path, f"cannot be looked into ({' '.join(str(e).split()) or type(e).__name__})")]


def _image_paths(dataset: datasets.Dataset) -> Iterator[tuple[str, list[str]]]:
    """(column, local paths of its images)."""
    for name, feature in dataset.features.items():
        if not isinstance(feature, datasets.Nifti) and not isinstance(
            getattr(feature, "feature", None), datasets.Nifti
        ):
            continue
        column = dataset.with_format("arrow")[:].column(name)
        images = [item for cell in column.to_pylist() for item in (cell if isinstance(cell, list) else [cell]) if item]
        yield name, [item["path"] for item in images if item["bytes"] is None and item["path"]]
