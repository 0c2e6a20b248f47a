"""The builders on generated trees with the layout and the quirks of the real releases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Features, List, Nifti, load_dataset

import datasets_bids  # noqa: F401

from .trees import (
    arc_tree,
    isles24_paths,
    isles24_phenotype,
    isles24_subjects,
    isles24_tree,
    isles24_values,
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
        assert bval == f"0 1000 1000\n# {dwi}"
        assert bvec.startswith("0 1 0\n") and bvec.endswith(dwi)
    assert first["sbref"] == [session.format("dwi") + "acq-epb0p2_dir-AP_run-1_sbref.nii.gz"]
    assert first["lesion"].startswith("derivatives/lesion_masks/sub-M2001/ses-3622/")
    assert len(second["t1w"]) == 2 and second["lesion"] is None, "two runs drop no session"
    assert third["t2w_acquisition"] == ["SPACE"] and third["dwi_bvals"] == [None]
    assert third["wab_aq"] is None and first["wab_aq"] == 87.1 and first["age_at_stroke"] == 38.0
    assert fourth["sex"] is None and fourth["t1w"] == []
    assert last["age_at_stroke"] == 61.0 and last["lesion"] is None and last["dwi"] == []
    assert "nothing about 1 subject (sub-M2005)" in caplog.text
    assert "no image of 1 subject (sub-M2006)" in caplog.text


def test_cards_name_every_column():
    from datasets_bids.card import builder_card

    for path in (ISLES24, ARC):
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
