"""What a schema may say: for every column, where its file is.

A schema is plain data, so it can stand in Python, be passed to `load_dataset("bids", schema=...)` or stand in YAML:

    {"t1w": "{subject}/anat/{subject}_T1w.nii.gz",                       # one image
     "cta": ["raw/{subject}_cta.nii.gz", "reg/{subject}_cta.nii.gz"],    # the first of these that the row has
     "bold": {"path": "{subject}/func/{subject}_*_bold.nii.gz", "many": True},
     "dwi": {"path": "{subject}/dwi/{subject}_dwi.nii.gz", "optional": True},
     "dwi_bvals": {"of": "dwi", "companion": ".bval"},                   # the text of a file beside it
     "acquisition": {"of": "t1w", "entity": "acq", "labels": {"spc3": "SPACE"}},
     "site": {"capture": "site"}}                                        # what a {site} in a pattern matched
"""

import difflib
import functools
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


# BIDS: an identifier is its entity's key, "-" and the label.
_IDENTIFIERS = {"subject": "sub-", "session": "ses-"}


@functools.lru_cache
def bids_schema() -> Any:
    """The specification of BIDS in machine-readable form, as its maintainers publish it (bidsschematools)."""
    from bidsschematools.schema import load_schema  # 80 ms, for those who name no pattern

    return load_schema()


class SchemaError(ValueError):
    """A mistake in a schema or in a table's description, with where it is and how to mend it."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def entities(path: str) -> dict[str, str]:
    """The entities in a file's name: `sub-01_task-rest_bold.nii.gz` -> `{"sub": "01", "task": "rest"}`."""
    stem = path.rpartition("/")[2].partition(".")[0]
    return dict(part.split("-", 1) for part in stem.split("_") if "-" in part)


class Pattern:
    """A glob relative to a root, with placeholders in its directory and file names.

    `*` and `?` stay within a path part, `**/` stands for any number of directories, `[abc]` for one of these characters.
    `{subject}` matches `sub-<label>` and `{session}` matches `ses-<label>`; any other `{name}` matches a path part or a
    piece of one between underscores, and `{name:glob}` what the glob says. A placeholder that stands twice matches the
    same text twice. `sub-{subject}` means `{subject}`.

    A pattern without `{subject}`, such as `anat/*_T1w.nii.gz`, is relative to every subject's (and session's) directory,
    or to the root where file names carry the `sub-` entity.

    Args:
        text (`str`): the pattern
        anchored (`bool`): take a pattern without `{subject}` as relative to the root and nothing else

    Raises:
        SchemaError: unbalanced braces, or a placeholder that looks like a misspelt `{subject}` or `{session}`
    """

    def __init__(self, text: str, anchored: bool = False):
        self.text = text
        self.placeholders: tuple[str, ...] = ()
        # BIDS: participants without sessions have no session directory; then the session is null.
        self._implicit = not anchored
        regex = self._compile(text)
        self._implicit = self._implicit and "subject" not in self.placeholders
        if self._implicit:
            label = bids_schema().objects.formats.label.pattern
            regex = f"(?:(?P<subject>sub-{label})/(?:(?P<session>ses-{label})/)?)?{regex}"
        self._regex = re.compile(regex)

    def __repr__(self):
        return f"Pattern({self.text!r})"

    def _compile(self, text: str) -> str:
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as e:
            raise SchemaError(f"pattern {text!r}: {e}; placeholders are written {{subject}}, {{session}}, {{name}}")
        regex, seen = "", []
        for literal, name, glob, _ in pieces:
            prefix = _IDENTIFIERS.get(name, "")
            if prefix and not glob and literal.endswith(prefix):
                literal = literal[: -len(prefix)]
            regex += _glob_to_regex(literal)
            if name is None:
                continue
            if not name.isidentifier():
                raise SchemaError(
                    f"pattern {text!r}: {{{name}}} is no placeholder; use letters, digits and underscores"
                )
            if name not in _IDENTIFIERS:
                close = difflib.get_close_matches(name, _IDENTIFIERS, n=1, cutoff=0.75)
                if close or name in ("sub", "ses", "participant"):
                    meant = close[0] if close else {"ses": "session"}.get(name, "subject")
                    raise SchemaError(f"pattern {text!r}: unknown placeholder {{{name}}}; did you mean {{{meant}}}?")
            if name in seen:
                regex += f"(?P={name})"
            else:
                label = prefix and prefix + bids_schema().objects.formats.label.pattern
                inner = _glob_to_regex(glob) if glob else label or "[^/_]+"
                regex += f"(?P<{name}>{inner})"
                seen.append(name)
        self.placeholders = tuple(seen)
        return regex

    def match(self, path: str) -> dict[str, str] | None:
        """What the placeholders match in `path` (relative to the root), or `None` where the pattern does not."""
        match = self._regex.fullmatch(path)
        if match is None:
            return None
        captures = {name: value for name, value in match.groupdict().items() if value is not None}
        if self._implicit:
            named = entities(path)
            for name, prefix in _IDENTIFIERS.items():
                if name not in captures and prefix[:-1] in named:
                    captures[name] = prefix + named[prefix[:-1]]
            if "subject" not in captures:
                return None
        return captures

    def nearest(self, tree: Mapping[str, list[str]]) -> str:
        """What stands in the tree where this pattern, which matches no file of it, leaves the path."""
        parts = self.text.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            head = Pattern("/".join(parts[:depth]), anchored=not self._implicit)
            for directory in sorted(tree):
                if directory and head.match(directory) is not None:
                    return f"{directory} holds {_some(tree[directory])}"
        return f"it holds {_some(tree[''])}"


