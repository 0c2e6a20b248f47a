"""The mended `Nifti` feature.

A defect of `datasets` is a function decorated with `defect`. It runs twice: with the patches, where it has to pass,
and without them, where it has to fail on the releases that have the defect.

Deep profile (thousands of images; a minute): `pytest tests/test_nifti.py -m deep`.
"""

import copy
import gzip
import io
import pickle
import threading
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, IterableDataset, List, Nifti, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension
from packaging.version import Version

from datasets_bids import nifti, patching

from . import nifti_strategies


RELEASE = Version(datasets.__version__)
FEATURES = Features({"image": Nifti(), "id": Value("int64")})
DEFECTS = []


def defect(fact, before=None, since=None):
    """Register a check of a defect (by its number in the list of defects) and the releases that have it."""

    def register(check):
        present = (before is None or RELEASE < Version(before)) and (since is None or RELEASE >= Version(since))
        DEFECTS.append(pytest.param(check, present, id=f"{fact}-{check.__name__}"))
        return check

    return register


@contextmanager
def stock():
    patching.undo()
    try:
        yield
    finally:
        patching.apply()


@pytest.fixture(autouse=True)
def patched(tmp_path, monkeypatch):
    patching.apply()
    monkeypatch.chdir(tmp_path)


def make_image(image_class=nib.Nifti1Image, shape=(4, 5, 6), dtype=np.int16, slope=None, seed=0):
    data = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(dtype)
    image = image_class(data, np.diag([2.0, 2.0, 3.0, 1.0]))
    if slope is not None:
        image.header.set_slope_inter(slope, -1024)
    return image


def make_cifti():
    axis = nib.cifti2.BrainModelAxis.from_mask(
        np.ones((2, 2, 2)), name="CIFTI_STRUCTURE_THALAMUS_LEFT", affine=np.eye(4)
    )
    series = nib.cifti2.SeriesAxis(0, 1, 3)
    return nib.Cifti2Image(np.arange(24, dtype=np.float32).reshape(3, 8), (series, axis))


def stored(image, compress=gzip.compress):
    return compress(copy.copy(image).to_bytes())


def values(image):
    return np.asanyarray(image.dataobj)


def cells(ds, column="image"):
    """The stored values, as a push finds them."""
    return ds.with_format("arrow")[:][column].to_pylist()


def decode(bytes_, path="sub-01_T1w.nii.gz"):
    return Nifti().decode_example({"path": path, "bytes": bytes_})


def encode(value):
    return Nifti().encode_example(value)


# 7: what does not cast


@defect(7)
def paths_of_pandas_3_cast():
    stored_ = pa.array(["a.nii", None, "b.nii"], pa.large_string())
    ds = Dataset(pa.table({"image": stored_})).cast(Features({"image": Nifti(decode=False)}))
    assert ds["image"][:] == [{"bytes": None, "path": "a.nii"}, None, {"bytes": None, "path": "b.nii"}]


@defect(7)
def every_arrow_type_of_bytes_and_paths_casts():
    for paths in (pa.array(["skipped", "a.nii", None, "b.nii"], t) for t in (pa.large_string(), pa.string_view())):
        for storage in (paths, paths.dictionary_encode(), pa.StructArray.from_arrays([paths], ["path"])):
            cast = Nifti().cast_storage(storage[1:])
            assert cast.type == Nifti.pa_type
            assert [x and x["path"] for x in cast.to_pylist()] == ["a.nii", None, "b.nii"]
    for bytes_ in (pa.array([b"skipped", b"a", None], t) for t in (pa.large_binary(), pa.binary_view())):
        for storage in (bytes_, bytes_.dictionary_encode(), pa.StructArray.from_arrays([bytes_], ["bytes"])):
            cast = Nifti().cast_storage(storage[1:])
            assert cast.type == Nifti.pa_type
            assert [x and x["bytes"] for x in cast.to_pylist()] == [b"a", None]


@defect(7)
def sibling_features_cast_too():
    for name in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"):
        if hasattr(datasets, name):
            feature = getattr(datasets, name)()
            for type_ in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
                assert feature.cast_storage(pa.array(["x"], type_)).to_pylist() == [{"bytes": None, "path": "x"}]


