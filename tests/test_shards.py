"""Shard plans and true sizes."""

import gzip
import os

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Nifti, Value
from hypothesis import example, given
from hypothesis import strategies as st

from datasets_bids.shards import embedded_nbytes, plan_shards


def dataset_of(values, feature=None):
    """One column of paths (or of values, or of lists of them), as Arrow holds it: nothing is encoded."""

    def value(v):
        return (
            [value(x) for x in v] if isinstance(v, list) else {"path": v, "bytes": None} if isinstance(v, str) else v
        )

    features = Features({"image": feature or Nifti()})
    return Dataset(pa.table({"image": [value(v) for v in values]}, schema=features.arrow_schema))


row_sizes = st.lists(st.integers(0, 10_000), max_size=60)


@given(row_sizes, st.integers(1, 30_000))
@example([], 1)
@example([0, 0, 0], 1)
def test_plan_by_size(sizes, bound):
    plan = plan_shards(sizes, max_shard_size=bound)
    assert [row for s in plan for row in range(s.start, s.stop)] == list(range(len(sizes)))
    assert [s.index for s in plan] == list(range(len(plan)))
    assert all(s.num_shards == len(plan) and s.nbytes == sum(sizes[s.start : s.stop]) for s in plan)
    assert all(s.nbytes <= bound or s.stop - s.start == 1 for s in plan)
    assert all(s.stop > s.start for s in plan) or not sizes
    # no two neighbours that would fit into one
    assert all(a.nbytes + sizes[b.start] > bound for a, b in zip(plan, plan[1:]))


@given(row_sizes, st.integers(1, 80))
@example([], 3)
@example([0, 0, 0], 2)
@example([10_000, 1, 1], 3)
def test_plan_by_number(sizes, num_shards):
    plan = plan_shards(sizes, num_shards=num_shards)
    assert [row for s in plan for row in range(s.start, s.stop)] == list(range(len(sizes)))
    assert len(plan) == max(1, min(num_shards, len(sizes)))
    assert all(s.stop > s.start for s in plan) or not sizes


def test_plan_default_bound_and_units():
    sizes = [200_000_000] * 5
    assert [s.stop - s.start for s in plan_shards(sizes)] == [2, 2, 1]
    assert [s.stop - s.start for s in plan_shards(sizes, "1GB")] == [5]


@pytest.mark.parametrize("options", [{"max_shard_size": 0}, {"num_shards": 0}, {"max_shard_size": 1, "num_shards": 1}])
def test_plan_refuses(options):
    with pytest.raises(ValueError, match="shard"):
        plan_shards([1, 2], **options)


def test_embedded_nbytes_are_the_files(tmp_path):
    sizes = [400, 5_000, 100_000]
    paths = []
    for i, size in enumerate(sizes):
        paths.append(str(tmp_path / f"{i}.nii.gz"))
        (tmp_path / f"{i}.nii.gz").write_bytes(b"\x1f\x8b" + bytes(size - 2))
    assert embedded_nbytes(dataset_of(paths)).tolist() == sizes
    # an indices mapping, a list, a null, bytes
    assert embedded_nbytes(dataset_of(paths).select([2, 0])).tolist() == [sizes[2], sizes[0]]
    assert embedded_nbytes(dataset_of([paths[:2], None, []], List(Nifti()))).tolist() == [5_400, 0, 0]
    rows = dataset_of([{"bytes": b"12345", "path": paths[2]}, None], Image())
    assert embedded_nbytes(rows).tolist() == [5, 0]
    assert embedded_nbytes(dataset_of([])).tolist() == []


def test_embedded_nbytes_counts_other_columns(tmp_path):
    text = Dataset.from_dict({"text": ["x" * 1000] * 50})
    assert 50_000 <= embedded_nbytes(text).sum() < 52_000


