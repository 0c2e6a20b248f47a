"""Pictures of images: where right and left are, in every orientation, and what is drawn of odd ones."""

import gzip
import io
import itertools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets_bids import montage
from datasets_bids.montage import CannotDraw, Mask, Slices, Volume, Window, draw, is_hounsfield

from .phantom import Head


AXCODES = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]
MARK = np.array([30.0, 40.0, 25.0])  # mm: right, front, top


def affine_of(axcodes: str, shape, sizes, angle: float = 0.0) -> np.ndarray:
    """Of a field of view that is centred at the origin, turned by `angle` about two axes."""
    rotation = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(axcodes)):
        rotation[int(world), axis] = sign * sizes[axis]
    c, s = np.cos(angle), np.sin(angle)
    tilt = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ rotation
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def head(affine: np.ndarray, shape) -> np.ndarray:
    """A ball (value 60) with a bright mark (250) at MARK and nowhere else, in world coordinates."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    data = np.where(np.linalg.norm(points, axis=-1) < 85, 60, 0)
    data[np.linalg.norm(points - MARK, axis=-1) < 12] = 250
    return data


def opened(picture: bytes) -> Image.Image:
    assert len(picture) < 300_000
    image = Image.open(io.BytesIO(picture))
    assert image.format == "JPEG"
    return image


def panels(picture: bytes) -> list[np.ndarray]:
    """The three panels of a picture of a cube, without the margin where marks like L and R stand."""
    array = np.asarray(opened(picture).convert("L"), float)[:240]
    assert array.shape == (240, 3 * 240 + 12)
    return [array[:, x + 24 : x + 216] for x in (0, 246, 492)]


def centre_of(panel: np.ndarray, at_least: float = 180) -> tuple[float, float]:
    """(across, down) of what is bright, from -1 to 1."""
    down, across = np.nonzero(panel > at_least)
    assert len(down) > 20
    return across.mean() / panel.shape[1] * 2 - 1, down.mean() / panel.shape[0] * 2 - 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axcodes=st.sampled_from(AXCODES),
    voxels=st.tuples(*[st.sampled_from([25, 40, 50])] * 3),
    angle=st.floats(-0.35, 0.35),
    dtype=st.sampled_from(["uint8", "<i2", ">i2", "float32", ">f8"]),
    stored=st.sampled_from(["array", ".nii", ".nii.gz", ".nii.bz2"]),
    scaled=st.booleans(),
)
def test_right_is_on_the_left_in_every_orientation(tmp_path, axcodes, voxels, angle, dtype, stored, scaled):
    """Axial and coronal: the patient's right on the left; axial: front up; sagittal: front on the left; else top up."""
    affine = affine_of(axcodes, voxels, [200 / n for n in voxels], angle)
    image = nib.Nifti1Image(head(affine, voxels).astype(dtype), affine)
    if stored != "array":
        if scaled:
            image.header.set_slope_inter(2, -7)
        nib.save(image, tmp_path / f"image{stored}")
        image = nib.load(tmp_path / f"image{stored}")
    axial, coronal, sagittal = panels(draw(image, centre=MARK))
    # The slices are the image's own: a tilted image shows the mark where it lies along its own axes.
    volume = Volume.of(image)
    axes, along = volume.orientation
    voxel = (np.linalg.inv(affine) @ [*MARK, 1])[:3]
    right, front, top = (
        (voxel[axis] / (voxels[axis] - 1) * 2 - 1) * (1 if forward else -1) for axis, forward in zip(axes, along)
    )
    for panel, (across, up) in ((axial, (right, front)), (coronal, (right, top)), (sagittal, (front, top))):
        found = centre_of(panel)
        assert found[0] == pytest.approx(-across * 240 / 192, abs=0.1)
        assert found[1] == pytest.approx(-up, abs=0.1)
        if abs(angle) < 0.05:
            assert found[0] < -0.1 and found[1] < -0.1


def test_a_lesion_is_drawn_where_it_is_on_another_grid():
    """The mask is in another resolution, another orientation, and tilted."""
    affine, shape = affine_of("RAS", (100,) * 3, [2] * 3), (100, 100, 100)
    image = nib.Nifti1Image((head(affine, shape) > 0).astype(np.uint8) * 60, affine)
    other = affine_of("LSA", (60, 50, 70), [3, 4, 2.5], 0.3)
    mask = Mask(nib.Nifti1Image((head(other, (60, 50, 70)) == 250).astype(np.uint8), other))
    assert mask.ml == pytest.approx(4 / 3 * np.pi * 1.2**3, rel=0.1)
    assert np.linalg.norm(mask.centre - MARK) < 5
    picture = np.asarray(opened(draw(image, mask=mask)), float)[:240]
    red = (picture[..., 0] - picture[..., 1]) > 60
    for x, (across, down) in zip((0, 246, 492), ((30, 40), (30, 25), (40, 25))):
        rows, columns = np.nonzero(red[:, x : x + 240])
        assert columns.mean() == pytest.approx(120 - across * 1.2, abs=4)
        assert rows.mean() == pytest.approx(120 - down * 1.2, abs=4)