# 9: what loads from a path and not from bytes


@defect(9)
def nifti_2_decodes_from_bytes():
    image = make_image(nib.Nifti2Image)
    decoded = decode(stored(image))
    assert type(decoded) is nib.Nifti2Image
    assert np.array_equal(values(decoded), values(image))


@defect(9)
def cifti_2_decodes_from_bytes():
    image = make_cifti()
    decoded = decode(stored(image), "x.dtseries.nii.gz")
    assert type(decoded) is nib.Cifti2Image
    assert np.array_equal(values(decoded), values(image))
    assert decoded.header.get_axis(1) == image.header.get_axis(1)


@defect(9)
def every_compression_decodes_from_bytes():
    image = make_image()
    for extension in nifti_strategies.EXTENSIONS:
        decoded = decode(nifti_strategies.compress(image.to_bytes(), extension), "x.nii" + extension)
        assert np.array_equal(values(decoded), values(image))


@defect(9)
def a_header_is_read_without_inflating_the_image():
    bytes_ = stored(nib.Nifti1Image(np.zeros((128, 128, 64, 10), np.int16), np.eye(4)))  # 20 MB inflated
    decode(stored(make_image()))  # imports
    tracemalloc.start()
    try:
        decoded = decode(bytes_)
        assert decoded.shape == (128, 128, 64, 10)
        assert not decoded.dataobj[:, :, 0, 0].any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


@defect(9)
def an_image_pickles_at_its_compressed_size():
    bytes_ = stored(nib.Nifti1Image(np.zeros((128, 128, 64, 10), np.int16), np.eye(4)))
    decoded = decode(bytes_)
    decoded.dataobj[..., -1], decoded.dataobj[..., 0]
    pickled = pickle.dumps(decoded)
    assert len(pickled) < len(bytes_) + 10_000
    assert np.array_equal(values(pickle.loads(pickled)), values(decoded))


# 10: images that lose their data


@defect(10)
def an_image_in_memory_keeps_its_data():
    image = make_image()
    assert np.array_equal(values(decode(**encode_as_kwargs(image))), values(image))


def encode_as_kwargs(image):
    encoded = encode(image)
    return {"bytes_": encoded["bytes"], "path": encoded["path"]}


@defect(10)
def an_edited_image_keeps_its_edits():
    make_image().to_filename("a.nii.gz")
    edits = {
        "header": lambda i: i.header.__setitem__("descrip", b"edited"),
        "affine": lambda i: i.affine.__setitem__((0, 3), 7),
        "sform": lambda i: i.set_sform(np.diag([5.0, 5.0, 5.0, 1.0]), 2),
        "dtype": lambda i: i.set_data_dtype(np.float32),
        "alias": lambda i: i.set_data_dtype("smallest"),
        "extension": lambda i: i.header.extensions.append(Nifti1Extension("comment", b"edited")),
        "slope": lambda i: i.header.set_slope_inter(2, 1),
    }
    for name, edit in edits.items():
        for image in (nib.load("a.nii.gz"), decode(Path("a.nii.gz").read_bytes())):
            edit(image)
            f = io.BytesIO()
            copy.copy(image).to_stream(f)
            assert encode(image) == {"path": None, "bytes": f.getvalue()}, name
    sliced = nib.load("a.nii.gz").slicer[1:]
    assert np.array_equal(values(decode(**encode_as_kwargs(sliced))), values(sliced))


@defect(10)
def a_builder_that_yields_images_keeps_their_data():
    image = make_image()
    image.to_filename("a.nii.gz")

    def generate():
        yield {"image": image.slicer[1:3], "id": 0}
        yield {"image": nib.load("a.nii.gz"), "id": 1}
        yield {"image": None, "id": 2}

    class Builder(datasets.GeneratorBasedBuilder):
        def _info(self):
            return datasets.DatasetInfo(features=FEATURES)

        def _split_generators(self, dl_manager):
            return [datasets.SplitGenerator("train")]

        def _generate_examples(self):
            yield from enumerate(generate())

    builder = Builder(cache_dir="cache")
    builder.download_and_prepare()
    by_builder = builder.as_dataset("train")
    by_generator = Dataset.from_generator(generate, features=FEATURES, cache_dir="cache")
    streamed = IterableDataset.from_generator(generate, features=FEATURES)
    for rows in (by_builder, by_generator, list(streamed)):
        assert np.array_equal(values(rows[0]["image"]), values(image)[1:3])
        assert np.array_equal(values(rows[1]["image"]), values(image))
        assert rows[2]["image"] is None
    for ds in (by_builder, by_generator):
        assert cells(ds)[1] == {"bytes": None, "path": str(Path("a.nii.gz").absolute())}


