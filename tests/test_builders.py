"""The builders on generated trees with the layout and the quirks of the real releases."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Features, List, Nifti, load_dataset

import datasets_bids  # noqa: F401

from .test_bids_examples import EXAMPLES
from .trees import (
    AOMIC_TASKS,
    aomic_piop1_tree,
    arc_tree,
    atlas2_path,
    atlas2_tree,
    isles24_paths,
    isles24_phenotype,
    isles24_subjects,
    isles24_tree,
    isles24_values,
    soop_tree,
    write_volumes,
)


BUILDERS = Path(__file__).parent.parent / "builders"
ISLES24, ARC = str(BUILDERS / "isles24"), str(BUILDERS / "arc")


@pytest.fixture(scope="module")
def isles24(tmp_path_factory):
    return isles24_tree(tmp_path_factory.mktemp("isles24") / "train")


def paths_of(dataset, root):
    """The rows, with images as paths relative to the root."""

    def undecoded(feature):
        if isinstance(feature, Nifti):
            return Nifti(decode=False)
        return List(undecoded(feature.feature)) if isinstance(feature, List) else feature

    def relative(value):
        if isinstance(value, list):
            return [relative(item) for item in value]
        return str(Path(value["path"]).relative_to(root)) if isinstance(value, dict) else value

    features = Features({name: undecoded(feature) for name, feature in dataset.features.items()})
    return [{name: relative(value) for name, value in row.items()} for row in dataset.cast(features)]


def test_isles24_default(isles24, caplog):
    dataset = load_dataset(ISLES24, data_dir=isles24, split="train")
    assert dataset.column_names == (
        "subject_id ncct cta ctp tmax mtt cbf cbv dwi adc lesion_mask lvo_mask cow_mask "
        "age sex nihss_admission mrs_admission mrs_3month"
    ).split(" ")
    subjects = isles24_subjects()
    assert dataset["subject_id"] == subjects
    assert len(subjects) == 149 and subjects[0] == "sub-stroke0001" and subjects[-1] == "sub-stroke0189"
    rows = paths_of(dataset, isles24)
    for i, row in enumerate(rows):
        subject = subjects[i]
        raw, derived = f"raw_data/{subject}/ses-01/{subject}_ses-01_", f"derivatives/{subject}/"
        ct, mri = f"{derived}ses-01/{subject}_ses-01_space-ncct_", f"{derived}ses-02/{subject}_ses-02_space-ncct_"
        maps = f"{derived}ses-01/perfusion-maps/{subject}_ses-01_space-ncct_"
        baseline, outcome = isles24_values(i)
        assert row == {
            "subject_id": subject,
            "ncct": f"{raw}ncct.nii.gz",
            "cta": f"{ct}cta.nii.gz" if i == 1 else f"{raw}cta.nii.gz",
            "ctp": None if i < 9 else f"{raw}ctp.nii.gz",
            **{name: None if i < 9 else f"{maps}{name}.nii.gz" for name in ("tmax", "mtt", "cbf", "cbv")},
            "dwi": f"{mri}dwi.nii.gz",
            "adc": f"{mri}adc.nii.gz",
            "lesion_mask": f"{mri}lesion-msk.nii.gz",
            "lvo_mask": None if i < 49 else f"{ct}lvo-msk.nii.gz",
            "cow_mask": None if i < 49 else f"{ct}cow-msk.nii.gz",
            "age": None if i in (3, 5, 6) else baseline["Age"],
            "sex": None if i in (3, 5) else baseline["Sex"],
            "nihss_admission": None if i in (3, 4, 5) else baseline["NIHSS at admission"],
            "mrs_admission": None if i in (3, 5) else baseline["mRS at admission"],
            "mrs_3month": outcome["mRS 3 months"],
        }
    damaged, mistyped, missing = caplog.messages
    assert f"{subjects[5]}_ses-01_demographic_baseline.xlsx: cannot be read as a table" in damaged
    assert f"{subjects[6]}_ses-01_demographic_baseline.xlsx, row 2, column 'Age': 'about sixty'" in mistyped
    assert f"nothing about 2 subjects ({subjects[3]}, {subjects[5]})" in missing


def test_isles24_full_has_every_released_volume_and_variable(isles24):
    dataset = load_dataset(ISLES24, "full", data_dir=isles24, split="train")
    rows = paths_of(dataset, isles24)
    assert len(rows) == 149
    for i, row in enumerate(rows):
        images = [value for value in row.values() if isinstance(value, str) and ".nii" in value]
        assert sorted(images) == sorted(isles24_paths(row["subject_id"], i >= 9, i >= 49, i != 1))
    native = {row["subject_id"] for row in rows if row["native_lesion_mask"] is not None}
    assert native == {"sub-stroke0142"}
    assert rows[0]["Atrial fibrillation"] == 0 and rows[1]["Atrial fibrillation"] == 1
    assert (rows[7]["Comment"], rows[7]["Comment (outcome)"]) == ("baseline 7", "outcome 7")


def test_isles24_mr_lite(tmp_path):
    paths = [
        f"{directory}/sub-stroke{i:04d}_ses-02_{suffix}.nii.gz"
        for i in (1, 2, 189)
        for directory, suffix in (("Images-DWI", "dwi"), ("Images-ADC", "adc"), ("Masks", "lesion-msk"))
    ]
    write_volumes(tmp_path, paths)
    dataset = load_dataset(ISLES24, "mr-lite", data_dir=tmp_path, split="train")
    columns = ("subject_id", "session_id", "dwi", "adc", "lesion_mask")
    expected = [(f"sub-stroke{i:04d}", "ses-02", *paths[3 * n : 3 * n + 3]) for n, i in enumerate((1, 2, 189))]
    assert [tuple(row[name] for name in columns) for row in paths_of(dataset, tmp_path)] == expected
    assert tuple(dataset.column_names) == columns


def test_isles24_of_an_older_release_says_so(tmp_path):
    paths = [path.replace("ses-0", "ses-000") for path in isles24_paths("sub-stroke0001")]
    write_volumes(tmp_path, paths)
    with pytest.raises(ValueError) as error:
        load_dataset(ISLES24, data_dir=tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "builder 'isles24', config 'default', column 'ncct'" in message
    assert "raw_data/sub-stroke0001 holds ses-0001" in message
    assert "This builder reads ISLES'24 release v7 (Zenodo record 17652035)" in message


def test_isles24_of_the_directory_above_says_what_it_found(isles24):
    with pytest.raises(ValueError, match="it holds train. "):
        load_dataset(ISLES24, data_dir=isles24.parent)


def test_isles24_of_one_subject_without_tables(tmp_path, caplog):
    """A researcher tries the builder on what has been downloaded so far."""
    write_volumes(tmp_path, isles24_paths("sub-stroke0002", perfusion=False, vessels=False))
    dataset = load_dataset(ISLES24, data_dir=tmp_path, split="train")
    assert dataset.num_rows == 1 and dataset[0]["age"] is None and dataset[0]["ctp"] is None
    assert caplog.text.count("there is no such file") == 2
    isles24_phenotype(tmp_path, "sub-stroke0002", *isles24_values(2))
    assert load_dataset(ISLES24, data_dir=tmp_path, split="train")[0]["age"] == 52


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
def test_isles24_is_built_without_reading_a_volume(isles24):
    """149 subjects in a process of its own: the volumes may not be opened, and memory stays small."""
    code = """
