"""Hypothesis strategies for NIfTI files: small in size, wide in kind."""

import bz2
import gzip
import io

import nibabel as nib
import numpy as np
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Extension


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
NUMBERS = [np.dtype(t) for t in ("u1", "i1", "u2", "i2", "i4", "i8", "f4", "f8")]
OTHERS = [np.dtype("c8"), np.dtype("c16"), RGB]


def has_zstd() -> bool:
    try:
        zstd_open(io.BytesIO(), "wb").close()
    except Exception:
        return False
    return True


def zstd_open(f, mode):
    from nibabel.openers import ImageOpener

    return ImageOpener.compress_ext_map[".zst"][0](f, mode)


def compress(data: bytes, extension: str) -> bytes:
    if extension == ".gz":
        return gzip.compress(data, 1)
    if extension == ".bz2":
        return bz2.compress(data)
    if extension == ".zst":
        f = io.BytesIO()
        with zstd_open(f, "wb") as z:
            z.write(data)
        return f.getvalue()
    return data


EXTENSIONS = ["", ".gz", ".bz2"] + ([".zst"] if has_zstd() else [])


@st.composite
def shapes(draw):
    return tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=5)))


@st.composite
def images(draw):
    """An in-memory image as a user makes it: stored values, scale factors, byte order, extensions."""
    image_class = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    dtype = draw(st.sampled_from(NUMBERS + OTHERS))
    shape = draw(shapes())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape, order="F")
    if dtype.kind in "fc":
        # random bytes make signalling NaNs, which do not survive every copy
        data = rng.integers(-1000, 1000, shape).astype(dtype) / dtype.type(8)
    header = image_class.header_class(endianness=draw(st.sampled_from("<>")))
    header.set_data_dtype(dtype)
    header["descrip"] = draw(st.binary(max_size=20).map(lambda b: b.replace(b"\0", b"")))
    for comment in draw(st.lists(st.text("abc ", min_size=1, max_size=40), max_size=2)):
        header.extensions.append(Nifti1Extension("comment", comment.encode()))
    affine = np.diag([*draw(st.tuples(*[st.sampled_from([-2.0, 0.5, 1.0, 3.0])] * 3)), 1.0])
    image = image_class(data, affine, header)
    if dtype in NUMBERS and draw(st.booleans()):
        slope, inter = draw(st.tuples(st.sampled_from([0.37, 2.0, 1e-3]), st.sampled_from([0.0, -3.1, 1024.0])))
        image.header.set_slope_inter(slope, inter)
    return image


@st.composite
def files(draw):
    """`(name, stored bytes, inflated bytes)` of a NIfTI file; several gzip members and bytes behind them occur."""
    inflated = draw(images()).to_bytes()
    extension = draw(st.sampled_from(EXTENSIONS))
    if extension == ".gz" and draw(st.booleans()):
        cut = draw(st.integers(0, len(inflated)))
        stored = gzip.compress(inflated[:cut], 1) + gzip.compress(inflated[cut:], 1)
    else:
        stored = compress(inflated, extension)
    if extension == ".gz":
        stored += draw(st.sampled_from([b"", b"", b"\0" * 512, b"trailing"]))
    # the name says nothing, or the wrong thing
    name = draw(st.sampled_from(["image.nii" + extension, "image.nii.gz", "image.nii", "0f3a9d", None]))
    return name, stored, inflated


@st.composite
def slicers(draw, shape):
    """A basic index of an array of `shape`, with a result (nibabel cannot read a slice of nothing)."""
    index = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        index.append(draw(st.one_of(st.integers(-n, n - 1), st.slices(n).filter(lambda s, n=n: range(n)[s]))))
    return tuple(index)
