"""Trees damaged one way at a time: the damage is named by the right check and file. The undamaged tree passes."""

import gzip
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets_bids import privacy, validate
from datasets_bids.index import index_tree
from datasets_bids.schema import SchemaError
from datasets_bids.validation import (
    Built,
    Finding,
    ValidationCheck,
    ValidationResult,
    check_bids,
    inspect_image,
    parse_expected,
    validate_tree,
)

from .trees import bids_tree, volume_bytes, write_json, write_sheet, write_text, write_volumes


BUILDER = """
from datasets_bids import BidsBuilder, BidsConfig


class Small(BidsBuilder):
    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            schema={
                "t1w": "{subject}/{session}/anat/{subject}_{session}_T1w.nii.gz",
                "dwi": "{subject}/{session}/dwi/{subject}_{session}_dwi.nii.gz",
                "bold": {"path": "{subject}/{session}/func/*_bold.nii", "many": True},
                "mask": "derivatives/masks/{subject}/{session}/anat/*_mask.nii.gz",
            },
            metadata_from={"path": "participants.tsv", "columns": {"age": {"column": "age", "dtype": "float64"}}},
            expected={
                "paths": ["dataset_description.json", "derivatives/masks/", "phenotype/*.tsv"],
                "subjects": 4,
                "sessions": 8,
                "rows": {"train": 8},
                "columns": {"t1w": 8, "dwi": {"count": 8, "tolerance": 1}, "mask": 8, "age": 8, "b*": 8},
                "images": {"bold": 8},
                "same_grid": [["t1w", "mask"]],
                "archive_md5": "%s",
            },
        )
    ]
"""

T1W = "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz"
DWI = "sub-02/ses-1/dwi/sub-02_ses-1_dwi.nii.gz"
BOLD = "sub-02/ses-1/func/sub-02_ses-1_task-rest_bold.nii"
MASK = "derivatives/masks/sub-02/ses-1/anat/sub-02_ses-1_space-orig_desc-brain_mask.nii.gz"
BVAL, BVEC = DWI.replace(".nii.gz", ".bval"), DWI.replace(".nii.gz", ".bvec")
SIDECAR = T1W.replace(".nii.gz", ".json")
SCANS = "sub-02/ses-1/sub-02_ses-1_scans.tsv"


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    bids_tree(folder / "tree")
    (folder / "tree.zip").write_bytes(b"the archive")
    write_text(folder / "small/small.py", BUILDER % hashlib.md5(b"the archive").hexdigest())
    return folder


@pytest.fixture
def small(undamaged, tmp_path):
    return Path(shutil.copytree(undamaged, tmp_path / "copy"))


def check(folder, *options):
    options = [
        str(folder / "small"),
        "--data-dir",
        str(folder / "tree"),
        "--archive",
        str(folder / "tree.zip"),
        *options,
    ]
    return validate.check_tree(validate.parse_args(options))


def by_name(result):
    return {check.name: check for check in result.checks}


def test_the_undamaged_tree_passes(undamaged):
    for options in ([], ["--deep"]):
        result = check(undamaged, *options)
        assert result.all_passed and {check.status for check in result.checks} == {"ok", "-"}, result.summary()
    counts = {name: (check.expected, check.actual) for name, check in by_name(result).items()}
    assert (
        counts["subjects"] == ("4", "4") and counts["sessions"] == ("8", "8") and counts["rows of train"] == ("8", "8")
    )
    assert counts["rows with dwi"] == ("8 ± 1", "8") and counts["images in bold"] == ("8", "8")
    assert counts["grid of t1w, mask"][1] == "8 pairs agree"
    assert counts["image files"][1] == "32 images" and counts["sidecars"][1] == "20 files"


# -- damages -------------------------------------------------------------------------------------------------------------


def write(path, content):
    """Replaces a file by `content`: bytes, text, or a function of its bytes."""

    def damage(tree):
        file = tree / path
        new = content(file.read_bytes()) if callable(content) else content
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(new.encode() if isinstance(new, str) else new)

    return damage