def test_everything_that_cannot_be_stored_is_listed_at_once(tmp_path):
    good = tmp_path / "good.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), good)
    pair = tmp_path / "pair.img"
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2), np.int16), np.eye(4)), pair)
    (tmp_path / "empty.nii").touch()
    (tmp_path / "folder.nii").mkdir()
    os.symlink(tmp_path / ".git/annex/objects/gone", tmp_path / "link.nii.gz")
    (tmp_path / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    (tmp_path / "annex.nii.gz").write_text("../../.git/annex/objects/ab/cd/SHA256E-s12--00.nii.gz\n")
    (tmp_path / "annex2.nii.gz").write_text("/annex/objects/SHA256E-s12--00.nii.gz\n")
    (tmp_path / "page.nii.gz").write_text("\n<!DOCTYPE html>\n<html><body>403</body></html>")
    cases = [
        (str(tmp_path / "missing.nii"), "does not exist"),
        (str(tmp_path / "folder.nii"), "is a directory"),
        (str(tmp_path / "empty.nii"), "is empty"),
        (str(pair), "half of a .hdr/.img pair"),
        (str(tmp_path / "pair.hdr"), "half of a .hdr/.img pair"),
        (str(tmp_path / "link.nii.gz"), "fetch it"),
        (str(tmp_path / "lfs.nii.gz"), "git lfs pull"),
        (str(tmp_path / "annex.nii.gz"), "git annex get"),
        (str(tmp_path / "annex2.nii.gz"), "git annex get"),
        (str(tmp_path / "page.nii.gz"), "HTML page"),
    ]
    dataset = dataset_of([str(good), *(path for path, _ in cases)])
    with pytest.raises(ValueError) as error:
        embedded_nbytes(dataset)
    lines = str(error.value).splitlines()
    assert lines[0] == "10 files cannot be stored:"
    for row, ((path, what), line) in enumerate(zip(cases, lines[1:]), start=1):
        assert line.startswith(f"  row {row}, column 'image': {path} ") and what in line


@pytest.mark.parametrize(
    "value, what", [({"bytes": b"", "path": "x.nii"}, "empty"), ({"bytes": None, "path": None}, "neither")]
)
def test_values_without_content_are_refused(value, what):
    with pytest.raises(ValueError, match=f"row 1, column 'image'.*{what}"):
        embedded_nbytes(dataset_of([None, value]))


def test_single_file_images_named_img_are_stored(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    (tmp_path / "a.img").write_bytes(image.to_bytes())
    (tmp_path / "b.img.gz").write_bytes(gzip.compress(image.to_bytes()))
    assert len(embedded_nbytes(dataset_of([str(tmp_path / "a.img"), str(tmp_path / "b.img.gz")]))) == 2
    # other features have no pairs
    (tmp_path / "c.img").write_bytes(b"anything")
    assert embedded_nbytes(dataset_of([str(tmp_path / "c.img")], Image())).tolist() == [8]


def sparse(path, nbytes):
    with open(path, "wb") as f:
        f.truncate(nbytes)
    return str(path)


def test_two_gib_values_and_lists_are_refused(tmp_path):
    value = sparse(tmp_path / "value.nii", 2**31)
    part = sparse(tmp_path / "part.nii", 2**30)
    with pytest.raises(
        ValueError, match=r"row 1, column 'image': .*value.nii has 2,147,483,648 bytes; a value must stay below 2 GiB"
    ):
        embedded_nbytes(dataset_of([part, value]))
    lists = dataset_of([[part], [part, part]], List(Nifti()))
    with pytest.raises(ValueError, match=r"row 1, column 'image': .*part.nii and the other 1 files of this list"):
        embedded_nbytes(lists)
    # many rows of one column may hold more than 2 GiB together
    assert embedded_nbytes(dataset_of([part] * 3)).sum() == 3 * 2**30


def test_names_columns_in_structs(tmp_path):
    features = Features({"scan": {"t1w": List(Nifti()), "note": Value("string")}})
    rows = [{"t1w": [str(tmp_path / "gone.nii")], "note": ""}]
    with pytest.raises(ValueError, match=r"row 0, column 'scan.t1w': .*gone.nii does not exist"):
        embedded_nbytes(Dataset.from_dict({"scan": rows}, features=features))


def test_sizes_of_remote_files_can_be_sampled():
    import fsspec

    fs = fsspec.filesystem("memory")
    asked = []
    size = type(fs).size
    for i in range(5):
        fs.pipe(f"/sizes/{i}.nii", b"x" * (10 * (i + 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fs), "size", lambda self, path: asked.append(path) or size(self, path))
        dataset = dataset_of([f"memory://sizes/{i}.nii" for i in range(5)])
        assert embedded_nbytes(dataset, remote_sample=2).tolist() == [10, 20, 15, 15, 15] and len(asked) == 2
        assert embedded_nbytes(dataset).tolist() == [10, 20, 30, 40, 50]
        assert embedded_nbytes(dataset, remote_files=False).tolist() == [0] * 5
    fs.rm("/sizes", recursive=True)


def test_a_row_weighs_the_same_alone_and_among_others(tmp_path):
    """A shard is planned on the whole dataset and written from a copy of its own rows."""
    (tmp_path / "a.nii").write_bytes(b"12345")
    features = Features(
        {"image": Nifti(), "id": Value("string"), "runs": List(Value("string")), "age": Value("int64")}
    )
    dataset = Dataset.from_dict(
        {
            "image": [str(tmp_path / "a.nii")] * 4,
            "id": ["a", "b" * 100, None, "ccc"],
            "runs": [["x"], None, [], ["y" * 30, None]],
            "age": [1, None, 2, 3],
        },
        features=features,
    )
    together = embedded_nbytes(dataset)
    assert len(set(together.tolist())) > 1
    for row in range(4):
        alone = Dataset(dataset.with_format("arrow")[row : row + 1].combine_chunks(), info=dataset.info)
        assert embedded_nbytes(alone).tolist() == [together[row]]
        assert embedded_nbytes(dataset, row, row + 1).tolist() == [together[row]]
