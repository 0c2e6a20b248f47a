import json
import logging
from pathlib import Path

import pytest
from datasets import Features, List, Nifti, Value, get_dataset_config_names, load_dataset
from hypothesis import HealthCheck, given, settings

import datasets_bids  # noqa: F401
from datasets_bids.bids import BidsConfig, build_rows
from datasets_bids.index import File, Index, index_tree
from datasets_bids.layout import find_configs, parse_image
from datasets_bids.schema import SchemaError

from .strategies import trees
from .trees import write_volumes


def write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def build(root, **config):
    """The build, and its rows with paths relative to the root."""
    built = build_rows(BidsConfig(**config), index_tree(str(root)))
    (rows,) = built.rows.values()
    return built, [{name: relative(value, root) for name, value in row.items()} for row in rows]


def relative(value, root):
    if isinstance(value, list):
        return [relative(item, root) for item in value]
    return value.removeprefix(f"{root}/") if isinstance(value, str) else value


def cells(built):
    """Every path in an image column, as often as it is there."""
    found = []
    for rows in built.rows.values():
        for row in rows:
            for name, feature in built.features.items():
                if isinstance(feature, Nifti) and row[name] is not None:
                    found.append(row[name])
                elif isinstance(feature, List) and isinstance(feature.feature, Nifti):
                    found.extend(row[name])
    return found


# (path, subject, session, datatype, entities, suffix)
PATHS = [
    ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1", None, "anat", {}, "T1w"),
    (
        "sub-1/ses-2/func/sub-1_ses-2_task-a_run-01_bold.nii",
        "sub-1",
        "ses-2",
        "func",
        {"task": "a", "run": "01"},
        "bold",
    ),
    ("sub-1/T1.nii", "sub-1", None, "", {}, "T1"),
    ("masks/sub-1_ses-2_lesion.nii", "sub-1", "ses-2", "", {"place": "masks"}, "lesion"),
    ("A/R1/sub-1/ses-2/anat/sub-1_ses-2_T1w.nii", "sub-1", "ses-2", "anat", {"place": "A_R1"}, "T1w"),
    ("raw/sub-1/ses-1/maps/sub-1_ses-1_tmax.nii", "sub-1", "ses-1", "maps", {"place": "raw"}, "tmax"),
    ("func/sub-1/sub-1_bold.nii", "sub-1", None, "func", {}, "bold"),
    ("tpl-x/cohort-1/anat/tpl-x_cohort-1_T1w.nii", None, None, "anat", {"tpl": "x", "cohort": "1"}, "T1w"),
    ("sub-1/func/sub-1_task-a_bold.dtseries.nii", "sub-1", None, "func", {"task": "a", "kind": "dtseries"}, "bold"),
    ("sub-1/anat/sub-1_acq-1_acq-2_my_scan.nii", "sub-1", None, "anat", {"acq": "1", "words": "acq-2_my"}, "scan"),
    ("sub-1/anat/sub-1_task-a.nii", "sub-1", None, "anat", {"task": "a"}, ""),
]


@pytest.mark.parametrize("path, subject, session, datatype, entities, suffix", PATHS)
def test_parse_image(path, subject, session, datatype, entities, suffix):
    assert parse_image(path) == (path, subject, session, datatype, entities, suffix, "")


@pytest.mark.parametrize(
    "names, expected",
    [
        # an entity that tells no images of a row apart is in no name, but the task always is
        (["anat/{}_acq-x_T1w", "func/{}_task-rest_bold"], ["anat_T1w", "func_task_rest_bold"]),
        (["anat/{}_acq-a_T1w", "anat/{}_acq-b_T1w"], ["anat_acq_a_T1w", "anat_acq_b_T1w"]),
        (["anat/{}_T1w", "anat/{}_acq-b_T1w"], ["anat_T1w", "anat_acq_b_T1w"]),
        # in the order of BIDS, whatever the file's
        (
            ["func/{}_echo-1_task-a_bold", "func/{}_echo-2_task-a_bold"],
            ["func_task_a_echo_1_bold", "func_task_a_echo_2_bold"],
        ),
        (["dwi/{}_dwi", "dwi/{}_sbref"], ["dwi", "dwi_sbref"]),
        (["anat/{}_run-1_T1w", "anat/{}_run-2_T1w"], ["anat_T1w[]"]),
        (["anat/{}_acq-a_run-1_T1w", "anat/{}_acq-b_run-2_T1w"], ["anat_acq_a_T1w", "anat_acq_b_T1w"]),
        # what no label may hold, and what only differs by it or by case
        (["anat/{}_acq-a+b_T1w", "anat/{}_acq-a_b_T1w"], ["anat_acq_a_b_T1w", "anat_acq_a_b_T1w_2"]),
        (["anat/{}_acq-a_T1w", "anat/{}_acq-A_T1w"], ["anat_acq_A_T1w", "anat_acq_a_T1w_2"]),
        (["{}_3d"], ["image_3d"]),
        (["{}_path"], ["path_2"]),
    ],
)
def test_names_of_columns(tmp_path, names, expected):
    write_volumes(tmp_path, ["sub-1/" + name.format("sub-1") + ".nii" for name in names])
    built, _ = build(tmp_path)
    columns = [
        name + "[]" * isinstance(feature, List) for name, feature in built.features.items() if name != "subject_id"
    ]
    assert columns == expected


