"""Generated trees with the layouts and the quirks of real releases. Every volume is a small valid NIfTI file of its own."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from openpyxl import Workbook


def volume_bytes(seed: str, compressed: bool = True, volumes: int = 1) -> bytes:
    """A NIfTI-1 image of 4 x 4 x 3 voxels (and time) whose voxels follow from `seed`, so that no two files are alike."""
    voxels = np.frombuffer(hashlib.sha512(seed.encode()).digest()[:48], dtype=np.uint8).reshape(4, 4, 3)
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
    if volumes > 1:
        image = nib.Nifti1Image(np.stack([np.roll(voxels, i) for i in range(volumes)], axis=-1), image.affine)
        image.header.set_zooms((2.0, 2.0, 3.0, 2.0))
        image.header.set_xyzt_units("mm", "sec")
    data = image.to_bytes()
    return gzip.compress(data, compresslevel=1, mtime=0) if compressed else data


def noise_bytes(seed: int, nbytes: int) -> bytes:
    """A NIfTI-1 volume of about `nbytes` voxels that do not compress, gzipped."""
    voxels = np.random.default_rng(seed).integers(0, 256, (nbytes // 1000, 10, 100), dtype=np.uint8)
    return gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), compresslevel=0, mtime=0)


def write_volumes(root: Path, paths: Iterable[str], volumes: int = 1) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(volume_bytes(path, compressed=path.endswith(".gz"), volumes=volumes))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, **fields: object) -> None:
    write_text(path, json.dumps(fields))


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


def isles24_tree(
    root: Path, count: int = 149, without_perfusion: int = 9, without_vessels: int = 49, odd_sheets: bool = True
) -> Path:
    """A tree as release v7: 149 subjects, 140 of them with CTP and maps, 100 with vessel masks, one native mask.

    Its phenotype sheets (with `odd_sheets`) have one missing (subject 3 of the list), one with `n/a` (4), one that is no
    workbook (5), one with a cell that is no number (6).
    """
    subjects = isles24_subjects(count)
    for i, subject in enumerate(subjects):
        perfusion, vessels = i >= without_perfusion, i >= without_vessels
        write_volumes(root, isles24_paths(subject, perfusion, vessels, raw_cta=i != 1))
        baseline, outcome = isles24_values(i)
        if i == 4 and odd_sheets:
            baseline["NIHSS at admission"] = "n/a"
        if i == 6 and odd_sheets:
            baseline["Age"] = "about sixty"
        isles24_phenotype(root, subject, baseline, outcome)
        sheet = root / "phenotype" / subject / "ses-01" / f"{subject}_ses-01_demographic_baseline.xlsx"
        if i == 3 and odd_sheets:
            sheet.unlink()
        if i == 5 and odd_sheets:
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
    paths += session("sub-M2001", "ses-567", "anat/{}_T1w.nii.gz", "anat/{}_run-2_T1w.nii.gz")
    paths += session("sub-M2002", "ses-1441", "anat/{}_acq-spc3_T2w.nii.gz", "dwi/{}_dwi.nii.gz")
    dwis = [path for path in paths if path.endswith("_dwi.nii.gz")]
    for i, dwi in enumerate(dwis):
        stem = root / dwi.removesuffix(".nii.gz")
        write_text(stem.with_name(f"{stem.name}.bval"), f"0 {1000 + i} {1000 + i}\n")
        write_text(stem.with_name(f"{stem.name}.bvec"), f"0 1 0\n0 0 1\n0 0 {i}\n")
    paths += session("sub-M2005", "ses-409", "func/{}_task-rest_bold.nii.gz")
    paths += [
        f"derivatives/lesion_masks/{subject}/{session}/anat/{subject}_{session}_acq-spc3p2_desc-lesion_mask.nii.gz"
        for subject, session in (("sub-M2001", "ses-3622"), ("sub-M2002", "ses-1441"))
    ]
    write_volumes(root, paths)
    write_volumes(root, dwis, volumes=3)
    (root / "participants.tsv").write_text(
        "participant_id\tsex\trace\tage_at_stroke\twab_aq\twab_days\twab_type\n"
        "sub-M2001\tF\tw\t38\t87.1\t895\tanomic\n"
        "sub-M2002\tM\tb\t50\tn/a\tn/a\tn/a\n"
        "sub-M2006\tF\tw\t61\t24.9\t1024\tbroca\n"
    )
    return root


# --- ATLAS v2.0 -------------------------------------------------------------------------------------------------------


def atlas2_path(split: str, site: int, person: int, name: str, session: int = 1, space: str = "") -> str:
    subject = f"sub-r{site:03d}s{person:03d}"
    return f"{split}/R{site:03d}/{subject}/ses-{session}/anat/{subject}_ses-{session}_{space}{name}.nii.gz"


def atlas2_tree(root: Path, table: str = ".xlsx") -> Path:
    """Two cohorts for training and two for testing; one person was scanned twice, one cohort's files name their space, the
    table says nothing of the test split, and the template lies at the root."""
    space, mask = "space-MNI152NLin2009aSym_", "label-L_desc-T1lesion_mask"
    paths = ["MNI152NLin2009aSym.nii.gz"]
    for site, person, session in ((1, 1, 1), (1, 2, 1), (1, 2, 2), (9, 1, 1)):
        named = space if site == 9 else ""
        paths += [atlas2_path("Training", site, person, name, session, named) for name in ("T1w", mask)]
    paths += [atlas2_path("Testing", site, person, "T1w") for site, person in ((5, 1), (14, 3))]
    write_volumes(root, paths)
    for site in ("Training/R001", "Training/R009", "Testing/R005", "Testing/R014"):
        write_json(root / site / "dataset_description.json", Name="ATLAS", BIDSVersion="1.6.0")
    header = ["Subject ID", "Session", "# Lesions LH Cortical and White Matter", "# Lesions LH Subcortical"]
    header += [
        "# Lesions RH Cortical and White Matter",
        "# Lesions RH Subcortical",
        "# Lesions Other Location",
        "Notes",
    ]
    lines = [
        ["sub-r001s001", "ses-1", 1, 0, 0, 2, 0, None],
        ["sub-r001s002", "ses-1", 0, 1, 0, 0, 0, "first scan"],
        ["sub-r001s002", "ses-2", 0, 3, 0, 0, 0, "second scan"],
        ["sub-r009s001", "ses-1", 0, 0, 0, 0, 1, None],
    ]
    path = root / f"20220425_ATLAS_2.0_MetaData{table}"
    if table == ".xlsx":
        workbook = Workbook()
        for line in [header, *lines]:
            workbook.active.append(line)
        workbook.save(path)
    else:
        cells = [["n/a" if cell is None else str(cell) for cell in line] for line in [header, *lines]]
        write_text(path, "\n".join(map(",".join, cells)) + "\n")
    write_text(root / "20211112_ATLAS_2.0_SupplementaryInfo.csv", "Cohort,Scanner\nR001,Siemens Trio\n")
    return root


# --- SOOP -------------------------------------------------------------------------------------------------------------


def soop_tree(root: Path) -> Path:
    """Four subjects, not contiguous: one with all masks, one without a chronic lesion, one that the table knows nothing of
    but its name, one that is not in it. Gradients stand once, at the root, and say that there is one volume."""
    paths, lesions = [], {1: ("lesion", "lesionAcute", "lesionChronic"), 2: ("lesion", "lesionAcute"), 6: (), 1737: ()}
    for number, masks in lesions.items():
        subject = f"sub-{number}"
        names = ("anat/{}_T1w", "anat/{}_FLAIR", "dwi/{}_rec-TRACE_dwi", "dwi/{}_rec-ADC_dwi")
        paths += [f"{subject}/{name.format(subject)}.nii.gz" for name in names]
        paths += [
            f"derivatives/lesion_masks/{subject}/dwi/{subject}_space-TRACE_desc-{mask}_mask.nii.gz" for mask in masks
        ]
    write_volumes(root, paths)
    for path in paths:
        if not path.startswith("derivatives"):
            write_json(root / path.replace(".nii.gz", ".json"), Modality="MR", Manufacturer="Philips")
    write_text(root / "dwi.bval", "0")
    write_text(root / "dwi.bvec", "0\n0\n0")
    write_json(root / "dataset_description.json", Name="SOOP", BIDSVersion="1.6.0", License="CC0")
    write_json(root / "participants.json", age={"Description": "age at the scan, clamped", "Units": "years"})
    header = "participant_id sex age race acuteischaemicstroke priorstroke bmi nihss gs_rankin_6isdeath etiology"
    write_text(
        root / "participants.tsv",
        header.replace(" ", "\t") + "\n"
        "sub-1\tM\t78\tw\t1\t0\t22.84\t17\tn/a\t5: Cryptogenic Stroke\n"
        'sub-2\tF\t89+\tb\t1\t1\t19.2\t0\t6\t"2: Cardioembolism (e.g., atrial fibrillation, recent MI)"\n'
        "sub-6" + "\tn/a" * 9 + "\n",
    )
    return root


# --- AOMIC-PIOP1 ------------------------------------------------------------------------------------------------------

AOMIC_TASKS = {
    "restingstate": "mb3",
    "anticipation": "seq",
    "emomatching": "seq",
    "faces": "mb3",
    "gstroop": "seq",
    "workingmemory": "seq",
}


def aomic_piop1_tree(root: Path) -> Path:
    """Three subjects without sessions: one complete, one without diffusion images, one without two of the tasks."""
    for number in (1, 2, 216):
        subject = f"sub-{number:04d}"
        write_volumes(root, [f"{subject}/anat/{subject}_T1w.nii.gz"])
        if number != 2:
            stem = f"{subject}/dwi/{subject}_dwi"
            write_volumes(root, [f"{stem}.nii.gz"], volumes=3)
            write_text(root / f"{stem}.bval", "0 1000 1000\n")
            write_text(root / f"{stem}.bvec", "0 1 0\n0 0 1\n0 0 0\n")
        for task, acquisition in AOMIC_TASKS.items():
            if number == 216 and task in ("faces", "gstroop"):
                continue
            stem = f"{subject}/func/{subject}_task-{task}_acq-{acquisition}"
            write_volumes(root, [f"{stem}_bold.nii.gz"], volumes=2)
            write_json(root / f"{stem}_bold.json", RepetitionTime=2.0, TaskName=task)
            if task != "restingstate":
                write_text(root / f"{stem}_events.tsv", "onset\tduration\ttrial_type\n0.5\t1\tcue\n2.5\t1\timage\n")
            (root / f"{stem}_physio.tsv.gz").write_bytes(gzip.compress(b"1\t2\n3\t4\n", mtime=0))
            write_json(
                root / f"{stem}_physio.json", SamplingFrequency=500, StartTime=0, Columns=["cardiac", "trigger"]
            )
    write_json(root / "dataset_description.json", Name="AOMIC-PIOP1", BIDSVersion="1.2.2", License="CC0")
    header = "participant_id age sex BMI handedness education_category raven_score NEO_N NEO_E NEO_O NEO_A NEO_C"
    write_text(
        root / "participants.tsv",
        header.replace(" ", "\t") + "\n"
        "sub-0001\t25.50\tM\t21.0\tright\tacademic\t33.0\t23\t40\t52\t47\t32\n"
        "sub-0002\t23.25\tF\t22.0\tleft\tapplied\tn/a\t22\t47\t34\t53\t46\n"
        "sub-0216\tn/a\tF\t23.0\tright\tapplied\t29.0\t26\t42\t37\t48\t48\n",
    )
    return root


# --- a small BIDS dataset -----------------------------------------------------------------------------------------------


def bids_tree(root: Path, subjects: int = 4) -> Path:
    """Every kind of file that is checked: two sessions, sidecars at two levels, gradients, scans.tsv, phenotype, a sheet, a
    derivative on the grid of its image. The reference validator finds no error in it."""
    write_json(root / "dataset_description.json", Name="small", BIDSVersion="1.10.0", DatasetType="raw", License="CC0")
    write_text(root / "README", "A generated dataset. " * 20)
    write_json(
        root / "participants.json", age={"Description": "age", "Units": "years"}, sex={"Levels": {"F": "female"}}
    )
    write_json(root / "task-rest_bold.json", TaskName="rest", RepetitionTime=2.0)
    write_json(
        root / "derivatives/masks/dataset_description.json",
        Name="masks",
        BIDSVersion="1.10.0",
        DatasetType="derivative",
    )
    people, scores = ["participant_id\tage\tsex"], ["participant_id\tscore"]
    for i in range(1, subjects + 1):
        subject = f"sub-{i:02d}"
        people.append(f"{subject}\t{85 + i}\tF")
        scores.append(f"{subject}\t{i * 1.5}")
        for session in ("ses-1", "ses-2"):
            folder, name = root / subject / session, f"{subject}_{session}"
            anat, dwi, bold = f"anat/{name}_T1w.nii.gz", f"dwi/{name}_dwi.nii.gz", f"func/{name}_task-rest_bold.nii"
            write_volumes(folder, [anat])
            write_volumes(folder, [dwi], volumes=3)
            write_volumes(folder, [bold], volumes=2)
            write_json(folder / f"anat/{name}_T1w.json", Manufacturer="Siemens", EchoTime=0.003, StationName="n/a")
            write_json(folder / f"dwi/{name}_dwi.json", EchoTime=0.08)
            write_text(folder / f"dwi/{name}_dwi.bval", "0 1000 1000\n")
            write_text(folder / f"dwi/{name}_dwi.bvec", "0 1 0\n0 0 1\n0 0 0\n")
            scans = [f"{path}\t1920-01-0{j}T10:00:00" for j, path in enumerate((anat, dwi, bold), start=1)]
            write_text(folder / f"{name}_scans.tsv", "\n".join(["filename\tacq_time", *scans]) + "\n")
            mask = f"derivatives/masks/{subject}/{session}/anat/{name}_space-orig_desc-brain_mask.nii.gz"
            write_volumes(root, [mask])
    write_text(root / "participants.tsv", "\n".join(people) + "\n")
    write_text(root / "phenotype/test.tsv", "\n".join(scores) + "\n")
    write_sheet(root / "sourcedata/clinic.xlsx", {"subject": "sub-01", "age": 86})
    return root