def remove(path):
    def damage(tree):
        shutil.rmtree(tree / path) if (tree / path).is_dir() else (tree / path).unlink()

    return damage


def link(path):
    def damage(tree):
        (tree / path).unlink()
        (tree / path).symlink_to("../../.git/annex/objects/gone.nii.gz")

    return damage


def header(path, **fields):
    """Rewrites header fields, without the checks that nibabel makes of them."""

    def change(content):
        zipped = content[:2] == b"\x1f\x8b"
        data = bytearray(gzip.decompress(content) if zipped else content)
        block = nib.Nifti1Header(bytes(data[:348]), check=False)
        for field, value in fields.items():
            block[field] = value
        data[:348] = block.binaryblock
        return gzip.compress(bytes(data), mtime=0) if zipped else bytes(data)

    return write(path, change)


def with_image(path, change):
    def damage(tree):
        image = nib.load(tree / path)
        image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
        image = change(image) or image
        data = image.to_bytes()
        (tree / path).write_bytes(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)

    return damage


def extension(path, code, content):
    return with_image(path, lambda image: image.header.extensions.append(nib.nifti1.Nifti1Extension(code, content)))


def sidecar(path, **fields):
    def damage(tree):
        before = json.loads((tree / path).read_text()) if (tree / path).exists() else {}
        write_json(tree / path, **before, **fields)

    return damage


def moved(image):
    affine = image.affine.copy()
    affine[0, 3] += 1
    return nib.Nifti1Image(np.asanyarray(image.dataobj), affine)


def flipped(content):
    """A bit of the checksum: the same as one of the voxels, but that would not inflate."""
    return content[:-6] + bytes([content[-6] ^ 0x10]) + content[-5:]


def element(group, number, vr, value):
    value = value + " " * (len(value) % 2)
    return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value.encode()


DICOM = (
    element(0x0008, 0x0060, "CS", "MR")
    + element(0x0010, 0x0010, "PN", "Doe^Jane")
    + element(0x10, 0x30, "DA", "19610203")
)
HTML = "<!DOCTYPE html><html><body>Not found</body></html>" + " " * 90_000
ANNEX = "../../../.git/annex/objects/Xx/Yy/MD5E-s4--0.nii.gz/MD5E-s4--0.nii.gz"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
PEOPLE = "participant_id\tage\tsex\n" + "".join(f"sub-0{i}\t50\tF\n" for i in range(1, 4))