# 17: images that nibabel and nilearn cannot work with


def decoded_images(shape):
    name = f"{len(shape)}d.nii.gz"
    make_image(shape=shape, dtype=np.float32).to_filename(name)
    return decode(Path(name).read_bytes()), decode(None, name), nib.load(name)


@defect(17, since="4.5")
def nibabel_works_on_decoded_images():
    *images, reference = decoded_images((6, 5, 4, 3))
    for image in images:
        assert type(image) is nib.Nifti1Image
        sliced = image.slicer[1:4, ..., 1:]
        assert np.array_equal(values(sliced), values(reference)[1:4, ..., 1:])
        assert np.array_equal(sliced.affine, reference.slicer[1:4, ..., 1:].affine)
        flipped = nib.Nifti1Image(image.dataobj, np.diag([-2.0, 2, 3, 1]), image.header)
        assert np.array_equal(values(nib.as_closest_canonical(flipped)), values(reference)[::-1])
        assert nib.concat_images([image, image], axis=3).shape == (6, 5, 4, 6)
        assert len(nib.four_to_three(image)) == 3


@defect(17, since="4.5")
def nilearn_works_on_decoded_images():
    pytest.importorskip("nilearn")
    from nibabel.processing import conform
    from nilearn.image import index_img, mean_img, new_img_like, resample_img, smooth_img

    *images, reference = decoded_images((6, 5, 4, 3))
    *volumes, _ = decoded_images((6, 5, 4))
    for image, volume in zip(images, volumes):
        for function in (
            lambda i: index_img(i, 1),
            lambda i: mean_img(i, copy_header=True),
            lambda i: smooth_img(i, 4),
            lambda i: resample_img(i, np.diag([3.0, 3, 3]), copy_header=True, force_resample=True),
            lambda i: new_img_like(i, values(i) + 1),
        ):
            assert np.allclose(function(image).get_fdata(), function(reference).get_fdata())
        assert conform(volume, (8, 8, 8)).shape == (8, 8, 8)


# 18: formats


@defect(18)
def numpy_format_gives_arrays():
    bytes_ = stored(make_image(slope=0.5))
    image = decode(bytes_)
    ds = Dataset.from_dict({"image": [bytes_] * 2, "id": [0, 1]}, features=FEATURES).with_format("numpy")
    assert ds[0]["image"].shape == (4, 5, 6) and np.allclose(ds[0]["image"], values(image))
    assert ds[:2]["image"].shape == (2, 4, 5, 6)
    assert next(iter(ds.to_iterable_dataset().with_format("numpy")))["image"].shape == (4, 5, 6)
    labels = Dataset.from_dict({"image": [stored(make_image())], "id": [0]}, features=FEATURES).with_format("numpy")
    assert labels[0]["image"].dtype == np.int64  # as any other array in this format
    assert labels.with_format("numpy", dtype=np.int16)[0]["image"].dtype == np.int16


@defect(18)
def torch_format_gives_tensors():
    torch = pytest.importorskip("torch")
    for image in (make_image(), make_image(dtype=np.uint16), make_image(dtype=">i2"), make_image(slope=0.5)):
        bytes_ = stored(image)
        image = decode(bytes_)
        ds = Dataset.from_dict({"image": [bytes_, None], "id": [0, 1]}, features=FEATURES).with_format("torch")
        assert isinstance(ds[0]["image"], torch.Tensor)
        assert np.allclose(ds[0]["image"].numpy(), values(image).astype(np.float64))
        assert ds[1]["image"] is None
        assert next(iter(torch.utils.data.DataLoader(ds.select([0]))))["image"].shape == (1, 4, 5, 6)


