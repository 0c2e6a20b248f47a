"""The preview of a dataset: its columns, what it measures, and what it looks like to the Hub's viewer."""

import io
import json
import os
import threading
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Nifti, Value
from huggingface_hub import DatasetCard
from PIL import Image, ImageDraw

from datasets_bids import BidsDataset, montage
from datasets_bids.card import remove_config, update_card
from datasets_bids.hub import plan_push, push_to_directory
from datasets_bids.pictures import ROW_NBYTES, Preview, as_table, beside, image_columns, parse_preview

from .phantom import Head
from .test_push import push_to, run
from .trees import volume_bytes


SHAPE = (48, 48, 20)
FEATURES = Features(
    {
        "subject_id": Value("string"),
        "dwi": Nifti(),
        "lesion": Nifti(),
        "bold": List(Nifti()),
        "bvals": Value("string"),
        "age": Value("float64"),
        "acq": List(Value("string")),
    }
)


@pytest.fixture
def dataset(tmp_path):
    """Three rows: all there; no mask and an empty list; a damaged image, and a mask without a lesion on it."""
    rows = {name: [] for name in FEATURES}
    for i in range(3):
        folder = tmp_path / f"sub-{i}"
        for name, modality in (("dwi", "dwi"), ("lesion-msk", "lesion-msk"), ("bold-0", "adc"), ("bold-1", "cbf")):
            Head(i).save(folder / f"sub-{i}_{name}.nii.gz", modality, SHAPE)
        rows["subject_id"].append(f"sub-{i}")
        rows["dwi"].append(str(folder / f"sub-{i}_dwi.nii.gz"))
        rows["lesion"].append(None if i == 1 else str(folder / f"sub-{i}_lesion-msk.nii.gz"))
        rows["bold"].append([] if i == 1 else [str(folder / f"sub-{i}_bold-{run}.nii.gz") for run in range(2)])
        rows["bvals"].append("0 1000 " * 100)
        rows["age"].append(None if i == 1 else 60.5)
        rows["acq"].append(["AP", "PA"])
    damaged = tmp_path / "sub-2" / "sub-2_dwi.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:4000])
    empty = nib.load(rows["lesion"][2])
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), empty.affine), rows["lesion"][2])
    return Dataset.from_dict(rows, features=FEATURES)


def written(preview: Preview, dataset: Dataset, path) -> list[dict]:
    preview.write(dataset, 0, len(dataset), str(path))
    return pq.read_table(path).to_pylist()


def test_columns_and_what_is_measured(dataset, tmp_path):
    preview = Preview.of({"train": dataset}, {"lesion": "dwi"})
    assert preview.masks == {"lesion"}
    first, second, third = written(preview, dataset, tmp_path / "preview.parquet")
    assert list(first) == [*FEATURES, "lesion_ml"] + [
        f"{name}_{key}" for name in ("dwi", "lesion", "bold") for key in ("shape", "voxel_mm", "nbytes")
    ]
    assert first["dwi_shape"] == "48x48x20" and first["dwi_voxel_mm"] == "4.167 x 4.167 x 10"
    assert first["dwi_nbytes"] == os.path.getsize(dataset.data.table["dwi"][0].as_py()["path"])
    lesion = nib.load(dataset[0]["lesion"].get_filename())
    voxel_ml = abs(np.linalg.det(lesion.affine[:3, :3])) / 1000
    assert first["lesion_ml"] == pytest.approx(np.asarray(lesion.dataobj).sum() * voxel_ml, abs=1e-3)
    assert first["bold_shape"] == ["48x48x20"] * 2 and len(first["bold"]) == 2
    assert first["acq"] == ["AP", "PA"] and first["age"] == 60.5
    assert len(first["bvals"]) == 200 and first["bvals"].endswith("…")
    assert second["lesion"] is second["lesion_ml"] is second["lesion_shape"] is second["age"] is None
    assert second["bold"] == second["bold_nbytes"] == []
    assert third["lesion_ml"] == 0 and third["dwi"]["bytes"] == third["lesion"]["bytes"], "both say why"


def test_no_directory_of_this_machine_is_drawn(dataset, tmp_path, monkeypatch):
    """Pictures are published."""
    said = []

    class Pen(ImageDraw.ImageDraw):
        def multiline_text(self, xy, text, *args, **kwargs):
            said.append(text)

    monkeypatch.setattr(montage.ImageDraw, "Draw", Pen)
    Path(dataset[0]["lesion"].get_filename()).write_bytes(b"no image")
    preview = Preview.of({"train": dataset}, {"lesion": "dwi"})
    written(preview, dataset, tmp_path / "p")
    text = " ".join(" ".join(said).split())
    assert "cannot be read: sub-0_lesion-msk.nii.gz is no NIfTI image" in text and "cut off in plane" in text
    assert tmp_path.name not in text and str(tmp_path.parent) not in text


