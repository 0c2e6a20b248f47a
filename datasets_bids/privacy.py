"""What in a tree, or in the rows of a dataset, tells who a participant is.

How it works:

- Four places are looked at: JSON sidecars, tables, NIfTI headers with their extensions, and the headers of gzip files.
- What identifies (names, identifiers, addresses, serial numbers, dates, ages above 89) is an "error"; what may (an institution, a
  time of day, the name and time that gzip keeps) is a "warning".
- BIDS asks to shift dates to 1925 or before, so a date of that time is none. A value that says it was removed is none either.
- Whether a face was removed is not among these questions: no software can tell. A picture is for a person to look at.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


# HIPAA, Safe Harbor: all ages above 89 are one group. BIDS caps the column `age` there.
MAX_AGE = 89

# BIDS, "Shifting dates": dates are shifted to 1925 or earlier.
LAST_SHIFTED_YEAR = 1925

# DICOM keywords, as converters write them into sidecars, that identify whatever their value is.
_IDENTITY = set(
    """
    PatientName PatientID PatientBirthDate PatientBirthTime PatientBirthName PatientAddress PatientTelephoneNumbers
    PatientMotherBirthName PatientComments OtherPatientIDs OtherPatientNames IssuerOfPatientID MedicalRecordLocator
    AccessionNumber AdmissionID MilitaryRank ReferringPhysicianName PerformingPhysicianName RequestingPhysician
    PhysiciansOfRecord NameOfPhysiciansReadingStudy OperatorsName InstitutionAddress StationName DeviceSerialNumber
    StudyInstanceUID SeriesInstanceUID SOPInstanceUID FrameOfReferenceUID
    """.split()
)
# Those of dates, which identify unless they were shifted.
_DATES = set(
    """
    AcquisitionDateTime AcquisitionDate StudyDate SeriesDate ContentDate InstanceCreationDate StudyDateTime SeriesDateTime
    PerformedProcedureStepStartDate PerformedProcedureStepStartDateTime ScheduledProcedureStepStartDate ScanDate DateOfScan
    InjectionDate
    """.split()
)
_TIMES = {"AcquisitionTime", "StudyTime", "SeriesTime", "ContentTime", "InstanceCreationTime"}
_INSTITUTION = {"InstitutionName", "InstitutionalDepartmentName"}

# Headers of table columns, in small letters and nothing else.
_IDENTITY_COLUMNS = set(
    """
    name firstname lastname surname fullname patientname participantname initials birthdate dateofbirth birthday dob
    zip zipcode postalcode postcode address street email phone telephone ssn socialsecuritynumber mrn medicalrecordnumber
    patientid accessionnumber
    """.split()
)

# What a value says that was removed, in small letters.
_REMOVED = {"", "0", *"n/a na none null nan anonymous anonymized anonymised anon removed redacted".split()}
_REMOVED |= {*"deidentified de-identified unknown x xxx xxxx".split()}

# 2019-03-04, 2019/3/4, 20190304, 20190304101500 (DICOM) or 4.3.2019, but no part of a version (v1.0.20190902) or of an identifier.
_DATE = re.compile(
    r"(?<![0-9A-Za-z.])((?:18|19|20)\d\d)(?:([-/])(?:0?[1-9]|1[0-2])\2(?:0?[1-9]|[12]\d|3[01])|"
    r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{6}(?:\.\d+)?)?)(?=T|[^0-9A-Za-z]|$)|"
    r"(?<![0-9.])(?:0?[1-9]|[12]\d|3[01])([./])(?:0?[1-9]|1[0-2])\3((?:18|19|20)\d\d)(?![0-9.])"
)
_ISO_DATE = re.compile(r"((?:18|19|20)\d\d)-\d\d-\d\d(?:[T ]\d\d:\d\d.*)?")

# NIfTI: codes of header extensions (nifti1_io.h); 2 holds DICOM elements.
_DICOM_EXTENSION = 2
_TAGS = {
    (0x0008, 0x0018): "SOPInstanceUID",
    (0x0008, 0x0020): "StudyDate",
    (0x0008, 0x0021): "SeriesDate",
    (0x0008, 0x0022): "AcquisitionDate",
    (0x0008, 0x0023): "ContentDate",
    (0x0008, 0x002A): "AcquisitionDateTime",
    (0x0008, 0x0050): "AccessionNumber",
    (0x0008, 0x0080): "InstitutionName",
    (0x0008, 0x0081): "InstitutionAddress",
    (0x0008, 0x0090): "ReferringPhysicianName",
    (0x0008, 0x1010): "StationName",
    (0x0008, 0x1050): "PerformingPhysicianName",
    (0x0008, 0x1070): "OperatorsName",
    (0x0010, 0x0010): "PatientName",
    (0x0010, 0x0020): "PatientID",
    (0x0010, 0x0030): "PatientBirthDate",
    (0x0010, 0x1000): "OtherPatientIDs",
    (0x0010, 0x1001): "OtherPatientNames",
    (0x0010, 0x1010): "PatientAge",
    (0x0010, 0x1040): "PatientAddress",
    (0x0018, 0x1000): "DeviceSerialNumber",
    (0x0020, 0x000D): "StudyInstanceUID",
    (0x0020, 0x000E): "SeriesInstanceUID",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one file.

    Attributes:
        path (`str`): relative to the root; empty where it is about the whole dataset
        problem (`str`): what it is, going on after the path: `"is empty (0 bytes)"`
        field (`str`, *optional*): of the sidecar, table or header
        severity (`"error"` or `"warning"`)
    """

    path: str
    problem: str
    field: str | None = None
    severity: str = "error"

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.path, self.field)))
        return f"{where}: {self.problem}" if where else self.problem


