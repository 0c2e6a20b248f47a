import os

import pytest

from datasets_bids import find_all_niftis, find_nifti
from datasets_bids.index import index_tree

from .trees import write_volumes


@pytest.fixture
def tree(tmp_path):
    write_volumes(tmp_path, ["sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii", "sub-2/anat/._sub-2_T1w.nii"])
    write_volumes(tmp_path, [".git/annex/x.nii.gz"])
    (tmp_path / "participants.tsv").write_text("participant_id\n")
    return tmp_path


def test_files_are_sorted_and_hidden_ones_left_out(tree):
    index = index_tree(str(tree))
    paths = ["participants.tsv", "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii"]
    assert [file.path for file in index.files] == paths
    assert index.images == paths[1:]
    assert index.tree[""] == ["participants.tsv", "sub-1", "sub-2"]
    assert index.tree["sub-1"] == ["anat"]


def test_links_are_followed_once_and_dangling_ones_kept(tree):
    (tree / "link").symlink_to(tree / "sub-1", target_is_directory=True)
    (tree / "sub-1" / "loop").symlink_to(tree / "sub-1", target_is_directory=True)
    (tree / "sub-2" / "anat" / "annexed_T1w.nii.gz").symlink_to("../.git/annex/objects/nothing")
    images = index_tree(str(tree)).images
    assert "link/anat/sub-1_T1w.nii.gz" in images
    assert "sub-2/anat/annexed_T1w.nii.gz" in images
    assert not [image for image in images if "loop/loop" in image]


def test_fingerprint_follows_every_change(tree):
    last = [index_tree(str(tree)).fingerprint]

    def changed():
        last.append(index_tree(str(tree)).fingerprint)
        return last[-1] != last[-2]

    assert not changed()
    write_volumes(tree, ["sub-3/anat/sub-3_T1w.nii"])
    assert changed(), "added"
    (tree / "sub-3/anat/sub-3_T1w.nii").rename(tree / "sub-3/anat/sub-4_T1w.nii")
    assert changed(), "renamed"
    (tree / "sub-3/anat/sub-4_T1w.nii").unlink()
    assert changed(), "removed"
    (tree / "participants.tsv").write_text("participant_id\tage\n")
    assert changed(), "edited"
    # the same size and the same modification time, as rsync --times and tar leave them
    table = tree / "participants.tsv"
    stat = table.stat()
    table.write_text("participant_id\tAGE\n")
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed(), "replaced by a file of the same size and time"


def test_a_missing_root_and_a_file_are_told_apart(tree):
    with pytest.raises(FileNotFoundError, match="no directory .*nowhere: check data_dir"):
        index_tree(str(tree / "nowhere"))
    with pytest.raises(NotADirectoryError, match="participants.tsv is a file"):
        index_tree(str(tree / "participants.tsv"))


def test_find_nifti(tree):
    t1w = str(tree / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    assert find_nifti(tree, "sub-1/anat/*_T1w.nii*") == t1w
    assert find_nifti(tree / "sub-1" / "anat", "*_T1w.nii.gz") == t1w
    assert find_nifti(str(tree), "sub-1/anat/*_T2w.nii*") is None
    assert find_all_niftis(tree, "**/*_T1w.nii*") == [t1w, str(tree / "sub-2" / "anat" / "sub-2_T1w.nii")]
    assert find_all_niftis(tree, "*.tsv") == []
    with pytest.raises(ValueError, match="2 files match.*sub-1_T1w.nii.gz.*sub-2_T1w.nii"):
        find_nifti(tree, "*/anat/*")


def test_companions_follow_the_inheritance_principle(tmp_path):
    image = "sub-1/func/sub-1_task-rest_bold.nii.gz"
    write_volumes(tmp_path, [image, "derivatives/x/sub-1/sub-1_task-rest_bold.nii.gz"])
    for name in (
        "bold.json",
        "task-rest_bold.json",
        "task-nback_bold.json",
        "sub-1/sub-1_bold.json",
        "sub-1/func/sub-1_task-rest_bold.json",
        "sub-1/func/sub-1_task-rest_run-1_bold.json",
        "sub-1/func/sub-1_task-rest_sbref.json",
        "derivatives/x/dataset_description.json",
    ):
        (tmp_path / name).write_text("{}")
    index = index_tree(str(tmp_path))
    nearest_first = ["sub-1/func/sub-1_task-rest_bold.json", "sub-1/sub-1_bold.json", "task-rest_bold.json"]
    assert index.companions(image, ".json") == nearest_first
    assert index.companions("derivatives/x/sub-1/sub-1_task-rest_bold.nii.gz", ".json") == []
