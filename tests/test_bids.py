import json

import pytest
from datasets import Features, List, Nifti, Value, load_dataset

import datasets_bids  # noqa: F401
from datasets_bids.bids import BidsConfig, build_rows
from datasets_bids.index import index_tree
from datasets_bids.schema import SchemaError

from .trees import volume_bytes, write_volumes


T1W = "{subject}/anat/{subject}_T1w.nii.gz"


def rows_of(root, schema, **config):
    build = build_rows(BidsConfig(schema=schema, **config), index_tree(str(root)))
    features, unused = build.features, list(build.unused_images)
    (rows,) = build.rows.values()
    for row in rows:
        assert list(row) == list(features)
        for name, value in row.items():
            if isinstance(value, str) and value.startswith(str(root)):
                row[name] = value.removeprefix(f"{root}/")
            if isinstance(value, list):
                row[name] = [item and item.removeprefix(f"{root}/") for item in value]
    return features, rows, unused


def test_one_row_a_subject(tmp_path):
    paths = [f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in (10, 9, 2)]
    write_volumes(tmp_path, [*paths, "sub-9/anat/sub-9_T2w.nii.gz", "sub-2/func/sub-2_bold.nii.gz"])
    features, rows, unused = rows_of(tmp_path, {"t1w": T1W, "t2w": "{subject}/anat/*_T2w.nii.gz"})
    assert features == Features({"subject_id": Value("string"), "t1w": Nifti(), "t2w": Nifti()})
    assert rows == [
        {"subject_id": "sub-10", "t1w": paths[0], "t2w": None},
        {"subject_id": "sub-2", "t1w": paths[2], "t2w": None},
        {"subject_id": "sub-9", "t1w": paths[1], "t2w": "sub-9/anat/sub-9_T2w.nii.gz"},
    ]
    assert unused == ["sub-2/func/sub-2_bold.nii.gz"]


def test_one_row_a_session_with_a_null_for_none(tmp_path):
    paths = [f"sub-1/ses-{name}/anat/sub-1_ses-{name}_T1w.nii.gz" for name in ("retest", "test")]
    write_volumes(tmp_path, [*paths, "sub-2/anat/sub-2_T1w.nii.gz"])
    _, rows, unused = rows_of(tmp_path, {"t1w": "anat/*_T1w.nii.gz"})
    assert rows == [
        {"subject_id": "sub-1", "session_id": "ses-retest", "t1w": paths[0]},
        {"subject_id": "sub-1", "session_id": "ses-test", "t1w": paths[1]},
        {"subject_id": "sub-2", "session_id": None, "t1w": "sub-2/anat/sub-2_T1w.nii.gz"},
    ]
    assert not unused
    with pytest.raises(ValueError, match="column 't1w' takes one image.*ses-retest.*ses-test.*say row=\"session\""):
        rows_of(tmp_path, {"t1w": "anat/*_T1w.nii.gz"}, row="subject")


def test_a_list_of_patterns_is_an_order(tmp_path):
    write_volumes(tmp_path, ["raw/sub-1_cta.nii.gz", "reg/sub-1_cta.nii.gz", "reg/sub-2_cta.nii.gz"])
    _, rows, unused = rows_of(tmp_path, {"cta": ["raw/{subject}_cta.nii.gz", "reg/{subject}_cta.nii.gz"]})
    assert [row["cta"] for row in rows] == ["raw/sub-1_cta.nii.gz", "reg/sub-2_cta.nii.gz"]
    assert unused == ["reg/sub-1_cta.nii.gz"]


