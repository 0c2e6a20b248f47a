"""Real BIDS trees. The collection is no part of the project; without it these tests are skipped."""

import csv
import hashlib
import json
import os
from pathlib import Path

import pytest
from datasets import load_dataset

import datasets_bids  # noqa: F401
from datasets_bids.bids import BidsConfig, build_rows
from datasets_bids.index import NIFTI_EXTENSIONS, index_tree
from datasets_bids.layout import find_configs, parse_image

from .test_layout import cells
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


ALL = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()) if EXAMPLES.is_dir() else []


def images_on_disk(root):
    """By another way than the index."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.name.endswith(NIFTI_EXTENSIONS)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


@pytest.mark.parametrize("name", ALL)
def test_any_dataset_without_configuration(name):
    root = EXAMPLES / name
    images = images_on_disk(root)
    if not images:
        with pytest.raises(ValueError, match="there is no NIfTI image under"):
            load_dataset("bids", data_dir=root)
        return
    found = []
    index = index_tree(str(root))
    for config in find_configs(index):
        built = build_rows(BidsConfig(name=config), index)
        here = {os.path.relpath(path, root) for path in cells(built)}
        assert len(here) == len(cells(built))
        found += here
        # What is not here is listed, with the reason.
        assert images - here == {path for path in built.unused_images if path in images}
        assert all(built.unused_images.values())
    assert sorted(found) == sorted(images)
    rows = load_dataset("bids", data_dir=root, split="train").with_format("arrow")[:]
    assert rows.num_rows and rows.column_names[0] == "subject_id"

    table = root / "participants.tsv"
    if table.exists():
        with open(table, newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        of_subject = {"sub-" + line["participant_id"].removeprefix("sub-"): line for line in lines}
        assert set(rows.column("subject_id").to_pylist()) >= set(of_subject)
        for row in rows.to_pylist():
            for column, text in of_subject.get(row["subject_id"], {}).items():
                if column != "participant_id":
                    value = row[column]
                    same = value is None if text.strip() in ("", "n/a") else str(value) == text.strip()
                    assert same or float(value) == float(text), (row["subject_id"], column)


@pytest.mark.parametrize("name", ALL)
def test_subjects_entities_and_inheritance_are_those_of_pybids(name):
    """Of the dataset itself; pybids has derivatives as layouts of their own."""
    bids = pytest.importorskip("bids")
    layout = bids.BIDSLayout(EXAMPLES / name, validate=False)
    index = index_tree(str(EXAMPLES / name))
    if not index.images:
        return
    built = build_rows(BidsConfig(sidecars=True), index)
    rows = [row for rows in built.rows.values() for row in rows]
    subjects = layout.get_subjects()
    assert sorted({row["subject_id"].removeprefix("sub-") for row in rows if row["subject_id"]}) == sorted(subjects)
    sidecars = {}
    for row in rows:
        for column in [column for column in row if f"{column}_json" in row]:
            images, texts = (
                value if isinstance(value, list) else [value] for value in (row[column], row[f"{column}_json"])
            )
            sidecars |= dict(zip(images, texts, strict=True))
    for path in cells(built):
        theirs = layout.get_file(path)
        assert theirs is not None
        image = parse_image(os.path.relpath(path, EXAMPLES / name))
        entities = theirs.get_entities(metadata=False)
        assert entities.get("suffix", "") == image.suffix
        assert entities.get("datatype", image.datatype) == image.datatype
        if "task" in entities:
            assert entities["task"] == image.entities["task"]
        # pybids does not have these entities, and takes the sidecar of any scale or resolution.
        if not {"scale", "res"} & set(image.entities):
            assert json.loads(sidecars.get(path) or "{}") == layout.get_metadata(path)
        for extension, find in ((".bval", layout.get_bval), (".bvec", layout.get_bvec)):
            ours = index.companions(os.path.relpath(path, EXAMPLES / name), extension)
            if image.suffix == "dwi":
                assert [index.absolute(companion) for companion in ours[:1]] == [find(path)]


@pytest.mark.parametrize("name", ALL)
def test_entities_are_those_of_bids2table(name):
    bids2table = pytest.importorskip("bids2table")
    index = index_tree(str(EXAMPLES / name))
    for path in index.images:
        image, theirs = parse_image(path, index.dataset_of(path)), bids2table.parse_bids_entities(path)
        identifiers = {"sub": image.subject, "ses": image.session}
        ours = {key: identifier.partition("-")[2] for key, identifier in identifiers.items() if identifier}
        ours |= {key: label for key, label in image.entities.items() if key not in ("kind", "place")}
        ours |= {"suffix": image.suffix}
        assert {key: label for key, label in theirs.items() if key not in ("ext", "datatype")} == ours
        assert theirs.get("datatype", image.datatype) == image.datatype