# name -> (damage, check, file or "" for the whole dataset, words)
DAMAGES = {
    "a directory is missing": (
        remove("derivatives/masks"),
        "path derivatives/masks/",
        "derivatives/masks/",
        "is not there",
    ),
    "a table is missing": (remove("phenotype/test.tsv"), "path phenotype/*.tsv", "phenotype/*.tsv", "is not there"),
    "a required table is missing": (
        remove("participants.tsv"),
        "build",
        "",
        "'participants.tsv': there is no such file",
    ),
    "the archive is another": (write("../tree.zip", "other"), "archive", "tree.zip", "is not the release's archive"),
    "the archive is missing": (remove("../tree.zip"), "archive", "tree.zip", "cannot be read"),
    "a T1w is missing": (remove(T1W), "rows with t1w", "sub-02/ses-1", "has no t1w"),
    "a mask is missing": (remove(MASK), "rows with mask", "sub-02/ses-1", "has no mask"),
    "a run is missing": (remove(BOLD), "images in bold", "sub-02/ses-1", "has no bold"),
    "an age is missing": (
        write("participants.tsv", f"{PEOPLE}sub-04\tn/a\tF\n"),
        "rows with age",
        "sub-04/ses-1",
        "has no age",
    ),
    "an age is no number": (
        write("participants.tsv", f"{PEOPLE}sub-04\told\tF\n"),
        "rows with age",
        "sub-04/ses-2",
        "has no age",
    ),
    "two images fit": (write(MASK.replace("brain", "x"), volume_bytes("x")), "build", "", "desc-x_mask.nii.gz"),
    "a column has another name": (
        write("participants.tsv", PEOPLE.replace("age", "Age")),
        "build",
        "",
        "did you mean 'Age'",
    ),
    "a subject stands twice": (
        write("participants.tsv", f"{PEOPLE}sub-03\t1\tM\n"),
        "build",
        "",
        "row 5: sub-03 stands in row 4",
    ),
    "an image is empty": (write(T1W, b""), "image files", T1W, "is empty (0 bytes)"),
    "an image is a dangling link": (link(T1W), "image files", T1W, "datalad get"),
    "an image is one byte": (write(T1W, b"\n"), "image data", T1W, "is no NIfTI image"),
    "an image is an error page": (write(T1W, HTML), "image data", T1W, "is an HTML page"),
    "an image is a git-annex pointer": (write(T1W, ANNEX), "image data", T1W, "git-annex pointer"),
    "an image is an LFS pointer": (write(T1W, LFS), "image data", T1W, "git-LFS pointer"),
    "an image is DICOM": (write(BOLD, bytes(128) + b"DICM" + DICOM), "image data", BOLD, "is a DICOM file"),
    "an image is a zip archive": (write(T1W, b"PK\x03\x04" + bytes(99)), "image data", T1W, "is a zip archive"),
    "an image is noise": (write(BOLD, hashlib.sha512(b"").digest() * 9), "image data", BOLD, "neither NIfTI-1"),
    "compressed, cut off": (write(T1W, lambda b: b[:-20]), "image data", T1W, "cut off"),
    "compressed, cut off in the header": (write(T1W, lambda b: b[:60]), "image data", T1W, "cut off"),
    "compressed, voxels missing": (
        write(T1W, lambda b: gzip.compress(gzip.decompress(b)[:-7], mtime=0)),
        "image data",
        T1W,
        "is cut off: 393 of 400 bytes",
    ),
    "uncompressed, cut off": (write(BOLD, lambda b: b[:-9]), "image data", BOLD, "is cut off"),
    "a bit flipped": (write(DWI, flipped), "image data", DWI, "damaged or cut off"),
    "not compressed, as it says": (write(T1W, gzip.decompress), "image data", T1W, "holds uncompressed data"),
    "compressed, but does not say so": (write(BOLD, gzip.compress), "image data", BOLD, "holds gzip data"),
    "nine dimensions": (header(T1W, dim=[9, 4, 4, 3, 1, 1, 1, 1]), "image data", T1W, "header cannot be read"),
    "unknown data type": (header(T1W, datatype=3), "image data", T1W, "header cannot be read"),
    "an axis of length 0": (header(T1W, dim=[3, 4, 0, 3, 1, 1, 1, 1]), "image data", T1W, "has no voxels"),
    "affine of zeros": (header(T1W, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4), "image data", T1W, "affine"),
    "affine not finite": (header(T1W, srow_x=[np.nan] * 4), "image data", T1W, "affine"),
    "mask moved by half a voxel": (with_image(MASK, moved), "grid of t1w, mask", MASK, "a corner is 1.00 mm away"),
    "mask of another shape": (
        write(MASK, gzip.compress(nib.Nifti1Image(np.zeros((4, 4, 2), "u1"), np.eye(4)).to_bytes(), mtime=0)),
        "grid of t1w, mask",
        MASK,
        "4 x 4 x 2 voxels instead of 4 x 4 x 3",
    ),
    "bval too short": (write(BVAL, "0 1000\n"), "gradients", BVAL, "has 2 values for the 3 volumes of " + DWI),
    "bval is no table of numbers": (write(BVAL, "0 b1000 x"), "gradients", BVAL, "is no table of numbers"),
    "bval is nan": (write(BVAL, "0 nan 1"), "gradients", BVAL, "holds a value that is no number"),
    "bvec transposed": (write(BVEC, "0 0 0\n1 0 0\n0 1 0\n0 0 1"), "gradients", BVEC, "has 4 lines instead of 3"),
    "bvec with lines of different length": (write(BVEC, "0 1 0\n0 0\n0 0 0"), "gradients", BVEC, "has 3/2 values"),
    "bvec missing": (remove(BVEC), "gradients", DWI, "no .bvec file"),
    "no gradients at all": (
        lambda tree: (remove(BVEC)(tree), remove(BVAL)(tree)),
        "gradients",
        DWI,
        "3 volumes and no .bval",
    ),
    "sidecar cut off": (write(SIDECAR, '{"EchoTime": 0.0'), "sidecars", SIDECAR, "is no JSON"),
    "sidecar empty": (write(SIDECAR, ""), "sidecars", SIDECAR, "is empty"),
    "sidecar is a list": (write(SIDECAR, "[1]"), "sidecars", SIDECAR, "is a JSON list"),
    "sidecar in Latin-1": (write(SIDECAR, '{"A": "\xe9"}'.encode("latin-1")), "sidecars", SIDECAR, "is not UTF-8"),
    "table with a long line": (
        write(SCANS, "filename\tacq_time\na\tn/a\tb\n"),
        "tables",
        SCANS,
        "row 2 has 3 cells, the header has 2",
    ),
    "table with a short line": (write(SCANS, "filename\tacq_time\na\tn/a\nb\n"), "tables", SCANS, "row 3 has 1 cells"),
    "table in Latin-1": (write(SCANS, b"filename\nM\xfcller\n"), "tables", SCANS, "is not UTF-8"),
    "table empty": (write(SCANS, ""), "tables", SCANS, "is empty"),
    "table with a column twice": (write(SCANS, "a\ta\n1\t2\n"), "tables", SCANS, "has two columns 'a'"),
    "workbook cut off": (
        write("sourcedata/clinic.xlsx", lambda b: b[:99]),
        "tables",
        "sourcedata/clinic.xlsx",
        "cannot be read as a table",
    ),
    "a name in a sidecar": (
        sidecar(SIDECAR, PatientName="Doe^Jane"),
        "privacy: sidecars",
        SIDECAR,
        "PatientName: identifies",
    ),
    "a birth date in a sidecar": (
        sidecar(SIDECAR, PatientBirthDate="19610203"),
        "privacy: sidecars",
        SIDECAR,
        "PatientBirthDate",
    ),
    "a serial number for all": (
        sidecar("T1w.json", DeviceSerialNumber="45012"),
        "privacy: sidecars",
        "T1w.json",
        "DeviceSerialNumber",
    ),
    "an accession number, nested": (
        sidecar(SIDECAR, source={"dicom": [{"AccessionNumber": "A7"}]}),
        "privacy: sidecars",
        SIDECAR,
        "source.dicom[0].AccessionNumber",
    ),
    "an acquisition date": (
        sidecar(SIDECAR, AcquisitionDateTime="2019-03-04T10:00:00"),
        "privacy: sidecars",
        SIDECAR,
        "holds a date",
    ),
    "an age in a sidecar": (sidecar(SIDECAR, PatientAge="093Y"), "privacy: sidecars", SIDECAR, "is above 89"),
    "a date in scans.tsv": (
        write(SCANS, f"filename\tacq_time\n{T1W}\t2019-03-04T10:00:00\n"),
        "privacy: tables",
        SCANS,
        "column 'acq_time': holds dates",
    ),
    "an age above 89": (
        write("participants.tsv", f"{PEOPLE}sub-04\t93\tF\n"),
        "privacy: tables",
        "participants.tsv",
        "(row 5)",
    ),
    "an age in months": (
        write("phenotype/test.tsv", "participant_id\tage_months\nsub-01\t1100\n"),
        "privacy: tables",
        "phenotype/test.tsv",
        "column 'age_months': is above 89 years",
    ),
    "a birth date in a table": (
        write("phenotype/test.tsv", "participant_id\tdate_of_birth\nsub-01\t03.02.61\n"),
        "privacy: tables",
        "phenotype/test.tsv",
        "column 'date_of_birth': identifies",
    ),
    "names in a workbook": (
        lambda tree: write_sheet(tree / "sourcedata/clinic.xlsx", {"subject": "sub-01", "Last name": "Doe"}),
        "privacy: tables",
        "sourcedata/clinic.xlsx",
        "column 'Last name': identifies",
    ),
    "a date in the header": (
        header(T1W, descrip=b"scanned 2019-03-04"),
        "privacy: image headers",
        T1W,
        "field descrip: holds a date",
    ),
    "a name in the header": (
        header(BOLD, aux_file=b"DOE^JANE"),
        "privacy: image headers",
        BOLD,
        "field aux_file: holds a name",
    ),
    "a DICOM extension": (
        extension(T1W, 2, DICOM),
        "privacy: image headers",
        T1W,
        "extension 2, PatientName: identifies",
    ),
    "an unreadable DICOM extension": (
        extension(T1W, 2, b"DICM"),
        "privacy: image headers",
        T1W,
        "could not be listed",
    ),
    "JSON in an extension": (
        extension(BOLD, 0, b'{"global": {"const": {"PatientBirthDate": "19610203"}}}'),
        "privacy: image headers",
        BOLD,
        "extension 0, global.const.PatientBirthDate",
    ),
    "text in an extension": (
        extension(T1W, 6, b"PatientName = Doe"),
        "privacy: image headers",
        T1W,
        "extension 6: names PatientName",
    ),
}