def test_rows_of_sessions_and_of_subjects(tmp_path):
    paths = [f"sub-1/ses-{s}/anat/sub-1_ses-{s}_T1w.nii.gz" for s in ("a", "b")] + ["sub-2/anat/sub-2_T1w.nii.gz"]
    write_volumes(tmp_path, paths)
    write(tmp_path, {"sub-3/eeg/sub-3_eeg.edf": ""})
    built, rows = build(tmp_path)
    assert built.features == Features(subject_id=Value("string"), session_id=Value("string"), anat_T1w=Nifti())
    assert rows == [
        {"subject_id": "sub-1", "session_id": "ses-a", "anat_T1w": paths[0]},
        {"subject_id": "sub-1", "session_id": "ses-b", "anat_T1w": paths[1]},
        {"subject_id": "sub-2", "session_id": None, "anat_T1w": paths[2]},
        {"subject_id": "sub-3", "session_id": None, "anat_T1w": None},
    ]
    _, rows = build(tmp_path, row="subject")
    assert rows == [
        {"subject_id": "sub-1", "anat_T1w": paths[:2]},
        {"subject_id": "sub-2", "anat_T1w": paths[2:]},
        {"subject_id": "sub-3", "anat_T1w": []},
    ]


def test_rows_of_files(tmp_path):
    paths = ["sub-1/dwi/sub-1_dir-AP_run-1_dwi.nii", "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii"]
    write_volumes(tmp_path, paths)
    write(
        tmp_path,
        {"dwi.bval": "0 1", "T1w.json": "{}", "participants.tsv": "participant_id\tage\nsub-1\t3\nsub-2\t4\n"},
    )
    built, rows = build(tmp_path, row="file", sidecars=True)
    assert list(built.features) == [
        *("subject_id", "session_id", "path", "age", "datatype", "suffix", "dir", "run", "image", "bval", "json")
    ]
    assert [tuple(row.values()) for row in rows] == [
        ("sub-1", None, paths[0], 3, "dwi", "dwi", "AP", "1", paths[0], "0 1", None),
        ("sub-1", "ses-2", paths[1], 3, "anat", "T1w", None, None, paths[1], None, "{}"),
    ]


def test_derivatives_and_group_files_are_configs(tmp_path):
    raw = ["sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz"]
    masks = ["derivatives/masks/sub-1/anat/sub-1_desc-lesion_mask.nii.gz"]
    prep = ["derivatives/prep/sub-1/anat/sub-1_T1w.nii.gz", "derivatives/prep/tpl-x/tpl-x_T1w.nii.gz"]
    nested = ["sourcedata/atlas/tpl-x/anat/tpl-x_atlas-y_dseg.nii.gz"]
    write_volumes(tmp_path, [*raw, *masks, *prep, *nested, "stimuli/face.nii.gz"])
    table = "participant_id\tage\nsub-1\t30\nsub-2\t40\n"
    write(tmp_path, {"sourcedata/atlas/dataset_description.json": "{}", "participants.tsv": table, "a.mgz": ""})
    configs = find_configs(index_tree(str(tmp_path)))
    assert {name: [image.path for image in images] for name, images in configs.items()} == {
        "default": raw,
        "masks": masks,
        "prep": prep[:1],
        "atlas": nested,
        "group": ["stimuli/face.nii.gz"],
        "prep-group": prep[1:],
    }
    built, rows = build(tmp_path)
    assert [(row["age"], row["anat_T1w"]) for row in rows] == list(zip([30, 40], raw, strict=True))
    assert built.unused_images == {
        "a.mgz": "no NIfTI file; convert it, for example with nibabel or dcm2niix",
        **dict.fromkeys(masks, "in config 'masks'"),
        prep[0]: "in config 'prep'",
        prep[1]: "in config 'prep-group'",
        nested[0]: "in config 'atlas'",
        "stimuli/face.nii.gz": "in config 'group'",
    }
    _, rows = build(tmp_path, name="masks")
    assert rows == [{"subject_id": "sub-1", "age": 30, "anat_mask": masks[0]}]
    _, rows = build(tmp_path, name="atlas")
    assert rows == [
        {"subject_id": None, "path": nested[0], "datatype": "anat", "suffix": "dseg", "tpl": "x", "atlas": "y"}
        | {"image": nested[0]}
    ]
    _, rows = build(tmp_path, derivatives=["masks"])
    assert [row["masks_anat_mask"] for row in rows] == [masks[0], None]
    built, _ = build(tmp_path, derivatives=True)
    assert [name for name in built.features if "anat" in name] == ["anat_T1w", "masks_anat_mask", "prep_anat_T1w"]
    with pytest.raises(SchemaError, match="no dataset 'mask' in the tree; did you mean 'masks'"):
        build(tmp_path, name="mask")
    with pytest.raises(SchemaError, match="derivatives: there is no 'mask'; did you mean 'masks'"):
        build(tmp_path, derivatives="mask")
    assert get_dataset_config_names("bids", data_dir=str(tmp_path)) == list(configs)