def test_slices_go_through_the_plane_where_the_mask_is_largest():
    data = np.zeros((20, 20, 20), np.uint8)
    data[3:6, 10:16, 2:9] = 1
    data[3:6, 10:18, 4] = 1
    mask = Mask(nib.Nifti1Image(data, np.eye(4)))
    assert mask.centre[2] == 4 and mask.centre[0] in (3, 4, 5)
    assert Mask(nib.Nifti1Image(data * 0, np.eye(4))).centre is None


@pytest.mark.parametrize(
    "values, hounsfield",
    [
        (np.repeat([-1000, 30, 1000], [500, 400, 100]), True),
        (np.repeat([-3024, -1000, 35], [300, 300, 400]), True),
        (np.repeat([0, 30, 80], [500, 400, 100]), False),  # CT of a stripped brain
        (np.linspace(-4096, 4095, 1000), False),  # phase
        (np.random.default_rng(0).normal(0, 300, 1000), False),  # a field map
        (np.array([]), False),
    ],
)
def test_hounsfield_units_are_told(values, hounsfield):
    assert is_hounsfield(values) is hounsfield


def test_windows():
    rng = np.random.default_rng(0)
    brain = np.concatenate([np.zeros(50_000), rng.normal(500, 50, 50_000), [1e6] * 20])
    window = Window.of(brain)
    assert -100 < window.low < 400 and 600 < window.high < 1000, "a few hot voxels do not make the rest black"
    assert str(Window.of(np.repeat([-1000.0, 30, 1000], [500, 400, 100]))) == "0 … 80 HU"
    lesion = np.repeat([0.0, 220, 700], [50_000, 49_900, 100])
    assert Window.of(lesion).high == 700, "a small infarct is not cut off"


def image_of(array, **kwargs):
    return nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]), **kwargs)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
ODD = {
    "2-D": np.add.outer(np.arange(20), np.arange(30)).astype(np.int16),
    "one plane": np.add.outer(np.arange(20), np.arange(30)).astype(np.int16)[:, None, :],
    "4-D": np.random.default_rng(0).normal(size=(10, 11, 12, 5)).astype(np.float32),
    "5-D": np.random.default_rng(0).normal(size=(10, 11, 12, 1, 3)).astype(np.float32),
    "NaN": np.where(np.arange(1000).reshape(10, 10, 10) % 3, np.nan, np.arange(1000).reshape(10, 10, 10)),
    "infinite": np.where(np.arange(1000).reshape(10, 10, 10) % 3, np.inf, np.arange(1000).reshape(10, 10, 10)),
    "huge": np.arange(1000.0).reshape(10, 10, 10) * 1e200,
    "colour": np.zeros((10, 11, 12), RGB),
    "complex": (np.arange(1000).reshape(10, 10, 10) * 1j).astype(np.complex64),
    "thin": np.arange(2 * 200 * 200).reshape(2, 200, 200).astype(np.int32),
    "two voxels": np.array([[[1, 2], [3, 4]]], np.uint8),
}
ODD["colour"]["R"] = 200


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("options", [{}, {"labels": True}, {"face": True}], ids=["plain", "labels", "face"])
def test_odd_images_are_drawn(name, options, tmp_path):
    for image in (image_of(ODD[name]), nib.Nifti1Image.from_bytes(image_of(ODD[name]).to_bytes())):
        Slices(image)  # does not fall back on a placeholder
        picture = opened(draw(image, **options))
        assert np.asarray(picture).std() > 0
    assert (picture.mode == "RGB") == (name == "colour" or "labels" in options)
    nib.save(image_of(ODD[name]), tmp_path / "image.nii.gz")
    assert draw(nib.load(tmp_path / "image.nii.gz"), **options) == draw(nib.load(tmp_path / "image.nii.gz"), **options)


def reason(image) -> str:
    """Why a placeholder is drawn."""
    said = []
    original = montage.placeholder
    try:
        montage.placeholder = lambda e: said.append(e) or original(e)
        opened(draw(image))
    finally:
        montage.placeholder = original
    return str(said[0])


@pytest.mark.parametrize(
    "image, words",
    [
        (image_of(np.zeros((5, 6, 7), np.int16)), "all voxels are 0"),
        (image_of(np.full((5, 6, 7), 3.5, np.float32)), "all voxels are 3.5"),
        (image_of(np.full((5, 6, 7), np.nan, np.float32)), "no voxel is a number"),
        (image_of(np.zeros((5, 6, 7), RGB)), "all voxels are black"),
        (image_of(np.ones((1, 1, 1, 512), np.complex64)), "no plane of voxels (shape 1x1x1x512)"),
        (image_of(np.ones((9,), np.int16)), "no plane of voxels"),
        (image_of(np.ones((4, 0, 4), np.int16)), "no voxels"),
    ],
)
def test_where_there_is_nothing_to_draw_it_says_so(image, words):
    assert words in reason(image)


def test_cifti_is_no_volume():
    axes = nib.cifti2.ScalarAxis(["a"]), nib.cifti2.BrainModelAxis.from_mask(np.ones(30, bool), name="CortexLeft")
    assert "surfaces and grayordinates" in reason(nib.Cifti2Image(np.ones((1, 30)), axes))