# What may identify is listed, but stops nothing.
WARNINGS = {
    "a file name in gzip": (
        write(T1W, lambda b: b[:3] + b"\x08" + b[4:10] + b"Doe_Jane.nii\0" + b[10:]),
        "privacy: gzip headers",
        T1W,
        "keeps the file name 'Doe_Jane.nii'",
    ),
    "a time in gzip": (
        write(T1W, lambda b: b[:4] + b"\1\2\3\4" + b[8:]),
        "privacy: gzip headers",
        T1W,
        "keeps a time",
    ),
    "an institution": (
        sidecar(SIDECAR, InstitutionName="Ward 9"),
        "privacy: sidecars",
        SIDECAR,
        "names the institution",
    ),
    "a time of day": (
        sidecar(SIDECAR, AcquisitionTime="10:11:12"),
        "privacy: sidecars",
        SIDECAR,
        "holds a time of day",
    ),
    "a time of day in the header": (
        header(T1W, descrip=b"TE=2.1;Time=101112.5"),
        "privacy: image headers",
        T1W,
        "holds a time of day",
    ),
    "a database name": (header(T1W, db_name=b"Ward9"), "privacy: image headers", T1W, "see that it is no name"),
    "a cell that is no number": (
        write("participants.tsv", f"{PEOPLE}sub-04\told\tF\n"),
        "build",
        "",
        "row 5, column 'age': 'old' is not of type float64",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGES, *WARNINGS])
