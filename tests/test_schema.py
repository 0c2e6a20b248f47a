import pytest

from datasets_bids.schema import Pattern, SchemaError, entities, parse_schema


# (pattern, path, what the placeholders match or None)
MATCHES = [
    ("{subject}/anat/{subject}_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz", {"subject": "sub-01"}),
    ("{subject}/anat/{subject}_T1w.nii.gz", "sub-01/anat/sub-02_T1w.nii.gz", None),
    ("{subject}/anat/{subject}_T1w.nii.gz", "derivatives/sub-01/anat/sub-01_T1w.nii.gz", None),
    ("{subject}/{session}/*.nii", "sub-A1/ses-0p5/x.nii", {"subject": "sub-A1", "session": "ses-0p5"}),
    ("{subject}/{session}/*.nii", "derivatives/sub-A1/x.nii", None),
    ("sub-{subject}/x.nii", "sub-A1/x.nii", {"subject": "sub-A1"}),
    ("flat/{subject}_{session}_dwi.nii", "flat/sub-1_ses-02_dwi.nii", {"subject": "sub-1", "session": "ses-02"}),
    ("T/{site}/{subject}/x.nii", "T/R001/sub-r1/x.nii", {"site": "R001", "subject": "sub-r1"}),
    ("{subject}/*_label-{side}_mask.nii", "sub-1/sub-1_label-L_mask.nii", {"subject": "sub-1", "side": "L"}),
    ("{subject:Bra*}/t1.nii", "BraTS20_Training_001/t1.nii", {"subject": "BraTS20_Training_001"}),
    ("{subject}/**/{subject}_T1w.nii", "sub-1/sub-1_T1w.nii", {"subject": "sub-1"}),
    ("{subject}/**/{subject}_T1w.nii", "sub-1/a/b/sub-1_T1w.nii", {"subject": "sub-1"}),
    ("{subject}/*/x.nii", "sub-1/a/b/x.nii", None),
    ("{subject}/run-[12].nii", "sub-1/run-2.nii", {"subject": "sub-1"}),
    ("{subject}/run-[!12].nii", "sub-1/run-2.nii", None),
    ("{subject}/a?.nii", "sub-1/ab.nii", {"subject": "sub-1"}),
    ("{subject}/a.nii", "sub-1/axnii", None),
    # without {subject}: relative to every subject's and session's directory, or to the root by the file's entities
    ("anat/*_T1w.nii", "sub-1/anat/sub-1_T1w.nii", {"subject": "sub-1"}),
    ("anat/*_T1w.nii", "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii", {"subject": "sub-1", "session": "ses-2"}),
    ("anat/*_T1w.nii", "derivatives/sub-1/anat/sub-1_T1w.nii", None),
    ("derivatives/masks/*_lesion.nii", "derivatives/masks/sub-1_lesion.nii", {"subject": "sub-1"}),
    ("derivatives/masks/*_lesion.nii", "derivatives/masks/average_lesion.nii", None),
]


@pytest.mark.parametrize("pattern, path, expected", MATCHES)
def test_match(pattern, path, expected):
    assert Pattern(pattern).match(path) == expected


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{subjct}/x.nii", "did you mean {subject}"),
        ("{sub}/x.nii", "did you mean {subject}"),
        ("{subject}/{ses}/x.nii", "did you mean {session}"),
        ("{subject/x.nii", "placeholders are written"),
        ("{not a name}/x.nii", "is no placeholder"),
    ],
)
def test_a_mistaken_placeholder_is_explained(pattern, message):
    with pytest.raises(SchemaError, match=message):
        Pattern(pattern)


def test_entities():
    name = "sub-01/ses-1/func/sub-01_ses-1_task-rest_run-02_bold.nii.gz"
    assert entities(name) == {"sub": "01", "ses": "1", "task": "rest", "run": "02"}
    assert entities("T1.nii") == {}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({}, "a schema is a dictionary of columns"),
        (["t1w"], "a schema is a dictionary of columns"),
        ({"t1w": 3}, "column 't1w': expected a pattern"),
        ({"t1w": []}, "column 't1w': 'path' takes a pattern"),
        ({"t1w": {"pth": "x.nii"}}, "column 't1w': unknown key 'pth'; did you mean 'path'?"),
        ({"t1w": {"path": "x.nii", "many": "yes"}}, "'many' is true or false"),
        ({"t1w": {"path": "x.nii", "labels": {}}}, "'labels' does not go with 'path'"),
        ({"t1w": {"path": "x.nii", "capture": "site"}}, "column 't1w': needs one of"),
        ({"t1w": "../x.nii"}, "leaves the root"),
        ({"subject_id": "x.nii"}, "column 'subject_id': this name is taken"),
        ({"bval": {"companion": ".bval"}}, "column 'bval': 'companion' needs 'of'"),
        ({"dwi": "x.nii", "bval": {"of": "dwy", "companion": ".bval"}}, "is no image column; did you mean 'dwi'"),
        ({"t1w": "{subject}/x.nii", "site": {"capture": "site"}}, "unknown placeholder 'site'"),
        ({"t1w": "{subject}/x.nii", "acq": {"of": "t1w", "entity": 3}}, "'entity' takes a text"),
    ],
)
def test_a_mistake_names_the_column_and_the_fix(schema, message):
    with pytest.raises(SchemaError, match=message):
        parse_schema(schema)


def test_nearest_says_where_the_tree_differs():
    tree = {"": ["raw_data"], "raw_data": ["sub-1"], "raw_data/sub-1": ["ses-0001", "ses-0002"]}
    assert Pattern("raw_data/{subject}/ses-01/x.nii").nearest(tree) == "raw_data/sub-1 holds ses-0001, ses-0002"
    assert Pattern("rawdata/{subject}/ses-01/x.nii").nearest(tree) == "it holds raw_data"
