"""Tables of participants and phenotypes: from .tsv, .csv and .xlsx cells to typed columns, keyed by subject.

BIDS, "Data files for participants": one line a participant, `participant_id` first, `n/a` where a value is missing.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pandas as pd
from datasets.utils.logging import get_logger

from .index import Index
from .schema import _IDENTIFIERS, Pattern, SchemaError, did_you_mean
from .storage import open_file


logger = get_logger(__name__)

Key = tuple[str | None, ...]  # (subject,), (subject, session) or (subject, session, path)

_KEYS = ("participant_id", "subject_id")
_NULLS = {"", "n/a", "N/A"}
_DTYPES = ("string", "int64", "float64", "bool")
# A leading zero is part of a name ("007"), not of a number.
_NAME_OF_DIGITS = re.compile(r"0[0-9]")
# BIDS, "Tabular files": what a data dictionary says of the form of a column; all other forms are text.
_FORMATS = {"integer": "int64", "number": "float64", "boolean": "bool"}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NAMED = 10  # how many subjects or cells one warning names


@dataclass(frozen=True)
class Variable:
    """One column of a table: the name it has there, its type (inferred where `None`) and what its labels stand for."""

    column: str
    dtype: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """One entry of `metadata_from`.

    Attributes:
        path (`str`): pattern of the table relative to the root; with `{subject}` in it, of one table a subject
        columns (`dict[str, Variable]`): name in the dataset -> where it comes from
        rest (`bool`): take the table's other columns too, under their own names (with the pattern's last word, as in
            `"Comment (outcome)"`, where an earlier table has that name); the default where `columns` are not given
        key (`str`, *optional*): the column with the subject, by default `participant_id` or `subject_id`
        session_key (`str`): the column with the session
        sheet (`str`, *optional*): the sheet of an .xlsx file, by default the first
        optional (`bool`): the table may be missing
    """

    path: str
    columns: Mapping[str, Variable]
    rest: bool
    key: str | None = None
    session_key: str = "session_id"
    sheet: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Cell:
    value: Any
    path: str
    row: int  # as a spreadsheet counts: the header is row 1
    column: str


def parse_metadata_from(metadata_from: object) -> list[TableSpec]:
    """Checks `metadata_from`: a path, a dictionary (see [`TableSpec`]) or a list of these.

    Raises:
        SchemaError: names the table and the fix
    """
    entries = (
        [] if metadata_from is None else metadata_from if isinstance(metadata_from, list | tuple) else [metadata_from]
    )
    return [_parse_table(entry) for entry in entries]


def _parse_table(entry: object) -> TableSpec:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise SchemaError(f"metadata_from: expected a path or a dictionary with a 'path', got {entry!r}")
    where = f"metadata_from {entry['path']!r}"
    known = TableSpec.__dataclass_fields__
    for key in entry:
        if key not in known:
            raise SchemaError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known)} (the keys are {', '.join(known)})"
            )
    columns = entry.get("columns")
    if not isinstance(columns, Mapping | None):
        raise SchemaError(f"{where}: 'columns' is a dictionary: name in the dataset -> name in the table")
    variables = {}
    for name, variable in (columns or {}).items():
        variable = {"column": variable} if isinstance(variable, str) else variable
        fields = Variable.__dataclass_fields__
        if not isinstance(variable, Mapping) or "column" not in variable:
            raise SchemaError(f"{where}, column {name!r}: needs 'column', the name in the table")
        for key in variable:
            if key not in fields:
                raise SchemaError(f"{where}, column {name!r}: unknown key {key!r}{did_you_mean(str(key), fields)}")
        if variable.get("dtype") not in (None, *_DTYPES):
            raise SchemaError(f"{where}, column {name!r}: dtype {variable['dtype']!r} is none of {', '.join(_DTYPES)}")
        variables[name] = Variable(**variable)
    options = {key: value for key, value in entry.items() if key != "columns"}
    try:
        Pattern(entry["path"], anchored=True)
    except SchemaError as e:
        raise SchemaError(f"metadata_from: {e}") from None
    return TableSpec(**{"rest": columns is None, **options, "columns": variables})


@dataclass
class Metadata:
    """What the tables say.

    Attributes:
        dtypes (`dict[str, str]`): column -> `"string"`, `"int64"`, `"float64"` or `"bool"`
        rows (`dict[Key, dict]`): (subject,) or (subject, session) -> column -> value or `None`
        listed (`dict[str, set[Key]]`): table, as `metadata_from` names it -> the rows it lists
        descriptions (`dict[str, str]`): column -> what the table's data dictionary says: meaning, levels, units
    """

    dtypes: dict[str, str] = field(default_factory=dict)
    rows: dict[Key, dict[str, Any]] = field(default_factory=dict)
    listed: dict[str, set[Key]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)

    def get(self, key: Key) -> dict[str, Any]:
        """The values of a row: of its session where a table has sessions, of its subject otherwise."""
        values = dict.fromkeys(self.dtypes) | self.rows.get(key[:1], {})
        return values | self.rows.get(key[:2], {}) if len(key) > 1 else values

    def rename(self, old: str, new: str) -> None:
        """Renames a column, in its place."""
        self.dtypes = {new if name == old else name: dtype for name, dtype in self.dtypes.items()}
        if old in self.descriptions:
            self.descriptions[new] = self.descriptions.pop(old)
        for values in self.rows.values():
            if old in values:
                values[new] = values.pop(old)


def read_metadata(specs: list[TableSpec], index: Index, by_session: bool) -> Metadata:
    """Reads and types the tables of a tree.

    Cells that are empty or `n/a` are null; so are cells that cannot be read as their column's type and per-subject
    tables that cannot be read at all, each with a warning that names the file (and row and column).

    The types are the spec's, else those of the data dictionary beside the table (`participants.json`: levels are text,
    `Format` may be number, integer or boolean; text where a cell does not fit), else inferred from the cells.

    Raises:
        ValueError: a table that cannot be read, that lacks a column or a subject, or that has a subject twice
    """
    metadata = Metadata()
    for spec in specs:
        metadata.listed[spec.path] = listed = set()
        dictionary: dict[str, Any] = {}
        for name, column in _read_cells(spec, index, by_session, listed, dictionary).items():
            variable = spec.columns.get(name) or Variable(name)
            described = dictionary.get(variable.column)
            if name in metadata.dtypes and name not in spec.columns:
                name = f"{name} ({PurePosixPath(spec.path).stem.rpartition('_')[2]})"
            if name in metadata.dtypes:
                raise ValueError(
                    f"{spec.path}: column {name!r} stands in an earlier table too; name it in 'columns' of metadata_from"
                )
            dtype, values = _typed(column, variable, described)
            metadata.dtypes[name] = dtype
            if text := _description(described):
                metadata.descriptions[name] = text
            for key, value in values.items():
                metadata.rows.setdefault(key, {})[name] = value
    return metadata


def read_scans(index: Index, dataset: str) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, str]]:
    """What the `scans.tsv` files of a dataset say of its images.

    Args:
        dataset (`str`): directory of the dataset, relative to the root

    Returns:
        variable -> (type, path of the image relative to the root -> value); and variable -> its description
    """
    prefix = f"{dataset}/" if dataset else ""
    paths = [file.path for file in index.files if file.path.startswith(prefix) and file.path.endswith("_scans.tsv")]
    paths = [path for path in paths if index.dataset_of(path) == dataset]
    index.prefetch(paths)
    cells: dict[str, dict[Key, Cell]] = {}
    dictionary: dict[str, Any] = {}
    for path in paths:
        try:
            table = read_table(index.absolute(path), opener=lambda _: index.open(path))
            if "filename" not in table:
                raise ValueError(f"{index.absolute(path)} has no column 'filename'")
        except ValueError as e:
            logger.warning(f"{e}; its values are null")
            continue
        dictionary |= _read_dictionary(path, index)
        # BIDS: relative to the directory of scans.tsv.
        directory = path.rpartition("/")[0]
        for column in set(table.columns) - {"filename"}:
            for row, name, value in zip(table.index, table["filename"], _column(table, column), strict=True):
                if name is not None and value is not None:
                    key = (f"{directory}/{name}",)
                    cells.setdefault(column, {})[key] = Cell(value, index.absolute(path), row, column)
    scans = {}
    for column in sorted(cells):
        dtype, values = _typed(cells[column], Variable(column), dictionary.get(column))
        scans[column] = (dtype, {path: value for (path,), value in values.items()})
    return scans, {column: text for column in scans if (text := _description(dictionary.get(column)))}


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table.iloc[:, list(table.columns).index(name)]  # the first, where a header has a name twice


def _read_dictionary(path: str, index: Index) -> dict[str, Any]:
    """The data dictionary of a table: column -> its description."""
    dictionary: dict[str, Any] = {}
    for sidecar in reversed(index.companions(path, ".json")):
        try:
            described = json.loads(index.read_text(sidecar))
        except ValueError as e:
            logger.warning(f"{sidecar}: cannot be read as JSON ({e}); the types of {path} are inferred")
            continue
        dictionary |= described if isinstance(described, dict) else {}
    return dictionary


def _description(described: Any) -> str | None:
    """One line for the card."""
    if not isinstance(described, Mapping):
        return None
    parts = [str(described.get("Description") or described.get("LongName") or "").strip().rstrip(".")]
    levels = described.get("Levels")
    if isinstance(levels, Mapping):
        of = {
            level: text.get("Description", "") if isinstance(text, Mapping) else text for level, text in levels.items()
        }
        parts.append("levels: " + ", ".join(f"{level} = {text}" if text else str(level) for level, text in of.items()))
    if described.get("Units"):
        parts.append(f"unit: {described['Units']}")
    return "; ".join(filter(None, parts)) or None


def _read_cells(
    spec: TableSpec, index: Index, by_session: bool, listed: set[Key], dictionary: dict[str, Any]
) -> dict[str, dict[Key, Cell]]:
    """Column name in the dataset -> row key -> cell, for all files of a table. Adds the keys to `listed` and what data
    dictionaries say to `dictionary`.
    """
    pattern = Pattern(spec.path, anchored=True)
    matches = [(file.path, match) for file in index.files if (match := pattern.match(file.path)) is not None]
    per_subject = "subject" in pattern.placeholders
    if not matches and not spec.optional:
        raise ValueError(
            f"metadata_from {spec.path!r}: there is no such file under {index.root}; {pattern.nearest(index.tree)}"
        )
    if not matches:
        logger.warning(f"metadata_from {spec.path!r}: there is no such file under {index.root}; the values are null")
    if len(matches) > 1 and not per_subject:
        raise ValueError(
            f"metadata_from {spec.path!r} matches several files: {', '.join(path for path, _ in matches)}"
        )
    cells: dict[str, dict[Key, Cell]] = {name: {} for name in spec.columns}
    sources = {variable.column: name for name, variable in spec.columns.items()}
    found, headers = set(), {}
    index.prefetch(path for path, _ in matches)
    for relative, captures in matches:
        path = index.absolute(relative)
        try:
            table = read_table(path, sheet=spec.sheet, opener=lambda _: index.open(relative))
        except ValueError as e:
            if not per_subject:
                raise
            logger.warning(f"{e}; its values are null")
            continue
        headers |= dict.fromkeys(table.columns)
        dictionary |= _read_dictionary(relative, index)
        keys = dict(_row_keys(table, spec, path, captures, by_session))
        _refuse_duplicates(keys, listed, path, by_session)
        listed.update(keys.values())
        for source in table.columns:
            name = sources.get(source, source if spec.rest and source not in _identifying(spec, table) else None)
            if name is None:
                continue
            found.add(source)
            column = cells.setdefault(name, {})
            for (row, key), value in zip(keys.items(), _column(table, source), strict=True):
                column[key] = Cell(value, path, row, source)
    for source in sources:
        if headers and source not in found:
            raise ValueError(
                f"metadata_from {spec.path!r}: there is no column {source!r}{did_you_mean(source, headers)} "
                f"(the columns are {', '.join(headers)})"
            )
    return cells


def _refuse_duplicates(keys: Mapping[int, Key], listed: set[Key], path: str, by_session: bool) -> None:
    seen: dict[Key, int] = {}
    for row, key in keys.items():
        if key in seen or key in listed:
            where = f"in row {seen[key]}" if key in seen else "in another table of this pattern"
            raise ValueError(
                f"{path}, row {row}: {' '.join(filter(None, key))} stands {where} already, and every row of the dataset "
                "takes one" + ("" if by_session else '; if a row of the dataset is a session, say row="session"')
            )
        seen[key] = row


def _identifying(spec: TableSpec, table: pd.DataFrame) -> set[str]:
    return {spec.key or next((key for key in _KEYS if key in table), ""), spec.session_key}


def _row_keys(
    table: pd.DataFrame, spec: TableSpec, path: str, captures: Mapping[str, str], by_session: bool
) -> Iterable[tuple[int, Key]]:
    """(row as a spreadsheet counts it, its key) for every row of a table."""
    subject, session = captures.get("subject"), captures.get("session")
    key = spec.key or next((key for key in _KEYS if key in table), None)
    if subject is None and (key is None or key not in table):
        raise ValueError(
            f"{path} has no column {spec.key or ' or '.join(_KEYS)!r} to find the subject by; set 'key' in metadata_from "
            f"(its columns are {', '.join(table.columns)})"
        )
    sessions = table[spec.session_key] if by_session and spec.session_key in table else None
    for i, row in enumerate(table.index):
        of_subject = subject or _identifier(table[key].iloc[i], "subject")
        if of_subject is None:
            raise ValueError(f"{path}, row {row}, column {key!r}: no subject; every row needs one")
        of_session = (
            _identifier(sessions.iloc[i], "session") if sessions is not None else session if by_session else None
        )
        yield row, (of_subject,) if of_session is None else (of_subject, of_session)


def _identifier(value: Any, kind: str) -> str | None:
    """`01` or `sub-01` -> `sub-01`. Tables write identifiers both ways."""
    if value is None:
        return None
    text = str(value)
    return text if text.startswith(_IDENTIFIERS[kind]) else _IDENTIFIERS[kind] + text


def read_table(path: str, sheet: str | None = None, opener: Callable[[str], BinaryIO] = open_file) -> pd.DataFrame:
    """Reads a table with its first line as the header.

    Args:
        path (`str`): a local path or a URL
        sheet (`str`, *optional*): the sheet of an .xlsx file, by default the first
        opener (*optional*): opens `path` for reading bytes

    Returns:
        `pandas.DataFrame`: cells are `str` (in .xlsx also `int`, `float`, `bool` or dates), missing ones `None`. The
        index is the row as a spreadsheet counts it: the first line under the header is 2.

    Raises:
        ValueError: names the file and what is wrong with it
    """
    name = path.partition("::")[0]  # of zip://participants.tsv::/data/ds.zip
    extension = name[name.rfind(".") :].lower()
    try:
        if extension in (".tsv", ".csv"):
            with opener(path) as file:
                table = _read_delimited(file, "\t" if extension == ".tsv" else ",")
        elif extension == ".xlsx":
            with opener(path) as file:
                table = pd.read_excel(
                    io.BytesIO(file.read()),
                    sheet_name=0 if sheet is None else sheet,
                    dtype=object,
                    keep_default_na=False,
                    engine="openpyxl",
                )
        else:
            raise ValueError("a table is a .tsv, .csv or .xlsx file")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: cannot be read as UTF-8 ({e}); save it as UTF-8") from e
    except FileNotFoundError as e:
        raise ValueError(f"{path}: the file is missing (a link that leads nowhere?)") from e
    except PermissionError as e:
        raise ValueError(f"{path}: no permission to read it") from e
    except Exception as e:  # openpyxl and zipfile raise a dozen types for a damaged workbook
        raise ValueError(f"{path}: cannot be read as a table ({str(e).strip() or type(e).__name__})") from e
    table = table.astype(object)
    table.columns = [str(column).strip() for column in table.columns]
    table.index = range(2, len(table) + 2)
    for i in range(table.shape[1]):
        table.isetitem(i, pd.Series([_value(cell) for cell in table.iloc[:, i]], index=table.index, dtype=object))
    return table.dropna(how="all")


def _read_delimited(file: BinaryIO, delimiter: str) -> pd.DataFrame:
    # pandas.read_csv would shift or cut lines that are longer than the header.
    text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
    header, *lines = list(csv.reader(text, delimiter=delimiter)) or [[]]
    if not header:
        raise ValueError("the file has no header")
    for row, line in enumerate(lines, start=2):
        if len(line) > len(header):
            raise ValueError(f"row {row} has {len(line)} cells, the header has {len(header)}")
        line.extend([""] * (len(header) - len(line)))
    return pd.DataFrame(lines, columns=header, dtype=object)


def _value(cell: Any) -> Any:
    if isinstance(cell, str):
        cell = cell.strip()
        return None if cell in _NULLS else cell
    return None if pd.isna(cell) else cell


def _typed(cells: Mapping[Key, Cell], variable: Variable, described: Any = None) -> tuple[str, dict[Key, Any]]:
    """The type of a column and its values by row key; a value that is not of the type is null, with a warning."""
    values = {
        key: variable.labels.get(str(cell.value), cell.value) if cell.value is not None else None
        for key, cell in cells.items()
    }
    dtype = variable.dtype or _described_dtype(described, cells.values()) or _infer_dtype(values.values())
    typed, bad = {}, []
    for key, value in values.items():
        try:
            typed[key] = None if value is None else _convert(value, dtype)
        except (ValueError, OverflowError):
            typed[key] = None
            bad.append(cells[key])
    for cell in bad[:_NAMED]:
        logger.warning(
            f"{cell.path}, row {cell.row}, column {cell.column!r}: {cell.value!r} is not of type {dtype}; stored as null"
        )
    if len(bad) > _NAMED:
        logger.warning(f"{bad[0].path}, column {bad[0].column!r}: {len(bad) - _NAMED} more such cells")
    return dtype, typed


def _described_dtype(described: Any, cells: Iterable[Cell]) -> str | None:
    if not isinstance(described, Mapping) or not ("Levels" in described or "Format" in described):
        return None
    dtype = "string" if "Levels" in described else _FORMATS.get(str(described["Format"]), "string")
    for cell in cells:
        try:
            if cell.value is not None:
                _convert(cell.value, dtype)
        except (ValueError, OverflowError):
            logger.warning(
                f"{cell.path}, row {cell.row}, column {cell.column!r}: {cell.value!r} is no {described['Format']}, as the "
                "data dictionary says; the column is text"
            )
            return "string"
    return dtype


def _infer_dtype(values: Iterable[Any]) -> str:
    values = [value for value in values if value is not None]
    if not values or any(isinstance(value, str) and _NAME_OF_DIGITS.match(value) for value in values):
        return "string"
    if any(isinstance(value, bool) for value in values):
        return "bool" if all(isinstance(value, bool) for value in values) else "string"
    for dtype in ("int64", "float64"):
        try:
            for value in values:
                _convert(value, dtype)
            return dtype
        except (ValueError, OverflowError):
            continue
    return "string"


def _convert(value: Any, dtype: str) -> Any:
    if dtype == "string":
        if isinstance(value, float) and value.is_integer():
            return str(int(value))  # a spreadsheet holds 7 as 7.0
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    if dtype == "bool":
        if str(value).lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[str(value).lower()]
    if isinstance(value, str) and "_" in value or hasattr(value, "isoformat"):
        raise ValueError  # int() and float() take underscores, and a date is no number
    if dtype == "int64":
        number = int(value)
        if not isinstance(value, str) and number != value or not -(2**63) <= number < 2**63:
            raise ValueError
        return number
    number = float(value)
    return None if number != number else number