@defect(18)
def jax_format_gives_arrays():
    pytest.importorskip("jax")
    bytes_ = stored(make_image(slope=0.5))
    image = decode(bytes_)
    ds = Dataset.from_dict({"image": [bytes_], "id": [0]}, features=FEATURES).with_format("jax")
    assert np.allclose(np.asarray(ds[0]["image"]), values(image))


@defect(18)
def polars_format_gives_images():
    pytest.importorskip("polars")
    image = make_image()
    ds = Dataset.from_dict({"image": [stored(image), None], "id": [0, 1]}, features=FEATURES).with_format("polars")
    assert np.array_equal(values(ds[0]["image"][0]), values(image))
    assert np.array_equal(values(ds["image"][0]), values(image))
    assert ds[:2]["image"][1] is None
    assert ds[:2]["id"].to_list() == [0, 1]


@defect(18)
def rgb_voxels_become_a_last_axis():
    data = np.arange(24, dtype=np.uint8).view(nifti_strategies.RGB).reshape(2, 2, 2)
    ds = Dataset.from_dict({"image": [stored(nib.Nifti1Image(data, np.eye(4)))], "id": [0]}, features=FEATURES)
    assert ds.with_format("numpy")[0]["image"].shape == (2, 2, 2, 3)


# 19: names that say nothing


@defect(19)
def the_content_tells_the_format():
    image = make_image()
    for name, compress in {
        "0f3a9d": gzip.compress,
        "1f3a9d": bytes,
        "plain.nii.gz": bytes,
        "gzipped.nii": gzip.compress,
        "gzipped.nii.bz2": gzip.compress,
    }.items():
        Path(name).write_bytes(stored(image, compress))
        decoded = decode(None, name)
        assert np.array_equal(values(decoded), values(image))
        assert encode(decoded) == {"path": str(Path(name).absolute()), "bytes": None}


# 20, 21: datasets that are passed through


def two_kinds_of_rows():
    """CT values with scale factors, once as a path and once as bytes, and what has to come out."""
    image = make_image(slope=0.37)
    bytes_ = stored(image)
    Path("a.nii.gz").write_bytes(bytes_)
    path = str(Path("a.nii.gz").absolute())
    rows = [{"path": path, "bytes": None}, {"path": "b.nii.gz", "bytes": bytes_}]
    return Dataset.from_dict({"image": rows, "id": [0, 1]}, features=FEATURES), rows, bytes_


@defect(20)
def streaming_stores_the_very_bytes():
    ds, _, bytes_ = two_kinds_of_rows()
    streamed = ds.to_iterable_dataset().map(lambda x: {"id": x["id"] + 1, "image": x["image"]}, features=FEATURES)
    streamed.to_parquet("out.parquet")
    assert [x["bytes"] for x in pq.read_table("out.parquet")["image"].to_pylist()] == [bytes_, bytes_]
    assert [x["path"] for x in pq.read_table("out.parquet")["image"].to_pylist()] == ["a.nii.gz", "b.nii.gz"]


@defect(20)
def streams_of_images_without_features_are_typed():
    from datasets.iterable_dataset import _infer_features_from_batch

    image = make_image()
    streamed = IterableDataset.from_generator(lambda: iter([{"image": image, "images": [image], "id": 1}]))
    features = _infer_features_from_batch(streamed._head())
    assert features == Features({"image": Nifti(), "images": List(Nifti()), "id": Value("int64")})
    if hasattr(streamed, "_resolve_features"):
        assert streamed._resolve_features().features == features


@defect(21)
def map_keeps_what_was_not_modified():
    ds, rows, _ = two_kinds_of_rows()

    def touch(example):
        example["image"].header.get_zooms(), example["image"].get_fdata()
        return {**example, "id": example["id"] + 1}

    for mapped in (
        ds.map(touch),
        ds.map(lambda batch: {"image": batch["image"], "id": batch["id"]}, batched=True),
        ds.map(lambda x: {"id": x["image"], "image": x["id"]}).rename_columns({"id": "image", "image": "id"}),
    ):
        assert mapped.features["image"] == Nifti()
        assert cells(mapped) == rows