def test_a_damage_is_named(small, name):
    damage, check_name, path, words = {**DAMAGES, **WARNINGS}[name]
    damage(small / "tree")
    result = check(small, "--deep")
    found = by_name(result)[check_name]
    assert found.status == ("FAILED" if name in DAMAGES else "warning"), result.summary()
    assert result.all_passed == all(check.passed for check in result.checks)
    if name in DAMAGES:
        assert not result.all_passed
    hits = [finding for finding in found.findings if finding.path.endswith(path) and words in str(finding)]
    assert len(hits) == 1 and "\n" not in str(hits[0]), result.summary()
    if path:
        # Nothing is said of files that are as they were.
        assert {finding.path for finding in found.findings if finding.path != hits[0].path} <= {
            "sub-04/ses-1",
            "sub-04/ses-2",
        }
    assert str(hits[0]) in result.summary()


@pytest.mark.parametrize(
    "name", ["compressed, cut off", "compressed, voxels missing", "compressed, cut off in the header"]
)
def test_a_cut_image_is_found_without_inflating_all_others(small, name, monkeypatch):
    damage, check_name, path, words = DAMAGES[name]
    damage(small / "tree")
    inflated = []
    monkeypatch.setattr("datasets_bids.validation._inflate", lambda path, needed: inflated.append(path) or 0)
    found = by_name(check(small))[check_name]
    assert [finding.path for finding in found.findings] == [path]
    assert len(inflated) <= 1