def test_two_files_for_one_cell_are_both_named(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_run-1_T1w.nii.gz", "sub-1/anat/sub-1_run-2_T1w.nii.gz"])
    with pytest.raises(
        ValueError, match="column 't1w' .* 2 match: .*run-1_T1w.nii.gz, .*run-2_T1w.nii.gz.*\"many\": True"
    ):
        rows_of(tmp_path, {"t1w": "{subject}/anat/*_T1w.nii.gz"})
    features, rows, _ = rows_of(tmp_path, {"t1w": {"path": "{subject}/anat/*_T1w.nii.gz", "many": True}})
    assert features["t1w"] == List(Nifti())
    assert rows[0]["t1w"] == ["sub-1/anat/sub-1_run-1_T1w.nii.gz", "sub-1/anat/sub-1_run-2_T1w.nii.gz"]


def test_companions_entities_and_captures(tmp_path):
    paths = [f"R00{i}/sub-{i}/dwi/sub-{i}_acq-{acq}_dwi.nii.gz" for i, acq in ((1, "a"), (1, "b"), (2, "a"))]
    write_volumes(tmp_path, paths)
    (tmp_path / paths[0].replace(".nii.gz", ".bval")).write_text("0 1000")
    (tmp_path / "dwi.bval").write_text("0 3000")
    (tmp_path / "dwi.json").write_text('{"EchoTime": 0.1, "FlipAngle": 90}')
    (tmp_path / paths[0].replace(".nii.gz", ".json")).write_text('{"EchoTime": 0.2}')
    schema = {
        "dwi": {"path": "{site}/{subject}/dwi/{subject}_*dwi.nii.gz", "many": True},
        "bval": {"of": "dwi", "companion": "bval"},
        "json": {"of": "dwi", "companion": ".json"},
        "bvec": {"of": "dwi", "companion": ".bvec"},
        "acquisition": {"of": "dwi", "entity": "acq", "labels": {"a": "axial"}},
        "site": {"capture": "site", "labels": {"R002": "second"}},
    }
    features, rows, _ = rows_of(tmp_path, schema)
    assert features["bval"] == features["acquisition"] == List(Value("string"))
    assert features["site"] == Value("string")
    assert rows[0]["bval"] == ["0 1000", "0 3000"]
    assert [json.loads(text) for text in rows[0]["json"]] == [
        {"EchoTime": 0.2, "FlipAngle": 90},
        {"EchoTime": 0.1, "FlipAngle": 90},
    ]
    assert rows[0]["bvec"] == [None, None]
    assert rows[0]["acquisition"] == ["axial", "b"]
    assert [row["site"] for row in rows] == ["R001", "second"]
    single = {"dwi": "{site}/{subject}/dwi/{subject}_acq-a_dwi.nii.gz", "bval": {"of": "dwi", "companion": "bval"}}
    features, rows, _ = rows_of(tmp_path, single)
    assert features["bval"] == Value("string")
    assert [row["bval"] for row in rows] == ["0 1000", "0 3000"]


def test_a_capture_with_two_values_in_a_row_is_an_error(tmp_path):
    write_volumes(tmp_path, ["A/sub-1_x.nii", "B/sub-1_y.nii"])
    schema = {"x": "{site}/{subject}_x.nii", "y": "{site}/{subject}_y.nii", "site": {"capture": "site"}}
    with pytest.raises(ValueError, match="one {site}, but A/sub-1_x.nii has A and B/sub-1_y.nii has B"):
        rows_of(tmp_path, schema)


def test_splits(tmp_path):
    train = ["Training/R001/sub-1/sub-1_T1w.nii.gz", "Training/R001/sub-1/sub-1_mask.nii.gz"]
    write_volumes(tmp_path, [*train, "Testing/R002/sub-2/sub-2_T1w.nii.gz"])
    (tmp_path / "meta.csv").write_text("subject_id,age\nsub-1,60\nsub-2,61\nsub-3,62\n")
    dataset = load_dataset(
        "bids",
        data_dir=tmp_path,
        splits={"train": "Training", "test": "Testing"},
        schema={
            "t1w": "{site}/{subject}/{subject}_T1w.nii.gz",
            "mask": "{site}/{subject}/{subject}_mask.nii.gz",
            "site": {"capture": "site"},
        },
        metadata_from="meta.csv",
    )
    assert dataset["train"]["subject_id"] == ["sub-1", "sub-3"]
    assert dataset["test"].remove_columns("t1w")[:] == {
        "subject_id": ["sub-2"],
        "mask": [None],
        "site": ["R002"],
        "age": [61],
    }
    with pytest.raises(ValueError, match="split 'test': there is no directory Test under"):
        rows_of(tmp_path, {"t1w": "{site}/{subject}/*_T1w.nii.gz"}, splits={"test": "Test"})


def test_who_is_only_in_the_table_or_only_has_files_is_reported_and_kept(tmp_path, caplog):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz"])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-2\t60\nsub-3\t61\n")
    _, rows, _ = rows_of(tmp_path, {"t1w": T1W}, metadata_from="participants.tsv")
    assert [(row["subject_id"], row["t1w"] is None, row["age"]) for row in rows] == [
        ("sub-1", False, None),
        ("sub-2", False, 60),
        ("sub-3", True, 61),
    ]
    assert caplog.messages == [
        "participants.tsv: nothing about 1 subject (sub-1); the values are null",
        "participants.tsv: no image of 1 subject (sub-3); the rows have null images",
    ]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"schema": {}}, "a schema is a dictionary of columns"),
        ({"schema": {"t1w": T1W}, "row": "run"}, "row='run' is none of 'subject', 'session'"),
        ({"schema": {"t1w": T1W}, "row": "file"}, "row='file' is none of"),
        ({"schema": {"t1w": T1W}, "sidecars": True}, "sidecars= goes without a schema"),
        ({"schema": {"t1w": T1W}, "splits": {}}, "splits is a dictionary"),
        (
            {"schema": {"t1w": "{subject}/anat/{subject}_T1.nii.gz"}},
            "column 't1w': no image under .* matches .*sub-1/anat holds sub-1_T1w.json, sub-1_T1w.nii.gz",
        ),
        (
            {"schema": {"t1w": {"path": "{subject}/ses-1/*.nii.gz", "optional": True}}},
            "no image .* matches any column, such as .*sub-1 holds anat",
        ),
        (
            {"schema": {"t1w": T1W, "age": T1W}, "metadata_from": "participants.tsv"},
            "column 'age' is in the schema and",
        ),
        ({"schema": {"t1w": T1W, "a": {"of": "t1w", "companion": ".json"}}}, "is no JSON object"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path, config, message):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz"])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-1\t60\n")
    (tmp_path / "T1w.json").write_text("{}")
    (tmp_path / "sub-1/anat/sub-1_T1w.json").write_text("[broken")
    with pytest.raises(ValueError, match=message):
        build_rows(BidsConfig(**config), index_tree(str(tmp_path)))


def test_an_error_names_builder_config_and_release(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz"])
    with pytest.raises(SchemaError, match="^builder 'bids', config 'default', column 't2w': .*This builder reads v3$"):
        load_dataset("bids", data_dir=tmp_path, schema={"t2w": "anat/*_T2w.nii.gz"}, release="v3")
    with pytest.raises(ValueError, match="^builder 'bids' has no option 'shema'; did you mean 'schema'?"):
        load_dataset("bids", data_dir=tmp_path, shema={"t1w": T1W})


def test_only_images_match(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii"])
    (tmp_path / "sub-1/anat/sub-1_T1w.json").write_text("{}")
    _, rows, _ = rows_of(tmp_path, {"t1w": "{subject}/anat/{subject}_T1w.*"})
    assert rows[0]["t1w"] == "sub-1/anat/sub-1_T1w.nii"


def test_values_are_the_files_bytes(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz"])
    example = load_dataset("bids", data_dir=tmp_path, schema={"t1w": T1W}, split="train")[0]
    assert example["t1w"].get_fdata().shape == (4, 4, 3)
    with open(example["t1w"].get_filename(), "rb") as file:
        assert file.read() == volume_bytes("sub-1/anat/sub-1_T1w.nii.gz")