import re, sys, datasets_bids
from datasets import load_dataset

def refuse(event, args):
    if event == "open" and ".nii" in str(args[0]):
        raise SystemExit(f"opened {args[0]}")

sys.addaudithook(refuse)
assert load_dataset(sys.argv[1], data_dir=sys.argv[2], split="train").num_rows == 149
print(re.search("VmHWM: *\\t *(\\d+) kB", open("/proc/self/status").read())[1])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, ISLES24, str(isles24)],
        env=os.environ | {"PYTHONPATH": str(BUILDERS.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < 500e6


def test_arc(tmp_path, caplog):
    root = arc_tree(tmp_path)
    dataset = load_dataset(ARC, data_dir=root, split="train")
    assert dataset.column_names == (
        "subject_id session_id t1w t2w t2w_acquisition flair bold_naming40 bold_rest dwi dwi_bvals dwi_bvecs sbref lesion "
        "sex race age_at_stroke wab_aq wab_days wab_type"
    ).split(" ")
    rows = paths_of(dataset, root)
    assert [(row["subject_id"], row["session_id"]) for row in rows] == [
        ("sub-M2001", "ses-3622"),
        ("sub-M2001", "ses-567"),
        ("sub-M2002", "ses-1441"),
        ("sub-M2005", "ses-409"),
        ("sub-M2006", None),
    ]
    first, second, third, fourth, last = rows
    session = "sub-M2001/ses-3622/{}/sub-M2001_ses-3622_"
    assert first["t2w"] == [
        session.format("anat") + "acq-spc3p2_run-4_T2w.nii.gz",
        session.format("anat") + "acq-tse3_run-5_T2w.nii.gz",
    ]
    assert first["t2w_acquisition"] == ["SPACE 2x", "turbo spin echo"]
    assert first["bold_naming40"] == [session.format("func") + f"task-naming40_run-{i}_bold.nii.gz" for i in (1, 2)]
    assert first["bold_rest"] == [session.format("func") + "task-rest_bold.nii.gz"]
    assert len(first["dwi"]) == 2
    for dwi, bval, bvec in zip(first["dwi"], first["dwi_bvals"], first["dwi_bvecs"], strict=True):
        assert bval == (root / dwi.replace(".nii.gz", ".bval")).read_text()
        assert bvec == (root / dwi.replace(".nii.gz", ".bvec")).read_text()
    assert first["dwi_bvals"] == ["0 1000 1000\n", "0 1001 1001\n"]
    assert first["sbref"] == [session.format("dwi") + "acq-epb0p2_dir-AP_run-1_sbref.nii.gz"]
    assert first["lesion"].startswith("derivatives/lesion_masks/sub-M2001/ses-3622/")
    assert len(second["t1w"]) == 2 and second["lesion"] is None, "two runs drop no session"
    assert third["t2w_acquisition"] == ["SPACE"] and third["dwi_bvals"] == ["0 1002 1002\n"]
    assert third["wab_aq"] is None and first["wab_aq"] == 87.1 and first["age_at_stroke"] == 38.0
    assert fourth["sex"] is None and fourth["t1w"] == []
    assert last["age_at_stroke"] == 61.0 and last["lesion"] is None and last["dwi"] == []
    assert "nothing about 1 subject (sub-M2005)" in caplog.text
    assert "no image of 1 subject (sub-M2006)" in caplog.text


def test_cards_name_every_column():
    from datasets_bids.card import builder_card

    directories = [str(path.parent) for path in BUILDERS.glob("*/*.py")]
    assert len(directories) == 5
    for path in directories:
        builder = datasets_bids.loading.find_script(path)
        card = builder_card(type("Builder", (), {"base_path": os.path.dirname(builder), "info": None}))
        assert card.data["license"] and card.data["pretty_name"]
        for heading in ("licence", "## Citation", "Source", "load_dataset("):
            assert heading in card.text
        for column in load_columns(path):
            assert f"`{column}`" in card.text, column


def load_columns(path):
    from datasets import load_dataset_builder

    config = load_dataset_builder(path).config
    tables = config.metadata_from if isinstance(config.metadata_from, list) else [config.metadata_from]
    return [*config.schema, *(name for table in tables for name in table["columns"])]


# -- ATLAS v2.0, SOOP, AOMIC-PIOP1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [".xlsx", ".csv"])
def test_atlas2(tmp_path, caplog, table):
    root = atlas2_tree(tmp_path, table)
    splits = load_dataset(str(BUILDERS / "atlas2"), data_dir=root)
    assert splits["train"].column_names == (
        "subject_id session_id t1w lesion_mask site lesions_left_cortical lesions_left_subcortical "
        "lesions_right_cortical lesions_right_subcortical lesions_other Notes"
    ).split(" ")
    train, test = (paths_of(splits[name], root) for name in ("train", "test"))
    mask, space = "label-L_desc-T1lesion_mask", "space-MNI152NLin2009aSym_"
    places = [(1, 1, 1, "", (1, 0, 0, 2, 0)), (1, 2, 1, "", (0, 1, 0, 0, 0)), (1, 2, 2, "", (0, 3, 0, 0, 0))]
    places += [(9, 1, 1, space, (0, 0, 0, 0, 1))]
    notes = [None, "first scan", "second scan", None]
    for row, (site, person, session, named, counts), note in zip(train, places, notes, strict=True):
        assert list(row.values()) == [
            f"sub-r{site:03d}s{person:03d}",
            f"ses-{session}",
            atlas2_path("Training", site, person, "T1w", session, named),
            atlas2_path("Training", site, person, mask, session, named),
            f"R{site:03d}",
            *counts,
            note,
        ]
    assert [(row["subject_id"], row["site"], row["t1w"]) for row in test] == [
        (f"sub-r{site:03d}s{person:03d}", f"R{site:03d}", atlas2_path("Testing", site, person, "T1w"))
        for site, person in ((5, 1), (14, 3))
    ]
    assert all(value is None for row in test for name, value in row.items() if name.startswith(("lesion", "Notes")))
    assert "nothing about 2 subjects (sub-r005s001, sub-r014s003)" in caplog.text


def test_atlas2_may_not_be_public():
    from datasets import load_dataset_builder

    assert "forbids to redistribute" in load_dataset_builder(str(BUILDERS / "atlas2")).PRIVATE_BECAUSE


def test_soop(tmp_path, caplog):
    root = soop_tree(tmp_path)
    rows = paths_of(load_dataset(str(BUILDERS / "soop"), data_dir=root, split="train"), root)
    assert [row["subject_id"] for row in rows] == ["sub-1", "sub-1737", "sub-2", "sub-6"]
    mask = "derivatives/lesion_masks/{0}/dwi/{0}_space-TRACE_desc-{1}_mask.nii.gz"
    masks = {"sub-1": ("lesion", "lesionAcute", "lesionChronic"), "sub-2": ("lesion", "lesionAcute", None)}
    people = {
        "sub-1": ["M", 78, "w", True, False, 22.84, 17, None, "5: Cryptogenic Stroke"],
        "sub-2": ["F", 89, "b", True, True, 19.2, 0, 6, "2: Cardioembolism (e.g., atrial fibrillation, recent MI)"],
    }
    for row in rows:
        name = row["subject_id"]
        assert list(row.values()) == [
            name,
            f"{name}/anat/{name}_T1w.nii.gz",
            f"{name}/anat/{name}_FLAIR.nii.gz",
            f"{name}/dwi/{name}_rec-TRACE_dwi.nii.gz",
            f"{name}/dwi/{name}_rec-ADC_dwi.nii.gz",
            *(kind and mask.format(name, kind) for kind in masks.get(name, (None,) * 3)),
            *people.get(name, [None] * 9),
        ]
    assert "nothing about 1 subject (sub-1737)" in caplog.text and "not of type" not in caplog.text


def test_aomic_piop1(tmp_path):
    root = aomic_piop1_tree(tmp_path)
    dataset = load_dataset(str(BUILDERS / "aomic_piop1"), data_dir=root, split="train")
    rows = paths_of(dataset, root)
    people = [
        (25.5, "M", "right", 21.0, "academic", 33.0, 23, 40, 52, 47, 32),
        (23.25, "F", "left", 22.0, "applied", None, 22, 47, 34, 53, 46),
        (None, "F", "right", 23.0, "applied", 29.0, 26, 42, 37, 48, 48),
    ]
    assert dataset.column_names[-8:] == "BMI education_category raven_score NEO_N NEO_E NEO_O NEO_A NEO_C".split(" ")
    for row, number, person in zip(rows, (1, 2, 216), people, strict=True):
        name = f"sub-{number:04d}"
        dwi = f"{name}/dwi/{name}_dwi"
        texts = [(root / f"{dwi}{extension}").read_text() for extension in (".bval", ".bvec")] if number != 2 else None
        bold = [
            [f"{name}/func/{name}_task-{task}_acq-{acquisition}_bold.nii.gz"]
            if (number, task) not in ((216, "faces"), (216, "gstroop"))
            else []
            for task, acquisition in AOMIC_TASKS.items()
        ]
        assert list(row.values()) == [
            name,
            f"{name}/anat/{name}_T1w.nii.gz",
            *([f"{dwi}.nii.gz", *texts] if texts else [None] * 3),
            *bold,
            *person,
        ]


# -- the guide -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"{EXAMPLES} is not there; set BIDS_EXAMPLES")
def test_the_guide_works_as_it_stands(tmp_path):
    """builders/README.md, block by block, in an empty directory. Only the clone is replaced, by a link."""
    (tmp_path / "bids-examples").symlink_to(EXAMPLES)
    env = os.environ | {
        "PYTHONPATH": str(BUILDERS.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    guide = (BUILDERS / "README.md").read_text().split("## Rules")[0]
    said = []
    for caption, language, block in re.findall(r"([^\n]*)\n+```(\w+)\n(.*?)```\n", guide, re.DOTALL):
        target = re.fullmatch(r"`([\w/.]+)`:", caption)
        if target is not None:
            path = tmp_path / target[1]
            path.parent.mkdir(exist_ok=True)
            if language == "diff":
                old, new = (
                    "".join(line[1:] for line in block.splitlines(True) if line[0] in signs) for signs in (" ", " +")
                )
                assert path.read_text().count(old) == 1
                block = path.read_text().replace(old, new)
            path.write_text(block)
            continue
        commands = re.sub(r"^git clone .*\n", "", block) if language == "bash" else block
        run = subprocess.run(
            ["bash", "-ec", commands] if language == "bash" else [sys.executable, "-c", commands],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        said.append((run.returncode, run.stdout, run.stderr))
    assert [status for status, _, _ in said] == [0, 0, 0, 1, 0], said
    (_, listed, _), (_, plan, _), (_, first, _), (_, table, _), (_, pushed, _) = said
    assert len(listed.splitlines()) == 4
    assert "Images in no column of this config: 2, such as sub-01/ses-baseline/pet" in plan
    assert "ses-baseline 62 (" in first
    assert [line.split()[1:3] for line in table.splitlines() if line.startswith("FAILED")] == [
        ["image", "data"],
        ["privacy:", "sidecars"],
    ]
    assert "DeviceSerialNumber" in table and "InstitutionAddress" in table
    assert "Wrote hansen-hub" in pushed and "FAILED" not in pushed
    card = (tmp_path / "hansen-hub/README.md").read_text()
    assert "license: cc0-1.0" in card and "num_examples: 2" in card
