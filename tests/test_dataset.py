import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Features, List, Nifti, Value

from datasets_bids import BidsDataset, build_hf_dataset

from .trees import write_volumes


def test_from_bids_as_the_seeds_call_it(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz", "derivatives/masks/sub-1_lesion.nii.gz"])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-1\t60\n")
    ds = BidsDataset.from_bids(
        bids_root=tmp_path,
        schema={"t1w": "anat/*_T1w.nii.gz", "lesion": "derivatives/masks/*_lesion.nii.gz"},
        metadata_from="participants.tsv",
    )
    assert isinstance(ds, BidsDataset) and isinstance(ds, datasets.Dataset)
    assert ds.column_names == ["subject_id", "t1w", "lesion", "age"]
    assert ds[0]["lesion"].shape == (4, 4, 3)
    assert ds[0]["age"] == 60
    assert callable(ds.push_to_hub)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_build_hf_dataset_takes_what_pandas_holds(tmp_path, missing):
    write_volumes(tmp_path, ["a.nii.gz", "b.nii.gz"])
    a, b = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    table = pd.DataFrame(
        {
            "subject_id": ["sub-1", "sub-2"],
            "t1w": pd.Series([str(a), missing], dtype="string" if missing is pd.NA else object),
            "bold": [[str(a), b], []],
            "age": [61, missing],
            "left_out": [1, 2],
        }
    )
    features = Features(
        {"subject_id": Value("string"), "t1w": Nifti(), "bold": List(Nifti()), "age": Value("float64")}
    )
    ds = build_hf_dataset(table, features)
    assert ds.features == features
    assert ds[0]["t1w"].shape == (4, 4, 3)
    assert [len(row["bold"]) for row in ds] == [2, 0]
    assert ds[1]["t1w"] is None and ds[1]["age"] is None


def test_build_hf_dataset_with_pandas_own_strings(tmp_path):
    """pandas 3 holds text as `large_string`, which `Dataset.from_pandas(...).cast` refuses."""
    write_volumes(tmp_path, ["a.nii.gz"])
    table = pd.DataFrame({"t1w": [str(tmp_path / "a.nii.gz")]})
    assert build_hf_dataset(table, Features({"t1w": Nifti()}))[0]["t1w"].shape == (4, 4, 3)


def test_build_hf_dataset_names_a_missing_column():
    with pytest.raises(ValueError, match="file_table has no column 't2w' .it has t1w"):
        build_hf_dataset(pd.DataFrame({"t1w": ["x"]}), Features({"t2w": Nifti()}))