def test_a_study_without_images_of_its_own(tmp_path):
    write_volumes(tmp_path, ["rawdata/sub-1/anat/sub-1_T1w.nii", "derivatives/a/sub-1/anat/sub-1_T1w.nii"])
    write(tmp_path, {"rawdata/dataset_description.json": "{}"})
    assert build(tmp_path)[1] == [{"subject_id": "sub-1", "anat_T1w": "rawdata/sub-1/anat/sub-1_T1w.nii"}]
    (tmp_path / "rawdata").rename(tmp_path / "derivatives" / "b")
    with pytest.raises(SchemaError, match="several datasets, say which one as the config's name: a, b"):
        build(tmp_path)


def test_tables(tmp_path, caplog):
    paths = [f"sub-1/ses-{s}/func/sub-1_ses-{s}_task-a_run-{r}_bold.nii" for s in "ab" for r in "12"]
    write_volumes(tmp_path, paths)
    dictionary = {
        "group": {"Description": "Arm of the trial.", "Levels": {"0": "placebo", "1": {"Description": "verum"}}},
        "age": {"LongName": "Age", "Units": "year"},
        "weight": {"Format": "number"},
        "dose": {"Format": "integer"},
    }
    write(
        tmp_path,
        {
            "participants.tsv": "participant_id\tgroup\tage\tweight\tdose\tfunc_task_a_bold\nsub-1\t0\t30\t70\t89+\tx\n",
            "participants.json": json.dumps(dictionary),
            "sub-1/sub-1_sessions.tsv": "session_id\tpulse\nses-a\t60\nses-b\tn/a\n",
            "sub-1/ses-a/sub-1_ses-a_scans.tsv": "filename\tquality\n"
            + "".join(f"func/{Path(path).name}\t{i}\n" for i, path in enumerate(paths[:2])),
            "scans.json": '{"quality": {"Description": "From 0 to 9"}}',
        },
    )
    built, rows = build(tmp_path)
    assert list(built.features) == [
        *("subject_id", "session_id", "group", "age", "weight", "dose", "participants_func_task_a_bold", "pulse"),
        *("func_task_a_bold", "func_task_a_bold_quality"),
    ]
    del rows[0]["func_task_a_bold"]
    assert list(rows[0].values()) == ["sub-1", "ses-a", "0", 30, 70.0, "89+", "x", 60, [0, 1]]
    assert isinstance(rows[0]["weight"], float)
    assert (rows[1]["pulse"], rows[1]["func_task_a_bold_quality"]) == (None, [None, None])
    assert built.descriptions["group"] == "Arm of the trial; levels: 0 = placebo, 1 = verum"
    assert built.descriptions["age"] == "Age; unit: year"
    assert built.descriptions["quality"] == "From 0 to 9"
    assert built.descriptions["func_task_a_bold"] == f"such as `{paths[0]}`"
    assert "row 2, column 'dose': '89+' is no integer, as the data dictionary says; the column is text" in caplog.text
    _, rows = build(tmp_path, row="file")
    assert [row["quality"] for row in rows] == [0, 1, None, None]
    built, _ = build(tmp_path, metadata_from=[])
    assert "age" not in built.features