def test_a_bit_that_flipped_takes_deep(tmp_path):
    """In an image that is longer than its header."""
    voxels = np.random.default_rng(0).integers(0, 255, (64, 64, 64), "u1")
    content = gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), mtime=0)
    (tmp_path / "a.nii.gz").write_bytes(flipped(content))
    assert not inspect_image(str(tmp_path / "a.nii.gz"), "a.nii.gz").damage
    (found,) = inspect_image(str(tmp_path / "a.nii.gz"), "a.nii.gz", deep=True).damage
    assert str(found).startswith("a.nii.gz: the gzip data are damaged or cut off (CRC check failed")


def test_a_subject_or_session_that_is_gone_is_counted(small):
    shutil.rmtree(small / "tree/sub-03/ses-2")
    remove("derivatives/masks/sub-03/ses-2")(small / "tree")
    found = by_name(check(small))
    assert (found["sessions"].actual, found["sessions"].passed, found["subjects"].passed) == ("7", False, True)
    assert found["rows with dwi"].passed, "within its tolerance"
    shutil.rmtree(small / "tree/sub-03")
    shutil.rmtree(small / "tree/derivatives/masks/sub-03")
    write_text(small / "tree/participants.tsv", "participant_id\tage\nsub-01\t1\n")
    found = by_name(check(small))
    assert (found["subjects"].actual, found["subjects"].passed) == ("3", False)
    assert not found["rows with dwi"].passed


def test_what_says_that_it_was_removed_is_nothing(small):
    tree = small / "tree"
    shifted = {"PatientBirthDate": "19000101", "AcquisitionDateTime": "1920-03-04T10:00:00", "PatientID": "sub-02"}
    sidecar(SIDECAR, PatientName="Anonymous", AccessionNumber="", OperatorsName=[], PatientAge="055Y", **shifted)(tree)
    header(T1W, descrip=b"spm - v1.0.20190902 6.0.5:9e026117", db_name=b"?TR:2000.000 TE:30")(tree)
    write("participants.tsv", f"{PEOPLE}sub-04\t89+\tF\n")(tree)
    write("phenotype/test.tsv", "participant_id\tlanguage\tdate_of_birth\nsub-01\t100\t1921-01-01\n")(tree)
    found = by_name(check(small))
    assert {check.status for name, check in found.items() if name.startswith("privacy")} == {"ok"}


def test_findings_do_not_repeat_what_is_to_be_removed():
    found = [*privacy.in_json({"PatientName": "Doe^Jane", "AcquisitionDate": "20190304"}, "a.json")]
    found += privacy.in_table({"name": ["Doe Jane"], "dob": ["2019-03-04"]}, "a.tsv")
    assert len(found) == 4
    assert not [finding for finding in found if "Jane" in str(finding) or "2019" in str(finding)]


@pytest.mark.parametrize(
    "text, date",
    [
        ("2019-03-04", True),
        ("2019-03-04T10:11:12.5", True),
        ("20190304", True),
        ("20190304101112.000000", True),
        ("2019/3/4", True),
        ("4.3.2019", True),
        ("1925-12-31", False),
        ("18500101", False),
        ("v1.0.20190902", False),
        ("1.2.840.113619.20190304.1", False),
        ("3.1.2.2019.1", False),
        ("2019", False),
        ("120190304", False),
        ("deadbeef20190304cafe", False),
    ],
)
def test_dates(text, date):
    assert privacy._unshifted(text) is date