def test_a_file_that_ends_early_says_so(tmp_path):
    path = tmp_path / "image.nii.gz"
    data = image_of(np.random.default_rng(0).normal(size=(20, 20, 20))).to_bytes()
    path.write_bytes(gzip.compress(data)[:30_000])
    assert "cut off in plane" in reason(nib.load(path))
    (tmp_path / "plain.nii").write_bytes(data[:30_000])
    assert "cut off" in reason(nib.load(tmp_path / "plain.nii"))


def test_of_a_series_nothing_behind_the_middle_volume_is_read(tmp_path):
    data = np.random.default_rng(0).normal(size=(64, 64, 64, 9)).astype(np.float32)
    data[..., 4] = head(affine_of("RAS", (64,) * 3, [3] * 3), (64,) * 3)
    whole = image_of(data).to_bytes()
    (tmp_path / "image.nii").write_bytes(whole[: 352 + 5 * 2**20])
    picture = draw(nib.load(tmp_path / "image.nii"))
    assert picture == draw(image_of(data))
    (tmp_path / "image.nii.gz").write_bytes(gzip.compress(whole, 1)[: len(gzip.compress(whole[: 7 * 2**20], 1))])
    assert picture == draw(nib.load(tmp_path / "image.nii.gz"))


def test_sides_that_a_header_does_not_tell_are_marked(tmp_path):
    """Both codes are 0: nibabel's affine is a guess."""
    data = head(affine_of("LAS", (50,) * 3, [4] * 3), (50,) * 3).astype(np.uint8)
    header = nib.Nifti1Header()
    header.set_data_shape(data.shape)
    header.set_zooms((4, 4, 4))
    header["vox_offset"] = 352
    (tmp_path / "image.nii").write_bytes(header.binaryblock + bytes(4) + data.astype(np.float32).tobytes(order="F"))
    unknown = nib.load(tmp_path / "image.nii")
    known = nib.Nifti1Image(data, unknown.affine)
    assert Volume.of(known).sides_are_known and not Volume.of(unknown).sides_are_known
    assert np.array_equal(*(panels(draw(image, centre=MARK))[0][:100] for image in (known, unknown)))
    assert draw(known) != draw(unknown)


@pytest.mark.parametrize(
    "affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([2.0, 0, 2, 1]), np.ones((4, 4))]
)
def test_an_affine_that_says_nothing_is_no_obstacle(affine):
    image = image_of(np.arange(1000).reshape(10, 10, 10).astype(np.int16))
    image._affine = affine
    assert opened(draw(image)).width > 300
    assert np.isfinite(Mask(image).ml)


def test_a_picture_fits_into_what_it_may_take():
    noise = image_of(np.random.default_rng(0).normal(size=(200, 200, 200)).astype(np.float32))
    slices = Slices(noise)
    sizes = [len(draw(slices, max_nbytes=n)) for n in (300_000, 20_000, 2_000)]
    assert sizes[0] > 20_000 >= sizes[1] > 2_000 >= sizes[2]


def test_a_face_is_seen_from_the_front():
    """A nose in the middle, and one eye on the patient's right, which is on the left of the picture."""
    affine, shape = affine_of("LPI", (100,) * 3, [2] * 3), (100,) * 3
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    data = (np.linalg.norm(points, axis=-1) < 70) * 100
    hole = np.linalg.norm(points - [25, 65, 25], axis=-1) < 14
    seen = [
        np.asarray(opened(draw(nib.Nifti1Image(np.where(hole & cut, 0, data).astype(np.int16), affine), face=True)))
        for cut in (True, False)
    ]
    changed = np.abs(seen[0].astype(float) - seen[1])[:240, 3 * 246 :] > 40
    rows, columns = np.nonzero(changed)
    assert len(rows) > 50 and columns.mean() < 115 and rows.mean() < 115


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory from /proc")
def test_memory_is_that_of_planes_not_of_the_volume(tmp_path):
    """268 MB of voxels, and a mask of 134 MB."""
    shape = (512, 512, 512)
    path, mask = tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz"
    plane = np.asarray(Head(0).image("dwi", (512, 512, 3)).dataobj)[..., 1].astype(np.int16)
    for name, array in ((path, plane), (mask, (plane > 400).astype(np.uint8))):
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_data_dtype(array.dtype)
        header.set_sform(np.eye(4), code=1)
        header["vox_offset"] = 352
        with gzip.open(name, "wb", compresslevel=1) as file:
            file.write(header.binaryblock + bytes(4))
            for _ in range(shape[2]):
                file.write(array.tobytes(order="F"))
    code = """
import re, sys
import nibabel as nib
from datasets_bids.montage import Mask, draw
peak = lambda: int(re.search("VmHWM: *\\t *(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
assert len(draw(nib.load(sys.argv[1]), mask=Mask(nib.load(sys.argv[2])))) > 10_000
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, mask],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110_000, f"{int(done.stdout) / 1000:.0f} MB"


def test_what_cannot_be_a_mask():
    with pytest.raises(CannotDraw, match="no mask"):
        Mask(image_of(ODD["colour"]))
