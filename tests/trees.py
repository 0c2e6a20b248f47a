"""Generated trees with the layouts and the quirks of real releases. Every volume is a small valid NIfTI file of its own."""

import gzip
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from openpyxl import Workbook


def volume_bytes(seed: str, compressed: bool = True) -> bytes:
    """A 4 x 4 x 3 NIfTI-1 volume whose voxels follow from `seed`, so that no two files are alike."""
    voxels = np.frombuffer(hashlib.sha512(seed.encode()).digest()[:48], dtype=np.uint8).reshape(4, 4, 3)
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    data = image.to_bytes()
    return gzip.compress(data, compresslevel=1, mtime=0) if compressed else data


def noise_bytes(seed: int, nbytes: int) -> bytes:
    """A NIfTI-1 volume of about `nbytes` voxels that do not compress, gzipped."""
    voxels = np.random.default_rng(seed).integers(0, 256, (nbytes // 1000, 10, 100), dtype=np.uint8)
    return gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), compresslevel=0, mtime=0)


def write_volumes(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(volume_bytes(path, compressed=path.endswith(".gz")))


def write_sheet(path: Path, values: Mapping[str, object]) -> None:
    """An .xlsx file with a header and one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    workbook = Workbook()
    workbook.active.append(list(values))
    workbook.active.append(list(values.values()))
    workbook.save(path)


# --- ISLES'24 ---------------------------------------------------------------------------------------------------------

ISLES_MAPS = ("tmax", "mtt", "cbf", "cbv")


def isles24_subjects(count: int = 149) -> list[str]:
    """Not contiguous, from 0001 to 0189, with 0142 among them, as in the release."""
    left_out = {5, 13, 21, 29, 37, 45, 53, 61, 69, 77, 85, 93, 101, 109, 117, 125, 133, 141, 149, 157, 165, 173, 181}
    left_out |= {7, 31, 55, 79, 103, 127, 151, 175, 10, 34, 58, 82, 106, 130, 154, 178, 188}
    numbers = [number for number in range(1, 190) if number not in left_out]
    return [f"sub-stroke{number:04d}" for number in numbers[:count]]


def isles24_paths(subject: str, perfusion: bool = True, vessels: bool = True, raw_cta: bool = True) -> list[str]:
    """The images of a subject as release v7 has them."""
    raw, derived = f"raw_data/{subject}/ses-01", f"derivatives/{subject}"
    ct, mri = f"{derived}/ses-01/{subject}_ses-01_space-ncct_", f"{derived}/ses-02/{subject}_ses-02_space-ncct_"
    paths = [f"{raw}/{subject}_ses-01_ncct.nii.gz", f"{ct}cta.nii.gz"]
    paths += [f"{raw}/{subject}_ses-01_cta.nii.gz"] if raw_cta else []
    paths += [f"{mri}{name}.nii.gz" for name in ("dwi", "adc", "lesion-msk")]
    if perfusion:
        paths += [f"{raw}/{subject}_ses-01_ctp.nii.gz", f"{ct}ctp.nii.gz"]
        paths += [f"{raw}/perfusion-maps/{subject}_ses-01_{name}.nii.gz" for name in ISLES_MAPS]
        maps = f"{derived}/ses-01/perfusion-maps/{subject}_ses-01_space-ncct_"
        paths += [f"{maps}{name}.nii.gz" for name in ISLES_MAPS]
    if vessels:
        paths += [f"{ct}lvo-msk.nii.gz", f"{ct}cow-msk.nii.gz"]
    if subject == "sub-stroke0142":
        paths.append(f"{derived}/ses-02/{subject}_ses-02_lesion-msk.nii")
    return paths


def isles24_phenotype(root: Path, subject: str, baseline: Mapping[str, object], outcome: Mapping[str, object]) -> None:
    directory = root / "phenotype" / subject
    write_sheet(directory / "ses-01" / f"{subject}_ses-01_demographic_baseline.xlsx", baseline)
    write_sheet(directory / "ses-02" / f"{subject}_ses-02_outcome.xlsx", outcome)


def isles24_values(i: int) -> tuple[dict[str, object], dict[str, object]]:
    """(baseline, outcome) of the i-th subject."""
    baseline = {
        "Age": 50 + i % 40,
        "Sex": "MF"[i % 2],
        "Atrial fibrillation": i % 2,
        "NIHSS at admission": i % 43,
        "mRS at admission": i % 6,
        "Comment": f"baseline {i}",
    }
    return baseline, {"mRS 3 months": i % 7, "Comment": f"outcome {i}"}


def isles24_tree(root: Path, count: int = 149, without_perfusion: int = 9, without_vessels: int = 49) -> Path:
    """A tree as release v7: 149 subjects, 140 of them with CTP and maps, 100 with vessel masks, one native mask.

    Its phenotype sheets have one missing (subject 3 of the list), one with `n/a` (4), one that is no workbook (5), one
    with a cell that is no number (6).
    """
    subjects = isles24_subjects(count)
    for i, subject in enumerate(subjects):
        perfusion, vessels = i >= without_perfusion, i >= without_vessels
        write_volumes(root, isles24_paths(subject, perfusion, vessels, raw_cta=i != 1))
        baseline, outcome = isles24_values(i)
        if i == 4:
            baseline["NIHSS at admission"] = "n/a"
        if i == 6:
            baseline["Age"] = "about sixty"
        isles24_phenotype(root, subject, baseline, outcome)
        sheet = root / "phenotype" / subject / "ses-01" / f"{subject}_ses-01_demographic_baseline.xlsx"
        if i == 3:
            sheet.unlink()
        if i == 5:
            sheet.write_bytes(b"PK\x03\x04 cut short")
    write_sheet(root / "clinical_data-description.xlsx", {"Variable": "Age", "Description": "age in years"})
    return root


# --- ARC --------------------------------------------------------------------------------------------------------------


def arc_tree(root: Path) -> Path:
    """Three subjects, four sessions named by days, with two runs of a modality and with sessions that lack some."""

    def session(subject: str, session: str, *names: str) -> list[str]:
        return [f"{subject}/{session}/{name.format(f'{subject}_{session}')}" for name in names]

    paths = session(
        "sub-M2001",
        "ses-3622",
        "anat/{}_acq-tfl3p2_run-3_T1w.nii.gz",
        "anat/{}_acq-spc3p2_run-4_T2w.nii.gz",
        "anat/{}_acq-tse3_run-5_T2w.nii.gz",
        "anat/{}_acq-spcir3p2_run-5_FLAIR.nii.gz",
        "func/{}_task-naming40_run-1_bold.nii.gz",
        "func/{}_task-naming40_run-2_bold.nii.gz",
        "func/{}_task-rest_bold.nii.gz",
        "dwi/{}_acq-epb0p2_dir-AP_run-1_dwi.nii.gz",
        "dwi/{}_acq-epb0p2_dir-PA_run-2_dwi.nii.gz",
        "dwi/{}_acq-epb0p2_dir-AP_run-1_sbref.nii.gz",
    )
    for dwi in [path for path in paths if path.endswith("_dwi.nii.gz")]:
        for extension, text in ((".bval", "0 1000 1000\n"), (".bvec", "0 1 0\n0 0 1\n0 0 0\n")):
            companion = root / dwi.replace(".nii.gz", extension)
            companion.parent.mkdir(parents=True, exist_ok=True)
            companion.write_text(text + f"# {dwi}")
    paths += session("sub-M2001", "ses-567", "anat/{}_T1w.nii.gz", "anat/{}_run-2_T1w.nii.gz")
    paths += session("sub-M2002", "ses-1441", "anat/{}_acq-spc3_T2w.nii.gz", "dwi/{}_dwi.nii.gz")
    paths += session("sub-M2005", "ses-409", "func/{}_task-rest_bold.nii.gz")
    paths += [
        f"derivatives/lesion_masks/{subject}/{session}/anat/{subject}_{session}_acq-spc3p2_desc-lesion_mask.nii.gz"
        for subject, session in (("sub-M2001", "ses-3622"), ("sub-M2002", "ses-1441"))
    ]
    write_volumes(root, paths)
    (root / "participants.tsv").write_text(
        "participant_id\tsex\trace\tage_at_stroke\twab_aq\twab_days\twab_type\n"
        "sub-M2001\tF\tw\t38\t87.1\t895\tanomic\n"
        "sub-M2002\tM\tb\t50\tn/a\tn/a\tn/a\n"
        "sub-M2006\tF\tw\t61\t24.9\t1024\tbroca\n"
    )
    return root