def test_a_mask_is_drawn_on_the_image_that_the_builder_names(dataset, tmp_path):
    def picture(value) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGB"), float)[:240]

    alone = written(Preview.of({"train": dataset}), dataset, tmp_path / "a")[0]
    over = written(Preview.of({"train": dataset}, {"lesion": "dwi"}), dataset, tmp_path / "b")[0]
    grey = picture(over["dwi"])
    red = picture(over["lesion"])
    inside = red[..., 0] - red[..., 1] > 40
    outside = ~np.asarray(
        Image.fromarray(inside).resize((inside.shape[1] // 8, inside.shape[0] // 8)).resize(inside.shape[::-1])
    )
    assert 50 < inside.sum() < inside.size / 4
    # The image and the mask on it show the same slices.
    assert np.abs(grey - red).mean(axis=-1)[outside & ~inside].mean() < 6
    assert picture(alone["lesion"]).mean() < 30 < grey.mean(), "without an image to draw on, it is on black"
    assert alone["dwi"] != over["dwi"], "through the lesion, not through the middle"


def test_the_window_that_the_builder_names(dataset, tmp_path):
    narrow = written(Preview.of({"train": dataset}, {"dwi": [0, 5000]}), dataset, tmp_path / "a")[1]
    usual = written(Preview.of({"train": dataset}), dataset, tmp_path / "b")[1]
    dark, bright = (np.asarray(Image.open(io.BytesIO(row["dwi"]["bytes"]))).mean() for row in (narrow, usual))
    assert dark < bright / 5


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"lesoin": "dwi"}, "preview: 'lesoin' is no column of images .they are dwi, lesion, bold"),
        ({"lesion": "age"}, "preview: 'age' is no column of images"),
        ({"lesion": "lesion"}, "neither the image column that a mask is drawn on nor a window"),
        ({"dwi": [80, 0]}, "black < white"),
        ({"dwi": [1, 2, 3]}, "neither"),
        ({"dwi": None}, "neither"),
    ],
)
def test_a_mistake_in_what_the_builder_says(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_preview(spec, image_columns(FEATURES))


def test_masks_are_told_by_names(tmp_path):
    features = Features({name: Nifti() for name in ("t1w", "brain_mask", "seg", "drawn", "mixed", "masked")})
    files = {
        "t1w": ["a_T1w.nii.gz"] * 2,
        "brain_mask": ["a.nii.gz", None],
        "seg": ["a_x.nii.gz"] * 2,
        "drawn": ["a_label-L_desc-T1lesion_mask.nii.gz", "b_dseg.nii"],
        "mixed": ["a_mask.nii.gz", "b_T1w.nii.gz"],
        "masked": ["a_desc-masked_T1w.nii.gz"] * 2,
    }
    dataset = Dataset.from_dict(files, features=features)
    assert Preview.of({"train": dataset}).masks == {"brain_mask", "seg", "drawn"}


def test_every_image_is_inflated_once(dataset, tmp_path, monkeypatch):
    """The image that a mask is drawn on too; a mask without one is read again for its picture."""
    read = []

    class Counted(montage._GzipFile):
        def readinto(self, buffer):
            n = super().readinto(buffer)
            read.append(n)
            return n

    monkeypatch.setattr(montage, "_GzipFile", Counted)
    one = dataset.select([0])
    preview = Preview.of({"train": one}, {"lesion": "dwi"})
    preview.write(one, 0, 1, str(tmp_path / "a"))
    voxels = 48 * 48 * 20
    assert sum(read) == 3 * voxels * 2 + voxels


def test_the_same_rows_give_the_same_bytes(dataset, tmp_path):
    preview = Preview.of({"train": dataset}, {"lesion": "dwi"})
    for name in "ab":
        preview.write(dataset, 0, 3, str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert preview.key == Preview.of({"train": dataset}, {"lesion": "dwi"}).key != Preview.of({"train": dataset}).key


def test_a_preview_that_is_given_up_is_not_half_written(dataset, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        Preview.of({"train": dataset}).write(dataset, 0, 3, str(tmp_path / "a"), stop)
    seen = []
    with pytest.raises(KeyError), beside(lambda stop: seen.append(stop.wait(20))):
        raise KeyError
    assert seen == [True], "the failing block stops the preview"
    with pytest.raises(ZeroDivisionError), beside(lambda stop: 1 / 0):
        pass


def test_many_images_of_a_row_share_what_a_row_may_take(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.nii"
    nib.save(nib.Nifti1Image(rng.normal(size=(100, 100, 100)).astype(np.float32), np.eye(4)), path)
    features = Features({"subject_id": Value("string"), "bold": List(Nifti())})
    dataset = Dataset.from_dict({"subject_id": ["a"], "bold": [[str(path)] * 40]}, features=features)
    row = written(Preview.of({"train": dataset}), dataset, tmp_path / "p")[0]
    assert len(row["bold"]) == 40
    assert sum(len(value["bytes"]) for value in row["bold"]) <= ROW_NBYTES


# -- pushed --------------------------------------------------------------------------------------------------------------

# What huggingface/dataset-viewer does with a repository, as far as stock `datasets` does it: config_names.py sorts the configs, and
# first_rows.py takes 100 rows, whose cells features.py turns into what is shown.
VIEWER = """
import json, sys
from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset

path = sys.argv[1]
configs = get_dataset_config_names(path)
default = get_dataset_default_config_name(path) if len(configs) > 1 else None
shown = sorted(configs, key=lambda name: (name != default, name))
loaded = load_dataset(path, split="train")
(preview,) = [name for name in configs if name.endswith("preview")]
pictures = load_dataset(path, preview, split="train", streaming=True)
kinds = {name: type(getattr(f, "feature", f)).__name__ for name, f in pictures.features.items()}
print(json.dumps({
    "shown": shown,
    "loaded": {name: type(getattr(f, "feature", f)).__name__ for name, f in loaded.features.items()},
    "pictures": kinds,
    "ids": [[row["subject_id"] for row in rows] for rows in (loaded.select_columns("subject_id"), pictures)],
    "sizes": [row["t1w"] and row["t1w"].size for row in pictures],
}))
assert not any(name.startswith("datasets_bids") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """More than a page: 130 subjects, two of them without an image of their own."""
    return make_tree(tmp_path_factory.mktemp("tree"), 130)


@pytest.fixture
def small_tree(tmp_path):
    return make_tree(tmp_path / "tree", 2)


def make_tree(root, subjects: int):
    image = Head(0).image("dwi", (24, 24, 12)).to_bytes()
    for i in range(subjects):
        folder = root / f"sub-{i:03d}" / "anat"
        folder.mkdir(parents=True)
        if i not in (3, 120):
            (folder / f"sub-{i:03d}_T1w.nii").write_bytes(image)
        (folder / f"sub-{i:03d}_mask.nii.gz").write_bytes(volume_bytes(str(i)))
    (root / "schema.yaml").write_text(
        "schema:\n  t1w: {path: 'anat/*_T1w.nii', optional: true}\n  mask: anat/*_mask.nii.gz\npreview:\n  mask: t1w\n"
    )
    return root


def viewed(out) -> dict:
    done = run("-c", VIEWER, out)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_the_viewer_sees(tree, tmp_path):
    out = tmp_path / "out"
    pushed = push_to(out, "bids", tree, "--schema", tree / "schema.yaml", "--num-shards", "2")
    assert pushed.returncode == 0, pushed.stderr
    assert "Preview: config preview with pictures of the same 130 rows" in pushed.stdout
    seen = viewed(out)
    assert seen["loaded"] == {"subject_id": "Value", "t1w": "Nifti", "mask": "Nifti"}, "volumes are what is loaded"
    # The viewer shows the config first that `load_dataset` takes; no card makes the two differ.
    assert seen["shown"] == ["default", "preview"]
    assert set(seen["pictures"].values()) == {"Value", "Image"}
    assert seen["ids"][0] == seen["ids"][1] == [f"sub-{i:03d}" for i in range(130)]
    assert [i for i, size in enumerate(seen["sizes"]) if size is None] == [3, 120]
    paths = sorted((out / "preview").iterdir())
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    scanned = rows = 0
    for path in paths:
        parquet = pq.ParquetFile(path)
        metadata = parquet.metadata
        assert b"use_content_defined_chunking" in metadata.metadata or b"content_defined_chunking" in metadata.metadata
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            assert group.num_rows <= 100 and group.total_byte_size < 100 * ROW_NBYTES + 1_000_000
            assert all(group.column(j).has_offset_index for j in range(group.num_columns))
            if rows < 100:  # first_rows.py scans the row groups that hold the first 100 rows
                scanned += group.total_byte_size
            rows += group.num_rows
    assert scanned < 300_000_000 and rows == 130
    texts = [name for name, kind in seen["pictures"].items() if kind == "Value"]
    text = json.dumps(pq.read_table(out / "preview", columns=texts).to_pylist()[:100])
    assert len(text) < 200_000


def test_without_a_preview_and_after_one(small_tree, tmp_path):
    tree, out = small_tree, tmp_path / "out"
    for options in ([], ["--no-preview"]):
        pushed = push_to(out, "bids", tree, "--schema", tree / "schema.yaml", *options)
        assert pushed.returncode == 0, pushed.stderr
        assert (out / "preview").exists() == ("Preview: config" in pushed.stdout) == (options == [])
    data = DatasetCard.load(out / "README.md").data
    assert [config["config_name"] for config in data["configs"]] == ["default"]
    assert data["dataset_info"]["config_name"] == "default" if "config_name" in data["dataset_info"] else True
    assert [feature["name"] for feature in data["dataset_info"]["features"]] == ["subject_id", "t1w", "mask"]


def test_a_config_of_another_name_is_still_what_is_loaded(small_tree, tmp_path):
    """Beside a preview, one config alone has to say that it is the default one."""
    tree, out = small_tree, tmp_path / "out"
    pushed = push_to(out, "bids", tree, "--schema", tree / "schema.yaml", "--config", "lite")
    assert pushed.returncode == 0, pushed.stderr
    seen = viewed(out)
    assert seen["shown"] == ["lite", "lite-preview"] and seen["loaded"]["t1w"] == "Nifti"


def test_default_of_the_card():
    features = Features({"t1w": Nifti()})

    splits = datasets.SplitDict()
    splits.add(datasets.SplitInfo("train", num_bytes=1, num_examples=1))

    def pushed(card, *names):
        for name in names:
            info = datasets.DatasetInfo(config_name=name, features=features, splits=splits)
            card = update_card(DatasetCard("---\n{}\n---\n"), card, info, {"train": f"{name}/train-*"})
        return card

    def default(card):
        return [config["config_name"] for config in card.data["configs"] if config.get("default")]

    lite = pushed(None, "lite", "lite-preview")
    assert default(lite) == ["lite"]
    assert default(pushed(lite, "lite", "lite-preview")) == ["lite"], "pushed again"
    assert default(pushed(lite, "full", "full-preview", "lite")) == ["lite"], "the first one stays"
    assert default(pushed(lite, "default", "preview")) == [], "`default` needs no mark, and `datasets` refuses two"
    assert [config["config_name"] for config in remove_config(lite, "lite-preview").data["configs"]] == ["lite"]
    assert default(pushed(None, "default", "preview")) == []


def test_a_config_called_preview_is_refused(dataset):
    with pytest.raises(ValueError, match="rename it, or push with --no-preview"):
        plan_push({"train": dataset.select([0])}, "preview", preview={})
    assert plan_push({"train": dataset.select([0])}, "preview").preview is None


def test_a_preview_that_is_there_is_not_drawn_again(dataset, tmp_path, monkeypatch):
    """The push dies after the pictures; started again, it draws none of them, and ends as a push that was never killed."""
    healthy = dataset.select([0, 1])
    plan = plan_push({"train": healthy}, num_shards=2, preview={"lesion": "dwi"})
    card = DatasetCard("---\n{}\n---\n")
    push_to_directory(plan, tmp_path / "expected", card)
    monkeypatch.setattr("datasets_bids.hub.update_card", lambda *args: 1 / 0)
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda a, b: replace(a, b) if ".datasets-bids" in str(b) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push_to_directory(plan, tmp_path / "out", card)
    monkeypatch.undo()
    monkeypatch.setattr(Preview, "write", lambda *args, **kwargs: 1 / 0)
    push_to_directory(plan, tmp_path / "out", card)
    for path in (tmp_path / "expected").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes()


# -- in a notebook -------------------------------------------------------------------------------------------------------


def test_a_table_with_thumbnails(dataset):
    html = as_table(dataset)
    assert html.count("<img") == 1 + 1 + 2 + 1 + 1 + 1 + 2 and html.count("<tr>") == 4
    assert "3 rows, 7 columns" in html and "sub-0_dwi.nii.gz" in html
    assert len(html) < 500_000


def test_a_table_does_not_let_a_notebook_wait(dataset):
    html = as_table(dataset, max_rows=2, seconds=0)
    assert "<img" not in html and "sub-0_dwi.nii.gz" in html and "the first 2 of them shown" in html


def test_a_table_escapes_what_it_shows():
    table = pa.table({"<b>": ["<script>alert(1)</script>", None]})
    html = as_table(Dataset(table))
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html


def test_bids_dataset_is_shown_as_a_table(tmp_path):
    Head(0).save(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz", "dwi", SHAPE)
    ds = BidsDataset.from_bids(tmp_path, schema={"t1w": "anat/*_T1w.nii.gz"})
    assert ds._repr_html_().count("<img") == 1