@defect(21)
def map_keeps_what_was_not_modified_in_nested_columns():
    _, rows, _ = two_kinds_of_rows()
    features = Features({"session": {"images": List(Nifti()), "pair": List({"image": Nifti()})}})
    session = {"images": [rows[0], None, rows[1]], "pair": [{"image": rows[1]}, {"image": rows[0]}]}
    ds = Dataset.from_list([{"session": None}, {"session": session}], features=features)
    mapped = ds.map(lambda x: {"session": x["session"]})
    assert mapped.features == features
    assert cells(mapped, "session") == [None, session]


@defect(21)
def a_copy_a_pickle_and_the_cache_are_no_modification():
    _, rows, bytes_ = two_kinds_of_rows()
    for row in rows:
        image = Nifti().decode_example(row)
        image.get_fdata()[:] = 7  # nibabel does not write the cache either
        for same in (
            image,
            copy.copy(image),
            copy.deepcopy(image),
            pickle.loads(pickle.dumps(image)),
            nib.Nifti1Image(image.dataobj, image.affine, image.header),
        ):
            assert encode(same) == row
        image.to_filename("elsewhere.nii")
        assert encode(image) == row


@defect(21)
def an_edited_header_does_not_change_a_voxel():
    _, rows, bytes_ = two_kinds_of_rows()
    for row in rows:
        image = Nifti().decode_example(row)
        image.header["descrip"] = b"edited"
        image.affine[0, 3] = 5
        again = decode(**encode_as_kwargs(image))
        assert again.header["descrip"] == b"edited" and again.affine[0, 3] == 5
        assert np.array_equal(again.dataobj.get_unscaled(), decode(bytes_).dataobj.get_unscaled())
        assert np.array_equal(values(again), values(decode(bytes_)))


# 23: bytes that are given


@defect(23)
def bytes_win_over_a_file_of_that_name():
    make_image(seed=1).to_filename("T1w.nii.gz")
    given_ = {"path": "T1w.nii.gz", "bytes": stored(make_image(seed=2))}
    assert encode(given_) == given_
    given_["path"] = str(Path("T1w.nii.gz").absolute())
    assert encode(given_) == given_


# 24: bytes that are no image


NO_IMAGES = {
    "git annex get": b"/annex/objects/MD5E-s4--abc.nii.gz\n",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "empty": b"",
    "dcm2niix": b"\0" * 128 + b"DICM" + b"\0" * 600,
    "starts with b'something": b"something else",
    "hdr/.img": nib.nifti1.Nifti1PairHeader().binaryblock,
}


@defect(24)
def what_is_no_image_is_named():
    for expected, bytes_ in NO_IMAGES.items():
        Path("sub-01_T1w.nii").write_bytes(bytes_)
        for value in ({"path": "sub-01_T1w.nii", "bytes": bytes_}, {"path": "sub-01_T1w.nii", "bytes": None}):
            if value["bytes"] is None and expected == "hdr/.img":
                continue  # nibabel takes such a header for that of an image in one file
            with pytest.raises(ValueError, match="sub-01_T1w.nii") as e:
                Nifti().decode_example(value)
            assert expected in str(e.value)