def in_json(value: Any, path: str, prefix: str = "") -> Iterator[Finding]:
    """What identifies in a sidecar's content, at any depth."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, dict | list):
                yield from in_json(item, path, f"{prefix.rstrip('.')}[{i}].")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, dict | list) and not _keyword(key) & (_IDENTITY | _DATES):
                yield from in_json(item, path, f"{prefix}{key}.")
            else:
                yield from _in_field(key, item, path, prefix + key)


def _keyword(key: str) -> set[str]:
    # dcmstack writes AcquisitionDate, others "Patient's Name", patient_name or global.const.PatientName
    plain = re.sub(r"[^A-Za-z]", "", str(key).rpartition(".")[2].replace("'s", "")).lower()
    return {_KEYWORDS[plain]} if plain in _KEYWORDS else set()


_KEYWORDS = {name.lower(): name for name in _IDENTITY | _DATES | _TIMES | _INSTITUTION | {"PatientAge"}}


def _in_field(key: str, value: Any, path: str, field: str) -> Iterator[Finding]:
    """What a DICOM field says; nothing for any other field."""
    (keyword,) = _keyword(key) or {None}
    if keyword is None or removed(value):
        return
    # The list of what is to be removed does not repeat it: lists are sent around.
    if keyword == "PatientAge":
        age = re.fullmatch(r"0*(\d+)(?:\.\d+)?Y?", str(value).strip(), re.IGNORECASE)
        if age and int(age[1]) > MAX_AGE:
            yield Finding(path, f"is above {MAX_AGE} years: write 89", field)
    elif keyword in _DATES:
        if _unshifted(str(value)):
            yield Finding(path, f"holds a date: remove it, or shift it to {LAST_SHIFTED_YEAR} or before", field)
    elif keyword in _TIMES:
        yield Finding(path, "holds a time of day", field, "warning")
    elif keyword in _INSTITUTION:
        yield Finding(path, "names the institution", field, "warning")
    elif keyword == "PatientBirthDate" and _DATE.search(str(value)) and not _unshifted(str(value)):
        return
    elif keyword == "PatientID" and str(value).removeprefix("sub-") in _labels(path):
        return  # the pseudonym that all file names have
    else:
        yield Finding(path, "identifies: remove it", field)


def _labels(path: str) -> set[str]:
    return set(re.findall(r"sub-([0-9A-Za-z+]+)", path))


def removed(value: Any) -> bool:
    """Whether a value says nothing: missing, blank, or a word for "removed"."""
    if value is None or isinstance(value, dict | list) and not value:
        return True
    return str(value).strip().lower() in _REMOVED


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 24 else text[:21] + "...")


def _unshifted(text: str) -> bool:
    """Whether there is a date after 1925 in `text`."""
    return any(int(match[1] or match[4]) > LAST_SHIFTED_YEAR for match in _DATE.finditer(text))


def in_table(
    columns: Mapping[str, Iterable[Any]], path: str, units: Mapping[str, str] = {}, first_row: int = 2
) -> Iterator[Finding]:
    """What identifies in a table about people.

    Args:
        columns (`dict`): header -> cells; `None` where there is no value
        units (`dict[str, str]`): header -> unit, as its data dictionary has it; ages are in years where there is none
        first_row (`int`): what the first cell's row is called
    """
    for name, cells in columns.items():
        plain = re.sub(r"[^a-z]", "", name.lower())
        words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
        rows = [(row, cell) for row, cell in enumerate(cells, first_row) if cell is not None and not removed(cell)]
        if plain in _IDENTITY_COLUMNS or _keyword(name) & _IDENTITY:
            # Shifted dates of birth are as good as removed.
            rows = [(row, cell) for row, cell in rows if not _ISO_DATE.fullmatch(str(cell)) or _unshifted(str(cell))]
            yield from _of_column(path, name, rows, "identifies: remove the column")
        elif words[:1] == ["age"] or words[-1:] == ["age"]:
            factor = _per_year(units.get(name) or name)
            old = [
                (row, cell)
                for row, cell in rows
                if (number := _number(cell)) is not None and number > MAX_AGE * factor
            ]
            yield from _of_column(path, name, old, f"is above {MAX_AGE} years: write 89")
        else:
            dates = [(row, cell) for row, cell in rows if _is_date(cell)]
            problem = f"holds dates: remove them, or shift them to {LAST_SHIFTED_YEAR} or before"
            yield from _of_column(path, name, dates, problem)


def _of_column(path: str, name: str, rows: list[tuple[int, Any]], problem: str) -> Iterator[Finding]:
    if rows:
        numbers = ", ".join(str(row) for row, _ in rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        yield Finding(path, f"{problem} (row{'s' * (len(rows) > 1)} {numbers})", f"column {name!r}")


def _is_date(cell: Any) -> bool:
    if hasattr(cell, "year"):  # a date of a spreadsheet
        return cell.year > LAST_SHIFTED_YEAR
    match = isinstance(cell, str) and _ISO_DATE.fullmatch(cell.strip())
    return bool(match) and int(match[1]) > LAST_SHIFTED_YEAR


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _per_year(unit: str) -> float:
    unit = unit.lower()
    return next((n for word, n in (("month", 12), ("week", 52.18), ("day", 365.25)) if word in unit), 1)


def in_header(header: Any, path: str) -> Iterator[Finding]:
    """What identifies in the free text of a NIfTI header and in its extensions.

    Args:
        header (`nibabel.Nifti1Header`): or of NIfTI-2
    """
    names = header.keys()
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        if field not in names:
            continue
        text = bytes(header[field].item()).split(b"\0")[0].decode("latin-1").strip()
        if _unshifted(text):
            yield Finding(path, "holds a date: rewrite the header", f"header field {field}")
        elif re.search(r"[A-Za-z]{2,}\^[A-Za-z]", text):  # DICOM writes names as FAMILY^GIVEN
            yield Finding(path, "holds a name: rewrite the header", f"header field {field}")
        elif re.search(r"\bTime=\d{6}", text):
            yield Finding(path, "holds a time of day", f"header field {field}", "warning")
        # dcm2niix keeps the repetition time in it; in Analyze it was the name of a database, or of a patient.
        elif field == "db_name" and text and not text.startswith("?TR:"):
            yield Finding(path, f"holds {_short(text)}: see that it is no name", f"header field {field}", "warning")
    for extension in header.extensions:
        yield from _in_extension(int(extension.get_code()), extension.content, path)


def _in_extension(code: int, content: bytes, path: str) -> Iterator[Finding]:
    field = f"header extension {code}"
    text = content.rstrip(b"\0")
    if code == _DICOM_EXTENSION:
        found = list(_dicom_elements(content))
        for keyword, value in found:
            yield from _in_field(keyword, value, path, f"{field}, {keyword}")
        if not found:
            yield Finding(path, "holds DICOM elements that could not be listed: remove it", field)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        words = set(re.findall(r"[A-Za-z]+", text.decode("latin-1")))
        for keyword in sorted(words & (_IDENTITY | _DATES)):
            yield Finding(path, f"names {keyword}: remove what identifies", field)
        return
    for finding in in_json(value, path):
        yield Finding(path, finding.problem, f"{field}, {finding.field}", finding.severity)


def _dicom_elements(content: bytes) -> Iterator[tuple[str, str]]:
    """(keyword, value) of those elements of `_TAGS` that stand in a DICOM extension, in explicit or implicit VR."""
    for (group, element), keyword in _TAGS.items():
        tag = struct.pack("<HH", group, element)
        at = content.find(tag)
        if at < 0 or at + 8 > len(content):
            continue
        explicit = re.match(rb"[A-Z]{2}", content[at + 4 : at + 6])
        (length,) = struct.unpack_from("<H" if explicit else "<I", content, at + (6 if explicit else 4))
        value = content[at + 8 : at + 8 + length]
        yield keyword, value.decode("latin-1").strip(" \0")


def in_gzip(start: bytes, path: str) -> Iterator[Finding]:
    """The name and the time in the header of a gzip file (RFC 1952), which most programs write.

    Args:
        start (`bytes`): how the file begins; a kilobyte will do
    """
    if start[:2] != b"\x1f\x8b" or len(start) < 10:
        return
    flags, mtime = start[3], struct.unpack_from("<I", start, 4)[0]
    at = 10
    if flags & 4:
        at += 2 + int.from_bytes(start[at : at + 2], "little")
    kept = []
    if flags & 8:
        kept.append(f"the file name {_short(start[at:].partition(bytes(1))[0].decode('latin-1'))}")
    if mtime:
        kept.append("a time")
    if kept:
        problem = f"keeps {' and '.join(kept)}: compress it again with `gzip -n`"
        yield Finding(path, problem, "gzip header", "warning")