def _some(names: list[str], most: int = 5) -> str:
    if not names:
        return "nothing"
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _glob_to_regex(glob: str) -> str:
    # glob.translate() does this from Python 3.13 on.
    wildcards = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^]/]+\]|[^*?[]+|\[", glob):
        if token in wildcards:
            regex += wildcards[token]
        elif len(token) > 1 and token[0] == "[":
            negated = token[1] == "!"
            regex += "[" + "^" * negated + re.sub(r"([\\^[])", r"\\\1", token[1 + negated : -1]) + "]"
        else:
            regex += re.escape(token)
    return regex


@dataclass(frozen=True)
class ImageColumn:
    """One image (or with `many` all images) of the first pattern that matches any for the row."""

    patterns: tuple[Pattern, ...]
    many: bool = False
    optional: bool = False


@dataclass(frozen=True)
class CompanionColumn:
    """The text of the file beside an image that differs in its extension, found as BIDS inheritance says."""

    of: str
    extension: str


@dataclass(frozen=True)
class EntityColumn:
    """The label of an entity in an image's file name, mapped by `labels` where it is in there."""

    of: str
    entity: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptureColumn:
    """What a placeholder of the row's patterns matched, mapped by `labels` where it is in there."""

    placeholder: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScanColumn:
    """What `scans.tsv` says of an image."""

    of: str
    dtype: str
    values: Mapping[str, Any]  # path of the image relative to the root -> value


Column = ImageColumn | CompanionColumn | EntityColumn | CaptureColumn | ScanColumn


class Match(NamedTuple):
    """An image that belongs into a column."""

    column: str
    rank: int  # of the pattern in its column's order
    path: str  # relative to the root
    captures: dict[str, str]


# One row a kind of column: the key that tells it, the keys that may stand beside that.
_KINDS = {
    "path": {"many", "optional"},
    "companion": {"of"},
    "entity": {"of", "labels"},
    "capture": {"labels"},
}


def parse_schema(schema: Mapping[str, object]) -> dict[str, Column]:
    """Checks a schema.

    Returns:
        `dict[str, Column]`: column name -> what it holds, in the schema's order

    Raises:
        SchemaError: names the column and the fix
    """
    if not isinstance(schema, Mapping) or not schema:
        raise SchemaError('a schema is a dictionary of columns, such as {"t1w": "anat/*_T1w.nii.gz"}')
    columns = {}
    for name, spec in schema.items():
        try:
            columns[name] = _parse_column(name, spec)
        except SchemaError as e:
            raise SchemaError(f"column {name!r}: {e}") from None
    images = [name for name, column in columns.items() if isinstance(column, ImageColumn)]
    placeholders = {
        placeholder for name in images for pattern in columns[name].patterns for placeholder in pattern.placeholders
    } | set(_IDENTIFIERS)
    for name, column in columns.items():
        of = getattr(column, "of", None)
        if of is not None and of not in images:
            raise SchemaError(
                f"column {name!r}: 'of' names {of!r}, which is no image column{did_you_mean(of, images)}"
            )
        if isinstance(column, CaptureColumn) and column.placeholder not in placeholders:
            raise SchemaError(
                f"column {name!r}: unknown placeholder {column.placeholder!r}, no pattern of this schema has it"
                + did_you_mean(column.placeholder, placeholders)
            )
    return columns


def _parse_column(name: str, spec: object) -> Column:
    if not isinstance(name, str) or not name or name in ("subject_id", "session_id"):
        raise SchemaError("this name is taken: rows have it already" if name else "a column needs a name")
    if isinstance(spec, str | list | tuple):
        spec = {"path": spec}
    if not isinstance(spec, Mapping):
        raise SchemaError(f"expected a pattern, a list of patterns or a dictionary, got {spec!r}")
    known = set(_KINDS).union(*_KINDS.values())
    for key in spec:
        if key not in known:
            raise SchemaError(
                f"unknown key {key!r}{did_you_mean(str(key), known)} (the keys are {', '.join(sorted(known))})"
            )
    kinds = [kind for kind in _KINDS if kind in spec]
    if len(kinds) != 1:
        raise SchemaError(f"needs one of {', '.join(map(repr, _KINDS))}" + (f", has {kinds}" if kinds else ""))
    (kind,) = kinds
    for key in spec:
        if key != kind and key not in _KINDS[kind]:
            raise SchemaError(f"{key!r} does not go with {kind!r}")
    if kind != "path" and not (isinstance(spec[kind], str) and spec[kind]):
        raise SchemaError(f"{kind!r} takes a text, got {spec[kind]!r}")
    labels = spec.get("labels") or {}
    if not isinstance(labels, Mapping):
        raise SchemaError(f"'labels' takes a dictionary of labels, got {labels!r}")
    if "of" in _KINDS[kind] and "of" not in spec:
        raise SchemaError(f"{kind!r} needs 'of', the image column whose files it describes")
    if kind == "companion":
        return CompanionColumn(spec["of"], "." + spec[kind].lstrip("."))
    if kind == "entity":
        return EntityColumn(spec["of"], spec[kind], labels)
    if kind == "capture":
        return CaptureColumn(spec[kind].strip("{}"), labels)
    for flag in ("many", "optional"):
        if not isinstance(spec.get(flag, False), bool):
            raise SchemaError(f"{flag!r} is true or false, got {spec[flag]!r}")
    paths = [spec["path"]] if isinstance(spec["path"], str) else spec["path"]
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise SchemaError(f"'path' takes a pattern or a list of patterns, got {spec['path']!r}")
    patterns = []
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise SchemaError(f"pattern {path!r} leaves the root; patterns are relative to data_dir")
        patterns.append(Pattern(path.removeprefix("./")))
    return ImageColumn(tuple(patterns), spec.get("many", False), spec.get("optional", False))