def test_trailing_bytes_and_many_gzip_members_are_no_damage(tmp_path):
    data = volume_bytes("a", compressed=False)
    members = gzip.compress(data[:100], mtime=0) + gzip.compress(data[100:], mtime=0)
    for content in (members, volume_bytes("a") + b"\0" * 512, gzip.compress(data + bytes(16), mtime=0)):
        (tmp_path / "a.nii.gz").write_bytes(content)
        for deep in (False, True):
            facts = inspect_image(str(tmp_path / "a.nii.gz"), "a.nii.gz", deep)
            assert not facts.damage and facts.shape == (4, 4, 3)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nii.bz2"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_format_that_is_stored_is_read(tmp_path, ending, kind):
    path = str(tmp_path / f"a{ending}")
    nib.save(kind(np.zeros((3, 4, 5, 2), "i2"), np.diag([2, 2, 2, 1])), path)
    facts = inspect_image(path, f"a{ending}", deep=True)
    assert facts.shape == (3, 4, 5, 2) and not facts.damage and not facts.identity


def extended() -> bytes:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), "u1"), np.eye(4))
    for code, content in ((2, DICOM), (6, b"a comment"), (0, b'{"PatientName": "Doe"}')):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, content))
    return image.to_bytes()


@given(
    changes=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=6),
    length=st.integers(0, 700),
    compressed=st.booleans(),
    garbage=st.binary(max_size=40),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_of_an_image_is_a_crash(tmp_path, changes, length, compressed, garbage):
    """Headers, extensions and streams with arbitrary bytes in them, cut anywhere: findings, in one line each, or none."""
    data = bytearray(extended())
    for at, content in changes:
        data[at : at + len(content)] = content
    data = bytes(data[: length + 300])
    data = gzip.compress(data)[: 40 + length] + garbage if compressed else data
    path = tmp_path / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(data)
    facts = inspect_image(str(path), path.name, deep=True)
    for finding in [*facts.damage, *facts.missing, *facts.identity, *facts.gzip]:
        assert finding.path == path.name and "\n" not in str(finding) and str(tmp_path) not in str(finding)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_sidecar_is_a_crash(value):
    assert all(finding.field for finding in privacy.in_json(value, "a.json"))


@given(
    st.dictionaries(
        st.text(), st.lists(st.none() | st.text() | st.floats() | st.booleans() | st.datetimes(), max_size=3)
    )
)
def test_no_table_is_a_crash(columns):
    list(privacy.in_table(columns, "a.tsv"))


def test_gradients_at_the_root_hold_for_all(tmp_path):
    paths = ["sub-1/dwi/sub-1_dwi.nii.gz", "sub-2/dwi/sub-2_dwi.nii.gz"]
    write_volumes(tmp_path, paths[:1], volumes=3)
    write_volumes(tmp_path, paths[1:], volumes=2)
    write_text(tmp_path / "dwi.bval", "0 1 1")
    write_text(tmp_path / "dwi.bvec", "0 1 1\n0 1 1\n0 1 1")
    findings = by_name(validate_tree(index_tree(str(tmp_path))))["gradients"].findings
    assert [str(finding) for finding in findings] == [
        f"dwi.bval: has 3 values for the 2 volumes of {paths[1]}",
        f"dwi.bvec: has 3 values for the 2 volumes of {paths[1]}",
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="takes a file that opens and cannot be read")
def test_a_disk_error_is_named(small):
    for path in (SIDECAR, SCANS, BVAL):
        (small / "tree" / path).unlink()
        (small / "tree" / path).symlink_to("/proc/self/mem")
    found = by_name(check(small))
    for name, path in (("sidecars", SIDECAR), ("tables", SCANS), ("gradients", BVAL)):
        (finding,) = found[name].findings
        assert finding.path == path and "Input/output error" in finding.problem


def test_a_single_volume_needs_no_gradients(tmp_path):
    write_volumes(tmp_path, ["sub-1/dwi/sub-1_dwi.nii.gz"])
    assert by_name(validate_tree(index_tree(str(tmp_path))))["gradients"].passed


