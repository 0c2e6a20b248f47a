"""The builder for BIDS trees: a schema and tables in, rows of paths out. No volume is read."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import datasets

from .index import Index, index_tree
from .layout import FILTERS, add_scans, derive, wanted_labels
from .schema import (
    CaptureColumn,
    Column,
    CompanionColumn,
    ImageColumn,
    Match,
    ScanColumn,
    SchemaError,
    did_you_mean,
    entities,
    parse_schema,
)
from .tables import Key, Metadata, parse_metadata_from, read_metadata, read_scans


logger = datasets.utils.logging.get_logger(__name__)

_NAMED = 10  # how many subjects one warning names


@dataclass
class BidsConfig(datasets.BuilderConfig):
    """
    BuilderConfig for BIDS and nearly-BIDS trees of NIfTI files. Holds plain data only.

    Args:
        schema (`dict`, *optional*): column -> where its file is; see `datasets_bids.schema`. Without one, columns follow
            from the tree; see `datasets_bids.layout`. The config's name then is that of a dataset in the tree.
        row (`"subject"`, `"session"` or `"file"`, *optional*): what one row is. By default a session where images (that
            the schema's patterns match) have sessions, else a subject. In a dataset of sessions, files of no session are
            a row of their own, with `session_id` null. `"file"` goes without a schema.
        metadata_from (`str`, `dict` or `list`, *optional*): the table or tables with what is known of a subject (or
            session), relative to `data_dir`; see `datasets_bids.tables.TableSpec`. Without a schema, `participants.tsv`
            and `sessions.tsv` by default.
        splits (`dict[str, str]`, defaults to `{"train": ""}`): split -> its directory, which the schema's patterns are
            relative to.
        release (`str`, *optional*): the release of the dataset that the schema was written for; named in errors.
        expected (`dict`, *optional*): what the release holds, for `python -m datasets_bids.validate`; see
            `datasets_bids.validation.parse_expected`.
        subjects, sessions (`list[str]`, *optional*): take only these, with or without `sub-` and `ses-`.
        datatypes, suffixes (`list[str]`, *optional*): take only images of these (`"anat"`; `"T1w"`). Without a schema.
        derivatives (`bool` or `list[str]`, *optional*): join the images of these derivatives (or of all) to the rows, in
            columns that begin with the derivative's name. Without a schema.
        sidecars (`bool`, defaults to `False`): a column with the JSON sidecar for each image column. Without a schema.

    Example:

    ```py
    >>> import datasets_bids
    >>> from datasets import load_dataset
    >>> ds = load_dataset("bids", data_dir="ds114")
    >>> ds = load_dataset("bids", data_dir="ds114", schema={"t1w": "anat/*_T1w.nii.gz"}, metadata_from="participants.tsv")
    ```
    """

    schema: dict[str, Any] | None = None
    row: str | None = None
    metadata_from: str | dict[str, Any] | list[Any] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": ""})
    release: str | None = None
    expected: dict[str, Any] | None = None
    subjects: list[str] | None = None
    sessions: list[str] | None = None
    datatypes: list[str] | None = None
    suffixes: list[str] | None = None
    derivatives: bool | list[str] | None = None
    sidecars: bool = False


class BidsBuilder(datasets.GeneratorBasedBuilder):
    """Yields one example a subject, session or file; images as paths."""

    BUILDER_CONFIG_CLASS = BidsConfig

    PRIVATE_BECAUSE: str | None = None
    """Why the dataset must not be redistributed, if so: it is pushed to private repositories only, others are refused
    with this reason."""

    def _create_builder_config(self, config_name=None, custom_features=None, config_id=None, **config_kwargs):
        if config_kwargs.get("data_files") is not None:
            raise ValueError(f"builder {self.dataset_name!r} reads a tree: pass data_dir=, not data_files=")
        for key in config_kwargs:
            if key not in self.BUILDER_CONFIG_CLASS.__dataclass_fields__:
                known = self.BUILDER_CONFIG_CLASS.__dataclass_fields__
                raise ValueError(f"builder {self.dataset_name!r} has no option {key!r}{did_you_mean(key, known)}")
        if config_name is None and len(self.BUILDER_CONFIGS) > 1 and self.DEFAULT_CONFIG_NAME is None:
            # The original makes up a blank config here as soon as there is a data_dir.
            raise ValueError(
                f"builder {self.dataset_name!r} has several configs, say which one: "
                + ", ".join(config.name for config in self.BUILDER_CONFIGS)
            )
        if config_name is None and len(self.BUILDER_CONFIGS) == 1:
            config_name = self.BUILDER_CONFIGS[0].name
        config, default_id = super()._create_builder_config(config_name, custom_features, config_id, **config_kwargs)
        self._index = None
        if config.data_dir is None or config_id is not None:
            return config, default_id
        # The cache must not outlive the tree: its id follows every file's size and times, and the config. Rows hold
        # absolute paths, so the root is part of it too.
        self._index = index_tree(config.data_dir, self.storage_options)
        plain = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "version"}
        canonical = json.dumps(plain | {"data_dir": self._index.root}, sort_keys=True, default=str)
        digest = sha256(f"{canonical}{custom_features}{self._index.fingerprint}".encode()).hexdigest()
        return config, f"{config.name}-{digest[:16]}"

    def __getstate__(self):
        # Worker processes get their rows as arguments.
        return super().__getstate__() | {"_index": None, "_rows": None}

    def _info(self):
        where = f"builder {self.dataset_name!r}, config {self.config.name!r}"
        try:
            if self._index is None and self.config.data_dir is not None:
                self._index = index_tree(self.config.data_dir, self.storage_options)
            built = build_rows(self.config, self._index)
        except SchemaError as e:
            release = f". This builder reads {self.config.release}" if self.config.release else ""
            raise SchemaError(f"{where}, {e}{release}") from None
        except (ValueError, OSError) as e:
            raise type(e)(f"{where}: {e}") from None
        self._rows, self.unused_images, self.descriptions = built.rows, built.unused_images, built.descriptions
        return datasets.DatasetInfo(features=built.features)

    def _split_generators(self, dl_manager):
        if self._rows is None:
            raise ValueError(f"builder {self.dataset_name!r} reads a tree: pass its directory as data_dir=")
        return [datasets.SplitGenerator(name=split, gen_kwargs={"rows": rows}) for split, rows in self._rows.items()]

    def _generate_examples(self, rows):
        for row in rows:
            yield "/".join(filter(None, (row["subject_id"], row.get("session_id"), row.get("path")))), row


@dataclass(frozen=True)
class Build:
    """A config matched with a tree.

    Attributes:
        features (`Features`, *optional*): the columns; `None` without a tree
        rows (`dict[str, list[dict]]`, *optional*): split -> rows, sorted by subject, session and path, with absolute
            paths (or URLs) of images
        unused_images (`dict[str, str]`): image that is in no column, relative to the root -> why
        descriptions (`dict[str, str]`): column -> what is in it, where something is known
    """

    features: datasets.Features | None = None
    rows: dict[str, list[dict[str, Any]]] | None = None
    unused_images: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)


def build_rows(config: BidsConfig, index: Index | None) -> Build:
    """Matches a config with a tree.

    Args:
        config (`BidsConfig`): what the columns are
        index (`Index`, *optional*): the tree; without one the config is checked and nothing else

    Raises:
        SchemaError: a mistake in the schema, or a pattern that matches nothing
        ValueError: two files for a cell that takes one, or a table that cannot be read
    """
    has_schema = config.schema is not None
    rows_are = ("subject", "session") if has_schema else ("subject", "session", "file")
    if config.row not in (None, *rows_are):
        raise SchemaError(f"row={config.row!r} is none of {', '.join(map(repr, rows_are))}")
    if not isinstance(config.splits, Mapping) or not config.splits:
        raise SchemaError('splits is a dictionary: split -> its directory, such as {"train": "Training"}')
    columns = parse_schema(config.schema) if has_schema else {}
    for option in ("datatypes", "suffixes", "derivatives", "sidecars"):
        if has_schema and getattr(config, option):
            raise SchemaError(f"{option}= goes without a schema; a schema's patterns say it")
    if index is None:
        parse_metadata_from(config.metadata_from)
        return Build()

    reasons: dict[str, str] = {}
    descriptions: dict[str, str] = {}
    if has_schema:
        tables = parse_metadata_from(config.metadata_from)
        matches = {split: _match(columns, index, directory, split) for split, directory in config.splits.items()}
        _refuse_unmatched(columns, matches, index, config.splits)
        matches = {split: _filter(config, matched, reasons) for split, matched in matches.items()}
        row = config.row or ("session" if _has_sessions(matches) else "subject")
        metadata = read_metadata(tables, index, row == "session")
        subjects, lists_subjects = set(), True
    else:
        layout = derive(config, index)
        columns, row, subjects = layout.columns, layout.row, layout.subjects
        lists_subjects = layout.lists_subjects
        metadata = read_metadata(parse_metadata_from(layout.metadata_from), index, row != "subject")
        scans, described = read_scans(index, index.dataset_of(layout.matches[0].path))
        add_scans(layout, scans)
        matches = {
            split: [match for match in layout.matches if match.path.startswith(_prefix(index, directory, split))]
            for split, directory in config.splits.items()
        }
        in_split = {match.path for matched in matches.values() for match in matched}
        reasons |= {match.path: "in no split" for match in layout.matches if match.path not in in_split}
        reasons |= layout.left_out
        descriptions |= described | layout.descriptions
        for name in [name for name in metadata.dtypes if name in columns]:
            metadata.rename(name, f"participants_{name}")
    grouped = {split: _group(matched, row) for split, matched in matches.items()}
    _report(grouped, metadata, subjects, lists_subjects, row, config)

    features = datasets.Features({"subject_id": datasets.Value("string")})
    if row == "session" or row == "file" and _has_sessions(matches):
        features["session_id"] = datasets.Value("string")
    if row == "file":
        features["path"] = datasets.Value("string")
    of_columns = {name: _feature(name, column, columns) for name, column in columns.items()}
    of_tables = {name: datasets.Value(dtype) for name, dtype in metadata.dtypes.items()}
    for name in of_tables:
        if name in features or name in of_columns:
            raise ValueError(f"column {name!r} is in the schema and in a table; rename one of them")
    features |= of_columns | of_tables if has_schema else of_tables | of_columns

    used: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    images_of: dict[int, dict[str, list[str]]] = {}
    for group in (group for groups in grouped.values() for group in groups.values()):
        images_of[id(group)] = images = {
            name: group.pick(name, column) for name, column in columns.items() if isinstance(column, ImageColumn)
        }
        used.update(path for paths in images.values() for path in paths)
    index.prefetch(
        file
        for column in columns.values()
        if isinstance(column, CompanionColumn)
        for images in images_of.values()
        for image in images[column.of]
        for file in index.companions(image, column.extension)
    )
    for split, groups in grouped.items():
        rows[split] = []
        for key in sorted(groups, key=lambda key: tuple(part or "" for part in key)):
            values = dict(zip(("subject_id", "session_id", "path"), key, strict=False)) | metadata.get(key)
            for name, column in columns.items():
                values[name] = _cell(name, column, columns, images_of[id(groups[key])], groups[key], index)
            rows[split].append({name: values[name] for name in features})
    unused = {image: reasons.get(image, "no column takes it") for image in index.images if image not in used}
    return Build(features, rows, unused if has_schema else reasons | unused, metadata.descriptions | descriptions)


def _feature(name: str, column: Column, columns: Mapping[str, Column]) -> Any:
    feature = datasets.Value(column.dtype if isinstance(column, ScanColumn) else "string")
    if isinstance(column, ImageColumn):
        feature = datasets.Nifti()
    source = _source(name, column)
    return datasets.List(feature) if source is not None and columns[source].many else feature


def _filter(config: BidsConfig, matches: list[Match], reasons: dict[str, str]) -> list[Match]:
    for key, capture in (("subjects", "subject"), ("sessions", "session")):
        wanted = wanted_labels(config, key)
        if wanted is not None:
            reasons |= {m.path: f"left out by {key}=" for m in matches if m.captures.get(capture) not in wanted}
            matches = [match for match in matches if match.captures.get(capture) in wanted]
    return matches


class _Row:
    """What matched for one row."""

    def __init__(self):
        self.by_column: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.captures: dict[str, dict[str, str]] = defaultdict(dict)  # placeholder -> value -> a file that has it

    def add(self, match: Match):
        self.by_column[match.column][match.rank].append(match.path)
        for name, value in match.captures.items():
            self.captures[name].setdefault(value, match.path)

    def pick(self, name: str, column: ImageColumn) -> list[str]:
        """The paths of the first pattern that has any, sorted."""
        ranks = self.by_column.get(name)
        paths = sorted(ranks[min(ranks)]) if ranks else []
        if len(paths) > 1 and not column.many:
            raise ValueError(
                f"column {name!r} takes one image a row, but {len(paths)} match: {', '.join(paths)}. Narrow the pattern, "
                'or keep them all with "many": True'
                + ('; or say row="session"' if len(self.captures["session"]) > 1 else "")
            )
        return paths


def _source(name: str, column: Column) -> str | None:
    """The image column whose files a column is about."""
    return name if isinstance(column, ImageColumn) else getattr(column, "of", None)


def _prefix(index: Index, directory: str, split: str) -> str:
    """What the paths of a split begin with."""
    directory = directory.strip("/").removeprefix("./")
    if directory not in ("", ".") and directory not in index.tree:
        raise SchemaError(f"split {split!r}: there is no directory {directory} under {index.root}")
    return "" if directory in ("", ".") else directory + "/"


def _match(columns: Mapping[str, Column], index: Index, directory: str, split: str) -> list[Match]:
    """Every (image, pattern) of a split that belong together."""
    prefix = _prefix(index, directory, split)
    images = [image for image in index.images if image.startswith(prefix)]
    return [
        Match(name, rank, image, captures)
        for name, column in columns.items()
        if isinstance(column, ImageColumn)
        for rank, pattern in enumerate(column.patterns)
        for image in images
        if (captures := pattern.match(image[len(prefix) :])) is not None
    ]


def _refuse_unmatched(
    columns: Mapping[str, Column], matches: Mapping[str, list[Match]], index: Index, splits: Mapping[str, str]
) -> None:
    matched = {match.column for split in matches.values() for match in split}
    for name, column in columns.items():
        if isinstance(column, ImageColumn) and not column.optional and name not in matched:
            pattern = column.patterns[0]
            patterns = " or ".join(repr(pattern.text) for pattern in column.patterns)
            hint = pattern.nearest(index.tree) if set(splits.values()) == {""} else ""
            raise SchemaError(
                f"column {name!r}: no image under {index.root} matches {patterns}{'; ' if hint else ''}{hint}. "
                'Mend the pattern or data_dir, or mark the column "optional": True'
            )
    if not matched:
        pattern = next(column for column in columns.values() if isinstance(column, ImageColumn)).patterns[0]
        raise SchemaError(
            f"no image under {index.root} matches any column, such as {pattern.text!r}; {pattern.nearest(index.tree)}"
        )


def _has_sessions(matches: Mapping[str, list[Match]]) -> bool:
    return any("session" in match.captures for split in matches.values() for match in split)


def _group(matches: list[Match], row: str) -> dict[Key, _Row]:
    parts = ("subject", "session")[: 1 if row == "subject" else 2]
    rows: dict[Key, _Row] = defaultdict(_Row)
    for match in matches:
        key = tuple(match.captures.get(part) for part in parts)
        rows[(*key, match.path) if row == "file" else key].add(match)
    return dict(rows)


def _report(
    grouped: dict[str, dict[Key, _Row]],
    metadata: Metadata,
    subjects: set[str],
    lists_subjects: bool,
    row: str,
    config: BidsConfig,
) -> None:
    """Says who is in a table without files or has files and is in no table. Adds rows of those without images."""
    with_images = {key[0] for groups in grouped.values() for key in groups if key[0] is not None}
    only = wanted_labels(config, "subjects")
    missing = set(subjects)
    for path, listed in metadata.listed.items():
        in_table = {key[0] for key in listed}
        if with_images - in_table:
            logger.warning(f"{path}: nothing about {_named(with_images - in_table)}; the values are null")
        if only is not None:
            in_table &= set(only)
        if in_table - with_images and lists_subjects and row != "file" and not _is_filtered(config):
            first = next(iter(grouped))
            where = f" of split {first!r}" if len(grouped) > 1 else ""
            logger.warning(f"{path}: no image of {_named(in_table - with_images)}; the rows{where} have null images")
            missing |= in_table
    if row != "file":
        for subject in missing - with_images:
            next(iter(grouped.values()))[(subject, None) if row == "session" else (subject,)] = _Row()


def _is_filtered(config: BidsConfig) -> bool:
    return any(getattr(config, key) for key in FILTERS if key != "subjects")


def _named(subjects: set[str]) -> str:
    names = ", ".join(sorted(subjects)[:_NAMED])
    more = f" and {len(subjects) - _NAMED} more" if len(subjects) > _NAMED else ""
    return f"{len(subjects)} subject{'s' * (len(subjects) > 1)} ({names}{more})"


def _cell(
    name: str, column: Column, columns: Mapping[str, Column], images: Mapping[str, list[str]], row: _Row, index: Index
) -> Any:
    if isinstance(column, CaptureColumn):
        values = row.captures[column.placeholder]
        if len(values) > 1:
            (one, a), (other, b) = list(values.items())[:2]
            raise ValueError(
                f"column {name!r}: a row has one {{{column.placeholder}}}, but {a} has {one} and {b} has {other}"
            )
        return next((column.labels.get(value, value) for value in values), None)
    source = _source(name, column)
    paths = images[source]
    if isinstance(column, ImageColumn):
        values = [index.absolute(path) for path in paths]
    elif isinstance(column, ScanColumn):
        values = [column.values.get(path) for path in paths]
    elif isinstance(column, CompanionColumn):
        values = [_companion_text(path, column.extension, index) for path in paths]
    else:
        labels = [entities(path).get(column.entity) for path in paths]
        values = [column.labels.get(label, label) for label in labels]
    return values if columns[source].many else next(iter(values), None)


def _companion_text(image: str, extension: str, index: Index) -> str | None:
    texts = {path: index.read_text(path) for path in index.companions(image, extension)}
    if extension != ".json" or len(texts) < 2:
        return next(iter(texts.values()), None)
    # BIDS: of a key that stands at several levels, the value nearest to the image counts.
    merged = {}
    for path, text in reversed(texts.items()):
        try:
            merged |= json.loads(text)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: is no JSON object ({e})") from None
    return json.dumps(merged)