@defect(24)
def truncated_files_are_named():
    plain, gz = stored(make_image(shape=(40, 40, 40)), bytes), stored(make_image(shape=(40, 40, 40)))
    Path("cut.nii").write_bytes(plain[:-1])
    Path("header.nii").write_bytes(plain[:352])
    damaged = bytearray(gz)
    damaged[-8] ^= 1  # the checksum
    for bytes_, path in (
        (gz[:-1], "cut.nii.gz"),
        (gz[: len(gz) // 2], "cut.nii.gz"),
        (bytes(damaged), "cut.nii.gz"),
        (gzip.compress(plain[:-1]), "cut.nii.gz"),
        (plain[:-1], "cut.nii"),
        (None, "cut.nii"),
        (plain[:352], "header.nii"),
        (None, "header.nii"),
    ):
        image = decode(bytes_, path)
        assert image.shape == (40, 40, 40)
        for read in (lambda: image.get_fdata(), lambda: image.dataobj[..., -1], lambda: image.dataobj[..., ::39]):
            with pytest.raises(OSError, match=path):
                read()
        if path != "header.nii":
            image.dataobj[..., 0]  # what lies before the damage can still be read
        assert encode(image) == {"path": path if bytes_ else str(Path(path).absolute()), "bytes": bytes_}


@defect(24)
def bytes_behind_the_image_are_ignored():
    image = make_image()
    for trailing in (b"trailing", b"\0" * 512, gzip.compress(b"another member")):
        assert np.array_equal(values(decode(stored(image) + trailing)), values(image))


@defect(24)
def a_damaged_header_is_named():
    damaged = bytearray(stored(make_image(), bytes))
    damaged[70:72] = b"\xff\x7f"  # datatype
    Path("damaged.nii").write_bytes(damaged)
    for bytes_ in (None, bytes(damaged), gzip.compress(bytes(damaged))):
        with pytest.raises(ValueError, match="damaged.nii.*header cannot be read"):
            decode(bytes_, "damaged.nii")


@defect(24)
def a_broken_link_is_named():
    Path("sub-01_T1w.nii.gz").symlink_to(".git/annex/objects/x")
    with pytest.raises(FileNotFoundError, match="sub-01_T1w.nii.gz.*git annex get"):
        decode(None)


@defect(24)
def file_urls_and_archives_are_read():
    image = make_image(nib.Nifti2Image)
    image.to_filename("a.nii.gz")
    with zipfile.ZipFile("a.zip", "w") as z:
        z.write("a.nii.gz")
    for path in (f"file://{Path('a.nii.gz').absolute()}", f"zip://a.nii.gz::{Path('a.zip').absolute()}"):
        assert np.array_equal(values(decode(None, path)), values(image))


# 28: types of new columns


@defect(28)
def new_columns_are_typed():
    image = make_image()
    ds = Dataset.from_dict({"image": [None, image], "images": [[image, image], []]})
    assert ds.features == Features({"image": Nifti(), "images": List(Nifti())})
    ds = Dataset.from_dict({"id": [0]}).map(lambda x: {"image": image, "images": [image]})
    assert ds.features == Features({"id": Value("int64"), "image": Nifti(), "images": List(Nifti())})
    assert np.array_equal(values(ds[0]["images"][0]), values(image))


@defect(28)
def items_with_images_can_be_added():
    image = make_image()
    image.to_filename("a.nii.gz")
    ds = Dataset.from_dict({"image": [stored(image)], "id": [0]}, features=FEATURES).with_format(
        "numpy", columns=["id"]
    )
    for value in (image, "a.nii.gz", Path("a.nii.gz"), {"path": None, "bytes": stored(image)}):
        more = ds.select([0, 0]).add_item({"image": value, "id": 1})
        assert more.format["type"] == "numpy" and more.features == FEATURES
        more = more.with_format(None)
        assert more[:]["id"] == [0, 0, 1]
        assert np.array_equal(values(more[2]["image"]), values(image))
    assert ds.add_item({"image": None, "id": 1}).with_format(None)[1] == {"image": None, "id": 1}
    assert Dataset.from_dict({"id": [0]}).add_item({"id": 1, "new": image}).features["new"] == Nifti()


@defect(28)
def columns_of_images_can_be_added():
    image = make_image()
    image.to_filename("a.nii.gz")
    ds = Dataset.from_dict({"id": [0, 1]})
    for column in ([image, image], ["a.nii.gz", image], [stored(image), Path("a.nii.gz")]):
        more = ds.add_column("image", column, feature=Nifti())
        assert more.features["image"] == Nifti()
        assert all(np.array_equal(values(i), values(image)) for i in more["image"])
    assert ds.add_column("image", [image, None]).features["image"] == Nifti()


@defect(28)
def datasets_that_differ_in_decode_can_be_concatenated():
    one = Dataset.from_dict({"image": [stored(make_image())], "id": [0]}, features=FEATURES)
    two = one.cast_column("image", Nifti(decode=False))
    assert datasets.concatenate_datasets([one, two])[1]["image"].shape == (4, 5, 6)
    assert (
        datasets.concatenate_datasets([two, one])[1]["image"]["bytes"]
        == one.with_format("arrow")[0]["image"][0].as_py()["bytes"]
    )
    assert (one.features["image"].decode, two.features["image"].decode) == (True, False)
    streamed = datasets.concatenate_datasets([one.to_iterable_dataset(), two.to_iterable_dataset()])
    assert len(list(streamed)) == 2
    with pytest.raises(ValueError):
        datasets.concatenate_datasets([one, Dataset.from_dict({"image": [1]})])


@defect(28)
def streams_may_begin_without_an_image():
    image = make_image()
    rows = [{"image": None, "id": 0}, {"image": image, "id": 1}]
    streamed = IterableDataset.from_generator(lambda: iter(rows), features=FEATURES)
    streamed.to_parquet("out.parquet")
    assert pq.read_table("out.parquet")["image"].to_pylist()[0] is None
    assert pq.read_table("out.parquet")["image"].to_pylist()[1]["bytes"] == image.to_bytes()


@defect(28)
def cifti_and_mgh_images_can_be_stored():
    mgh = nib.MGHImage(np.ones((2, 3, 4), np.float32), np.diag([2.0, 2, 2, 1]))
    for image in (make_cifti(), mgh, nib.AnalyzeImage(np.ones((2, 3, 4), np.int16), np.diag([2.0, 2, 2, 1]))):
        for ds in (
            Dataset.from_dict({"image": [image]}),
            Dataset.from_dict({"image": [image]}, features=Features({"image": Nifti()})),
            Dataset.from_generator(lambda i=image: iter([{"image": i}]), cache_dir=f"cache-{type(image).__name__}"),
        ):
            assert np.array_equal(values(ds[0]["image"]), values(image))
            if hasattr(image, "affine"):
                assert np.allclose(ds[0]["image"].affine, image.affine)


@pytest.mark.parametrize("check, present", DEFECTS)
def test_mended(check, present):
    check()


@pytest.mark.parametrize("check, present", DEFECTS)
def test_stock_has_the_defect(check, present, capfd):
    if not present:
        pytest.skip(f"datasets {RELEASE} does not have it")
    with stock(), pytest.raises((Exception, pytest.fail.Exception)) as e:
        check()
    if e.errisinstance(pytest.skip.Exception):
        raise e.value


# Properties


def encoded_images_decode_to_the_same(image):
    decoded = decode(**encode_as_kwargs(image))
    written = type(image).from_bytes(copy.copy(image).to_bytes())
    assert type(decoded) is type(image)
    assert nifti._written_headers(decoded) == nifti._written_headers(written)
    assert np.array_equal(decoded.affine, written.affine)
    assert values(decoded).dtype == values(written).dtype
    assert np.array_equal(values(decoded), values(written))
    assert encode(decoded)["bytes"] == copy.copy(image).to_bytes()


def lazy_images_are_what_nibabel_reads(file, data):
    name, bytes_, inflated = file
    image = decode(bytes_, name)
    reference = type(image).from_bytes(inflated)
    order = data.draw(st.lists(nifti_strategies.slicers(reference.shape), min_size=1, max_size=6))
    for index in order:
        assert np.array_equal(image.dataobj[index], reference.dataobj[index])
    for same in (image, copy.copy(image), copy.deepcopy(image), pickle.loads(pickle.dumps(image))):
        assert np.array_equal(values(same), values(reference))
        assert nifti._written_headers(same) == nifti._written_headers(reference)
        assert encode(same) == {"path": name, "bytes": bytes_}
    assert np.array_equal(values(image), values(reference))


@settings(deadline=None)
@given(nifti_strategies.images())
def test_encoded_images_decode_to_the_same(image):
    encoded_images_decode_to_the_same(image)


@settings(deadline=None)
@given(nifti_strategies.files(), st.data())
def test_lazy_images_are_what_nibabel_reads(file, data):
    lazy_images_are_what_nibabel_reads(file, data)


@pytest.mark.deep
@settings(deadline=None, max_examples=4000)
@given(nifti_strategies.images())
def test_encoded_images_decode_to_the_same_deep(image):
    encoded_images_decode_to_the_same(image)


@pytest.mark.deep
@settings(deadline=None, max_examples=4000)
@given(nifti_strategies.files(), st.data())
def test_lazy_images_are_what_nibabel_reads_deep(file, data):
    lazy_images_are_what_nibabel_reads(file, data)


@given(st.lists(st.none() | nifti_strategies.files(), min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=20)
def test_datasets_pass_images_through(rows, batched):
    rows = [{"image": row and {"path": row[0], "bytes": row[1]}, "id": i} for i, row in enumerate(rows)]
    ds = Dataset.from_list(rows, features=FEATURES)
    mapped = ds.map(lambda x: dict(x), batched=batched)
    assert mapped.features == FEATURES
    assert cells(mapped) == cells(ds)
    buffer = io.BytesIO()
    mapped.to_parquet(buffer)
    assert pq.read_table(pa.BufferReader(buffer.getvalue()))["image"].to_pylist() == cells(ds)


def test_threads_share_an_image():
    image = make_image(shape=(32, 32, 16, 8), slope=0.37)
    expected = values(decode(stored(image)))
    shared = decode(stored(image))
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(25):
            z, t = rng.integers(16), rng.integers(8)
            if not np.array_equal(shared.dataobj[:, :, z, t], expected[:, :, z, t]):
                wrong.append((seed, z, t))
        if not np.array_equal(shared.dataobj.copy()[..., -1], expected[..., -1]):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pairs_and_other_formats_still_load_from_paths():
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for image_class, name in ((nib.Nifti1Pair, "a.img"), (nib.AnalyzeImage, "b.img"), (nib.MGHImage, "c.mgz")):
        image_class(data, np.eye(4)).to_filename(name)
        image = decode(None, name)
        assert isinstance(image, image_class) and np.array_equal(values(image), data)
        assert encode(image) == {"path": str(Path(name).absolute()), "bytes": None}
        # where bytes have to be, an image that takes two files becomes one that takes one
        forced = nifti.encode_nibabel_image(image, force_bytes=True)
        if name != "c.mgz":
            assert np.array_equal(values(decode(forced["bytes"], None)), data)


def test_pandas_frames_cast(tmp_path):
    make_image().to_filename("a.nii.gz")
    frame = pd.DataFrame({"image": [str(tmp_path / "a.nii.gz"), None], "id": [1, 2]})
    ds = Dataset.from_pandas(frame).cast(FEATURES)
    assert ds[0]["image"].shape == (4, 5, 6) and ds[1]["image"] is None
    nested = pa.table({"images": pa.array([["a.nii.gz"], None, ["a.nii.gz"] * 2], pa.list_(pa.large_string()))})
    ds = Dataset(nested).select([1, 2]).cast(Features({"images": List(Nifti())}))
    assert ds[0]["images"] is None and [i.shape for i in ds[1]["images"]] == [(4, 5, 6)] * 2


def test_null_and_chunked_storage_cast():
    assert Nifti().cast_storage(pa.nulls(2)).to_pylist() == [None, None]
    chunked = pa.chunked_array([pa.array(["a"], pa.large_string()), pa.array([], pa.large_string())])
    ds = Dataset(pa.table({"image": chunked})).cast(Features({"image": Nifti()}))
    assert cells(ds) == [{"bytes": None, "path": "a"}]


def test_a_notebook_shows_decoded_images_only(monkeypatch):
    pytest.importorskip("IPython")
    pytest.importorskip("ipyniivue")
    from IPython.testing.globalipapp import start_ipython

    shell = start_ipython()
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    formatter = shell.display_formatter.formatters["text/html"]
    monkeypatch.setattr(formatter, "enabled", True)  # as in a notebook
    image = decode(stored(make_image()))
    formatter(make_image())
    assert not shown
    formatter(image)
    assert [type(v).__name__ for v in shown] == ["NiiVue"]


def test_stock_is_still_the_class():
    assert Nifti is datasets.features.features._FEATURE_TYPES["Nifti"]
    assert pickle.loads(pickle.dumps(Nifti())) == Nifti()
    assert Features.from_dict(FEATURES.to_dict()) == FEATURES
