"""The builder for BIDS trees: a schema and tables in, rows of paths out. No volume is read."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import datasets

from .index import Index, index_tree
from .schema import (
    CaptureColumn,
    Column,
    CompanionColumn,
    ImageColumn,
    SchemaError,
    did_you_mean,
    entities,
    parse_schema,
)
from .tables import Key, Metadata, parse_metadata_from, read_metadata


logger = datasets.utils.logging.get_logger(__name__)

_NAMED = 10  # how many subjects one warning names


@dataclass
class BidsConfig(datasets.BuilderConfig):
    """
    BuilderConfig for BIDS and nearly-BIDS trees of NIfTI files. Holds plain data only.

    Args:
        schema (`dict`): column -> where its file is; see `datasets_bids.schema`.
        row (`"subject"` or `"session"`, *optional*): what one row is. By default a session where the schema's patterns
            match sessions, else a subject. In a dataset of sessions, files of no session are a row of their own, with
            `session_id` null.
        metadata_from (`str`, `dict` or `list`, *optional*): the table or tables with what is known of a subject (or
            session), relative to `data_dir`; see `datasets_bids.tables.TableSpec`.
        splits (`dict[str, str]`, defaults to `{"train": ""}`): split -> its directory, which the schema's patterns are
            relative to.
        release (`str`, *optional*): the release of the dataset that the schema was written for; named in errors.
        preview (`dict`, *optional*): how images are shown. Column of a mask -> column of the image that it is drawn on;
            column of an image -> `[black, white]`, values in the image's unit. By default masks are drawn alone, CT in
            the brain window and everything else between percentiles.
        expected (`dict`, *optional*): what the release holds, for `python -m datasets_bids.validate`; see
            `datasets_bids.validation.parse_expected`.

    Example:

    ```py
    >>> import datasets_bids
    >>> from datasets import load_dataset
    >>> ds = load_dataset("bids", data_dir="ds114", schema={"t1w": "anat/*_T1w.nii.gz"}, metadata_from="participants.tsv")
    ```
    """

    schema: dict[str, Any] | None = None
    row: str | None = None
    metadata_from: str | dict[str, Any] | list[Any] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": ""})
    release: str | None = None
    preview: dict[str, Any] | None = None
    expected: dict[str, Any] | None = None


class BidsBuilder(datasets.GeneratorBasedBuilder):
    """Yields one example a subject or session; images as paths."""

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
        self._index = index_tree(config.data_dir)
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
                self._index = index_tree(self.config.data_dir)
            features, self._rows, self.unused_images = build_rows(self.config, self._index)
        except SchemaError as e:
            release = f". This builder reads {self.config.release}" if self.config.release else ""
            raise SchemaError(f"{where}, {e}{release}") from None
        except (ValueError, OSError) as e:
            raise type(e)(f"{where}: {e}") from None
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager):
        if self._rows is None:
            raise ValueError(f"builder {self.dataset_name!r} reads a local tree: pass its directory as data_dir=")
        return [datasets.SplitGenerator(name=split, gen_kwargs={"rows": rows}) for split, rows in self._rows.items()]

    def _generate_examples(self, rows):
        for row in rows:
            yield "/".join(filter(None, (row["subject_id"], row.get("session_id")))), row


def build_rows(
    config: BidsConfig, index: Index | None
) -> tuple[datasets.Features | None, dict[str, list[dict[str, Any]]] | None, list[str]]:
    """Matches a config with a tree.

    Args:
        config (`BidsConfig`): what the columns are
        index (`Index`, *optional*): the tree; without one the config is checked and nothing else

    Returns:
        the features; split -> rows, sorted by subject and session, with absolute paths of images; and the images (paths
        relative to the root) that are in no column

    Raises:
        SchemaError: a mistake in the schema, or a pattern that matches nothing
        ValueError: two files for a cell that takes one, or a table that cannot be read
    """
    if not config.schema:
        raise SchemaError('no schema: pass schema={column: pattern}, such as {"t1w": "anat/*_T1w.nii.gz"}')
    columns = parse_schema(config.schema)
    tables = parse_metadata_from(config.metadata_from)
    if config.row not in (None, "subject", "session"):
        raise SchemaError(f'row={config.row!r} is neither "subject" nor "session"')
    if not isinstance(config.splits, Mapping) or not config.splits:
        raise SchemaError('splits is a dictionary: split -> its directory, such as {"train": "Training"}')
    if index is None:
        return None, None, []

    matches = {split: _match(columns, index, directory, split) for split, directory in config.splits.items()}
    _refuse_unmatched(columns, matches, index, config.splits)
    by_session = config.row == "session" or config.row is None and _has_sessions(matches)
    metadata = read_metadata(tables, index, by_session)
    grouped = {split: _group(matched, by_session) for split, matched in matches.items()}
    _report(grouped, metadata, by_session)

    features = datasets.Features({"subject_id": datasets.Value("string")})
    if by_session:
        features["session_id"] = datasets.Value("string")
    for name, column in columns.items():
        feature = datasets.Nifti() if isinstance(column, ImageColumn) else datasets.Value("string")
        source = _source(name, column)
        features[name] = datasets.List(feature) if source is not None and columns[source].many else feature
    for name, dtype in metadata.dtypes.items():
        if name in features:
            raise ValueError(f"column {name!r} is in the schema and in a table; rename one of them")
        features[name] = datasets.Value(dtype)

    used: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, groups in grouped.items():
        rows[split] = []
        for key in sorted(groups, key=lambda key: tuple(part or "" for part in key)):
            images = {
                name: groups[key].pick(name, column)
                for name, column in columns.items()
                if isinstance(column, ImageColumn)
            }
            used.update(path for paths in images.values() for path in paths)
            row = dict(zip(("subject_id", "session_id"), key, strict=False))
            for name, column in columns.items():
                row[name] = _cell(name, column, columns, images, groups[key], index)
            rows[split].append(row | metadata.get(key))
    return features, rows, [image for image in index.images if image not in used]


@dataclass
class _Match:
    column: str
    rank: int  # of the pattern in its column's order
    path: str  # relative to the root
    captures: dict[str, str]


class _Row:
    """What matched for one row."""

    def __init__(self):
        self.by_column: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.captures: dict[str, dict[str, str]] = defaultdict(dict)  # placeholder -> value -> a file that has it

    def add(self, match: _Match):
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


def _match(columns: Mapping[str, Column], index: Index, directory: str, split: str) -> list[_Match]:
    """Every (image, pattern) of a split that belong together."""
    directory = directory.strip("/").removeprefix("./")
    if directory not in ("", ".") and directory not in index.tree:
        raise SchemaError(f"split {split!r}: there is no directory {directory} under {index.root}")
    prefix = "" if directory in ("", ".") else directory + "/"
    images = [image for image in index.images if image.startswith(prefix)]
    return [
        _Match(name, rank, image, captures)
        for name, column in columns.items()
        if isinstance(column, ImageColumn)
        for rank, pattern in enumerate(column.patterns)
        for image in images
        if (captures := pattern.match(image[len(prefix) :])) is not None
    ]


def _refuse_unmatched(
    columns: Mapping[str, Column], matches: Mapping[str, list[_Match]], index: Index, splits: Mapping[str, str]
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


def _has_sessions(matches: Mapping[str, list[_Match]]) -> bool:
    return any("session" in match.captures for split in matches.values() for match in split)


def _group(matches: list[_Match], by_session: bool) -> dict[Key, _Row]:
    rows: dict[Key, _Row] = defaultdict(_Row)
    for match in matches:
        subject = match.captures["subject"]
        rows[(subject, match.captures.get("session")) if by_session else (subject,)].add(match)
    return dict(rows)


def _report(grouped: dict[str, dict[Key, _Row]], metadata: Metadata, by_session: bool) -> None:
    """Says who is in a table without files or has files and is in no table; rows of the former are added."""
    subjects = {key[0] for groups in grouped.values() for key in groups}
    for path, listed in metadata.listed.items():
        in_table = {key[0] for key in listed}
        if subjects - in_table:
            logger.warning(f"{path}: nothing about {_named(subjects - in_table)}; the values are null")
        if in_table - subjects:
            first = next(iter(grouped))
            where = f" of split {first!r}" if len(grouped) > 1 else ""
            logger.warning(f"{path}: no image of {_named(in_table - subjects)}; the rows{where} have null images")
    for subject in {key[0] for listed in metadata.listed.values() for key in listed} - subjects:
        next(iter(grouped.values()))[(subject, None) if by_session else (subject,)] = _Row()


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