def test_filters(tmp_path):
    paths = [
        f"sub-{s}/ses-1/{name.format(f'sub-{s}_ses-1')}.nii" for s in "12" for name in ("anat/{}_T1w", "func/{}_bold")
    ]
    paths += ["sub-2/ses-2/anat/sub-2_ses-2_acq-a_T1w.nii", "sub-2/ses-2/anat/sub-2_ses-2_acq-b_T1w.nii"]
    write_volumes(tmp_path, paths)
    write(tmp_path, {"participants.tsv": "participant_id\tage\nsub-1\t1\nsub-2\t2\nsub-3\t3\n"})
    for filters, expected in (
        ({"subjects": ["1"]}, paths[:2]),
        ({"subjects": "sub-1", "suffixes": ["T1w"]}, paths[:1]),
        ({"sessions": ["ses-2"]}, paths[4:]),
        ({"sessions": ["2"], "subjects": ["2"]}, paths[4:]),
        ({"datatypes": ["func"]}, [paths[1], paths[3]]),
    ):
        built, rows = build(tmp_path, **filters)
        assert sorted(relative(cells(built), tmp_path)) == sorted(expected)
        assert len(rows) == len({Path(path).parts[:2] for path in expected})
        assert set(built.unused_images) == set(paths) - set(expected)
        assert all(reason.startswith("left out by ") for reason in built.unused_images.values())
    # The names are those of the unfiltered build, also where nothing in what is left would need them.
    assert "anat_T1w" in build(tmp_path, sessions=["1"])[0].features
    assert "anat_acq_a_T1w" in build(tmp_path, sessions=["2"])[0].features
    with pytest.raises(SchemaError, match="subjects: no image of 'sub-4'"):
        build(tmp_path, subjects=["4"])
    with pytest.raises(SchemaError, match="suffixes: no image of 'T1'; did you mean 'T1w'"):
        build(tmp_path, suffixes=["T1"])
    with pytest.raises(SchemaError, match="no image passes all of the filters|no image of 'func'"):
        build(tmp_path, sessions=["2"], datatypes=["func"])
    built = build_rows(BidsConfig(schema={"t1w": "anat/*_ses-1_T1w.nii"}, subjects=["2"]), index_tree(str(tmp_path)))
    assert [row["subject_id"] for row in built.rows["train"]] == ["sub-2"]
    assert built.unused_images[paths[0]] == "left out by subjects="


def test_splits(tmp_path):
    paths = ["Training/R1/sub-1/ses-1/anat/sub-1_ses-1_T1w.nii", "Testing/R2/sub-2/ses-1/anat/sub-2_ses-1_T1w.nii"]
    write_volumes(tmp_path, [*paths, "Other/sub-3/anat/sub-3_T1w.nii"])
    built = build_rows(BidsConfig(splits={"train": "Training", "test": "Testing"}), index_tree(str(tmp_path)))
    assert {split: [row["anat_T1w"] for row in rows] for split, rows in built.rows.items()} == {
        "train": [str(tmp_path / paths[0])],
        "test": [str(tmp_path / paths[1])],
    }
    assert built.unused_images == {"Other/sub-3/anat/sub-3_T1w.nii": "in no split"}


def test_a_tree_without_images_says_what_is_there(tmp_path):
    write(
        tmp_path, {"sub-1/meg/sub-1_meg.fif": "", "sub-1/micr/sub-1_sample-A_SEM.ome.tif": "", "participants.tsv": ""}
    )
    with pytest.raises(
        ValueError, match=r"no NIfTI image under .*3 files \(.fif, .tif, .tsv\), 1 of them images"
    ) as e:
        load_dataset("bids", data_dir=tmp_path)
    assert "\n" not in str(e.value)


def test_empty_images_do_not_stop_a_build(tmp_path):
    write(tmp_path, {"sub-1/anat/sub-1_T1w.nii.gz": ""})
    assert load_dataset("bids", data_dir=tmp_path, split="train").num_rows == 1


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)
@given(trees())
def test_every_image_is_in_one_cell(paths):
    index = Index("/root", tuple(sorted(File(path, 0) for path in paths)))
    for row in (None, "subject", "session", "file"):
        found = []
        for name, images in find_configs(index).items():
            if images[0].subject is None and row in ("subject", "session"):
                row_here = None
            else:
                row_here = row
            built = build_rows(BidsConfig(name=name, row=row_here, sidecars=True), index)
            found += cells(built)
            columns = list(built.features)
            assert len({column.lower() for column in columns}) == len(columns)
            assert all(column.isidentifier() and column.isascii() for column in columns)
            keys = [(r["subject_id"], r.get("session_id"), r.get("path")) for r in built.rows["train"]]
            assert len(set(keys)) == len(keys)
        assert sorted(found) == [f"/root/{path}" for path in index.images]
        assert sorted(relative(found, "/root")) == sorted(paths)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