@pytest.mark.parametrize(
    "expected, message",
    [
        ([], "a dictionary with the keys paths, subjects"),
        ({"subject": 3}, "unknown key 'subject'; did you mean 'subjects'"),
        ({"subjects": "149"}, "'subjects': a number, or"),
        ({"subjects": True}, "'subjects': a number, or"),
        ({"subjects": {"train": -1}}, "'subjects', 'train': a number"),
        ({"columns": 3}, "'columns': a dictionary column -> number"),
        ({"columns": {"t1w": {"count": 3, "tolerence": 1}}}, "unknown key 'tolerence'; did you mean 'tolerance'"),
        ({"paths": "raw"}, "'paths': a list of patterns"),
        ({"paths": ["{raw"]}, "pattern '{raw'"),
        ({"same_grid": ["t1w", "mask"]}, "'same_grid': a list of lists"),
        ({"archive_md5": "123"}, "'archive_md5': 32 hexadecimal digits"),
    ],
)
def test_a_mistake_in_what_is_expected_is_one_clear_error(expected, message):
    with pytest.raises(SchemaError) as error:
        parse_expected(expected)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_column_that_is_not_there_is_said(small):
    script = small / "small/small.py"
    script.write_text(script.read_text().replace('"t1w": 8', '"t1v": 8').replace('[["t1w"', '[["t1v"'))
    found = by_name(check(small))
    assert "did you mean 't1w'" in found["rows with t1v"].actual and not found["rows with t1v"].passed
    assert "no column 't1v'" in found["grid of t1v, mask"].actual and not found["grid of t1v, mask"].passed


def test_a_result_in_words_and_as_json():
    findings = tuple(Finding(f"sub-{i}.nii", "is empty") for i in range(7))
    checks = [
        ValidationCheck("subjects", "149", "149", True),
        ValidationCheck("image files", "none empty", "7 files", False, findings),
        ValidationCheck("gzip", "no times", "1 file", True, (Finding("a.gz", "keeps a time", severity="warning"),)),
        ValidationCheck("BIDS", "valid", "ask", True, asked=False),
    ]
    result = ValidationResult(checks)
    assert not result.all_passed and ValidationResult(checks[:1] + checks[2:]).all_passed
    lines = result.summary().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["ok", "FAILED", "warning", "-", "4"]
    assert lines[-1] == "4 checks: 1 ok, 1 with warnings, 1 not asked, 1 failed"
    assert sum("is empty" in line for line in lines) == 5 and "and 2 more" in result.summary()
    as_json = json.loads(json.dumps(result.to_dict()))
    assert len(as_json["checks"][1]["findings"]) == 7 and as_json["checks"][3]["status"] == "-"


def test_the_reference_validator(tmp_path):
    index = index_tree(str(bids_tree(tmp_path, subjects=1)))
    checks = check_bids(index)
    if not checks[0].asked:
        pytest.skip(checks[0].actual)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    remove("dataset_description.json")(tmp_path)
    write_text(tmp_path / "sub-01/ses-1/anat/stray.txt", "?")
    checks = {check.name: check for check in check_bids(index_tree(str(tmp_path)))}
    failed = {finding.path for check in checks.values() if not check.passed for finding in check.findings}
    assert "sub-01/ses-1/anat/stray.txt" in failed and any("DATASET_DESCRIPTION" in name for name in checks)


def test_without_the_reference_validator_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    (found,) = check_bids(index_tree(str(tmp_path)))
    assert found.passed and not found.asked and "pip install 'datasets-bids[validate]'" in found.actual


def test_a_build_that_failed_leaves_the_tree_to_be_checked(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz"])
    result = validate_tree(index_tree(str(tmp_path)), Built(parse_expected({"subjects": 1}), error="no schema"))
    found = by_name(result)
    assert not found["build"].passed and found["image data"].passed and "subjects" not in found
