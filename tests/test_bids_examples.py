"""Real BIDS trees. The collection is no part of the project; without it these tests are skipped."""

import hashlib
import os
from pathlib import Path

import pytest
from datasets import load_dataset

import datasets_bids  # noqa: F401

from .test_push import push_to, read_with_stock


EXAMPLES = Path(os.environ.get("BIDS_EXAMPLES", Path(__file__).parents[2] / "shared" / "bids-examples"))

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"{EXAMPLES} is not there; set BIDS_EXAMPLES")


def load(name, schema, **kwargs):
    return load_dataset("bids", data_dir=EXAMPLES / name, schema=schema, split="train", **kwargs)


def paths(value):
    return [os.path.relpath(item["path"], EXAMPLES) for item in value]


def undecoded(dataset):
    return dataset.with_format("arrow")[:].to_pylist()


def test_ds114():
    dataset = load(
        "ds114",
        {
            "t1w": "anat/*_T1w.nii.gz",
            "dwi": "{subject}/{session}/dwi/{subject}_{session}_dwi.nii.gz",
            "bval": {"of": "dwi", "companion": ".bval"},
            "bold": {"path": "func/*_bold.nii.gz", "many": True},
            "task": {"of": "bold", "entity": "task"},
        },
        metadata_from="participants.tsv",
    )
    assert dataset.num_rows == 20
    rows = undecoded(dataset)
    assert [row["session_id"] for row in rows[:2]] == ["ses-retest", "ses-test"]
    assert sum(len(row["bold"]) for row in rows) + 40 == len(list((EXAMPLES / "ds114").rglob("*.nii.gz")))
    assert all(row["t1w"] and row["dwi"] for row in rows)
    # The gradients stand at the root and hold for every diffusion image below it.
    assert {row["bval"] for row in rows} == {(EXAMPLES / "ds114" / "dwi.bval").read_text()}
    assert "linebisection" in rows[0]["task"]
    assert rows[0]["dominant_hand"] == "left"


def test_synthetic():
    dataset = load(
        "synthetic",
        {
            "t1w": "{subject}/{session}/anat/{subject}_{session}_T1w.nii",
            "nback": {"path": "{subject}/{session}/func/*_task-nback_*bold.nii", "many": True},
            "preproc": {"path": "derivatives/fmriprep/{subject}/{session}/func/*_desc-preproc_bold.nii", "many": True},
        },
        metadata_from="participants.tsv",
    )
    assert dataset.num_rows == 10
    row = dataset[0]
    assert row["t1w"].shape == (256, 256, 256)
    assert [image.shape for image in row["nback"]] == [(64, 64, 64, 64)] * 2
    assert (row["age"], row["sex"]) == (34, "F")
    assert len(row["preproc"]) == 6


@pytest.mark.parametrize("name", ["pet005", "ieeg_visual"])
def test_real_volumes_come_back_byte_for_byte(name, tmp_path):
    dataset = load(name, {"t1w": "anat/*_T1w.nii.gz"}, metadata_from="participants.tsv")
    rows = undecoded(dataset)
    assert all(len(image.shape) >= 3 and image.get_fdata().shape == image.shape for image in dataset["t1w"])
    schema = tmp_path / "schema.yaml"
    schema.write_text('schema: {t1w: "anat/*_T1w.nii.gz"}\nmetadata_from: participants.tsv\n')
    pushed = push_to(tmp_path / "out", "bids", EXAMPLES / name, "--schema", schema)
    assert pushed.returncode == 0, pushed.stderr
    for row, read in zip(rows, read_with_stock(tmp_path / "out", mode="streaming"), strict=True):
        path = Path(row["t1w"]["path"])
        assert read["t1w"] == [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
        assert (read["subject_id"], read["session_id"]) == (row["subject_id"], row["session_id"])


def test_pet005_names_the_empty_image(tmp_path):
    schema = tmp_path / "schema.yaml"
    schema.write_text('schema: {t1w: "anat/*_T1w.nii.gz", pet: "pet/*_pet.nii.gz"}\n')
    pushed = push_to(tmp_path / "out", "bids", EXAMPLES / "pet005", "--schema", schema)
    assert pushed.returncode == 1
    assert "sub-01_ses-baseline_pet.nii.gz is no NIfTI image" in pushed.stderr and "Traceback" not in pushed.stderr


def test_pet002_names_the_web_pages(tmp_path):
    schema = tmp_path / "schema.yaml"
    schema.write_text('schema: {t1w: "anat/*_T1w.nii", pet: "pet/*_pet.nii.gz"}\n')
    pushed = push_to(tmp_path / "out", "bids", EXAMPLES / "pet002", "--schema", schema)
    assert pushed.returncode == 1
    assert pushed.stderr.count("HTML page") == 8 and "Traceback" not in pushed.stderr


def test_7t_trt():
    dataset = load(
        "7t_trt",
        {
            "t1w": {"path": "anat/*_T1w.nii.gz"},
            "bold": {"path": "{subject}/{session}/func/*_task-rest_acq-{acquisition}_*bold.nii.gz", "many": True},
            "acquisition": {"of": "bold", "entity": "acq"},
            "json": {"of": "bold", "companion": ".json"},
        },
        metadata_from="participants.tsv",
    )
    rows = undecoded(dataset)
    assert len(rows) == len(list((EXAMPLES / "7t_trt").glob("sub-*/ses-*")))
    assert rows[0]["session_id"] == "ses-1"
    assert set(rows[0]["acquisition"]) == {"fullbrain", "prefrontal"}
    for row in rows:
        names = [os.path.basename(path) for path in paths(row["bold"])]
        assert names == sorted(names)
        for acquisition, text in zip(row["acquisition"], row["json"], strict=True):
            sidecar = EXAMPLES / "7t_trt" / f"task-rest_acq-{acquisition}_bold.json"
            assert text == sidecar.read_text()
    assert rows[0]["age_at_first_scan_years"] == 29
