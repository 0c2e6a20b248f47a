"""Pictures of brain images: an axial, a coronal and a sagittal slice side by side, as one small JPEG.

How it works:

- An image is read once and forward, one plane at a time, so that no volume is ever in memory: kept are three slices and a coarse
  grid of at most 64 x 64 x 64 voxels, which says how bright the picture has to be.
- Slices lie along the image's own axes (nothing is resampled but the pixels' size), turned by the affine as radiologists look at
  them: the patient's right is on the left.
- A mask is kept as one bit a voxel, and looked up by world coordinates (mm), so it may be on another grid than the image it is
  drawn on.
- What cannot be drawn says so in a picture of its own; drawing raises nothing about the content of a file.
"""

import bz2
import functools
import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .nifti import StoredFile


try:
    from isal.igzip import IGzipFile as _GzipFile  # inflates four times as fast as zlib
except ImportError:
    from gzip import GzipFile as _GzipFile


PANEL = 240
"""Height and width (pixels) of the square that a slice is fitted into. Three of them are what a screen shows without scrolling."""

COARSE, FACE = 64, 128
"""Voxels of the coarse grid along each axis: a quarter of a million in all are enough for a percentile, and 2 mm to know a face."""

BRAIN_WINDOW = (0.0, 80.0)
"""Hounsfield units from black to white in which grey and white matter, blood and infarcts of an unenhanced CT differ."""

READ_NBYTES = 4 * 1024**2
"""Bytes that are inflated at a time, if they hold a plane: fewer calls than one a plane, and little memory."""

SATURATED = (0.002, 0.0005)
"""Part of the voxels that may be black, and white. A small infarct is 0.1 % of a head, and the brightest of what DWI shows."""

COLOURS = ((255, 70, 60), (80, 200, 255), (255, 200, 40), (130, 230, 90), (230, 120, 255), (255, 140, 40))
"""Of labels 1, 2, ...; the first is for masks."""

_GREY = 150
_MARGIN = 6

_QUALITIES = (88, 75, 60, 40)  # of the JPEG, tried in this order until it is small enough


class CannotDraw(Exception):
    """There is nothing to draw; the message says why, in a few words."""


UNREADABLE = (CannotDraw, OSError, EOFError, ValueError, ArithmeticError, TypeError, zlib.error, ImageFileError)
"""What nibabel, numpy and the decompressors raise for a file that is not what it should be."""


@dataclass(frozen=True)
class Volume:
    """The one volume of an image that is drawn, and how it lies in the world.

    Attributes:
        image: any nibabel image; its voxels may still be in their file
        shape (`tuple[int, int, int]`): voxels along each axis
        number, count (`int`): which volume of how many (1 of 1 for a 3-D image); the middle one
    """

    image: Any
    shape: tuple[int, int, int]
    number: int
    count: int

    @classmethod
    def of(cls, image: Any) -> "Volume":
        """
        Raises:
            CannotDraw: an image without a plane of voxels: grayordinates, spectra, an empty array
        """
        if isinstance(image, nib.Cifti2Image):
            raise CannotDraw(f"CIFTI-2, {_times(image.shape)}: surfaces and grayordinates, no volume")
        shape = tuple(int(n) for n in image.shape)
        if not shape or 0 in shape:
            raise CannotDraw(f"no voxels (shape {_times(shape)})")
        extent = (*shape, 1, 1)[:3]
        if sum(n > 1 for n in extent) < 2:
            raise CannotDraw(f"no plane of voxels (shape {_times(shape)})")
        count = shape[3] if len(shape) > 3 else 1
        return cls(image, extent, count // 2 + 1, count)

    @cached_property
    def affine(self) -> np.ndarray:
        """Voxel to world (mm, RAS), 4 x 4. Axes along which the header gives no direction or size get one that is free."""
        affine = np.array(self.image.affine if self.image.affine is not None else np.eye(4), dtype=float)
        if not np.isfinite(affine).all():
            affine = np.eye(4)
        free = [axis for axis in range(3) if not affine[axis, :3].any()]
        for axis in range(3):
            if not affine[:3, axis].any():
                affine[free.pop(0) if free else axis, axis] = 1.0
        return affine if abs(np.linalg.det(affine[:3, :3])) > 1e-9 else np.diag([*self.sizes_of(affine), 1.0])

    @staticmethod
    def sizes_of(affine: np.ndarray) -> np.ndarray:
        return np.sqrt((affine[:3, :3] ** 2).sum(axis=0))

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        return tuple(float(size) for size in self.sizes_of(self.affine))

    @property
    def sides_are_known(self) -> bool:
        """False where the header says nothing of orientation (NIfTI: both codes 0), so that left and right are a guess."""
        header = getattr(self.image, "header", {})
        try:
            return int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
        except (KeyError, ValueError, IndexError, TypeError):
            return True

    @cached_property
    def orientation(self) -> tuple[list[int], list[bool]]:
        """For right, anterior, superior: the voxel axis nearest to it, and whether voxels count along it (not against)."""
        found = nib.io_orientation(self.affine)
        axes, along = [0, 0, 0], [True, True, True]
        for axis, (world, sign) in enumerate(found):
            axes[int(world)], along[int(world)] = axis, bool(sign > 0)
        return axes, along

    def planes(self) -> Iterator[np.ndarray]:
        """Arrays of `shape[:2]`, first to last, in stored values; each is good until the next one is asked for."""
        proxy = self.image.dataobj
        if self._stored is None:
            rest = (self.number - 1,) + (0,) * (len(self.image.shape) - 4) if len(self.image.shape) > 3 else ()
            for k in range(self.shape[2]):
                index = (slice(None), slice(None), k)[: len(self.image.shape)] + rest
                yield np.asanyarray(proxy[index]).reshape(self.shape[:2])
            return
        with self._stream() as stream:
            rows, columns, _ = self.shape
            nbytes = rows * columns * proxy.dtype.itemsize
            at_once = min(max(1, READ_NBYTES // nbytes), self.shape[2])
            block = np.empty((rows, columns, at_once), dtype=proxy.dtype, order="F")
            view = memoryview(block.reshape(-1, order="F").view(np.uint8))
            stream.seek(proxy.offset + (self.number - 1) * self.shape[2] * nbytes)
            for first in range(0, self.shape[2], at_once):
                count = min(at_once, self.shape[2] - first)
                done = 0
                while done < count * nbytes:
                    try:
                        n = stream.readinto(view[done : count * nbytes])
                    except EOFError:  # of a compressed file
                        n = 0
                    if not n:
                        raise CannotDraw(f"cut off in plane {first + done // nbytes + 1} of {self.shape[2]}")
                    done += n
                for k in range(count):
                    yield block[..., k]

    @cached_property
    def _stored(self) -> tuple[str | bytes, str] | None:
        """(local path or bytes of the file, how it is compressed); None for what only nibabel can read."""
        proxy = self.image.dataobj
        if type(proxy) is not nib.arrayproxy.ArrayProxy or getattr(proxy, "order", "F") != "F":
            return None
        source = proxy.file_like.source if isinstance(proxy.file_like, StoredFile) else proxy.file_like
        if not isinstance(source, str | bytes):
            return None
        with _raw(source) as file:
            magic = file.read(4)
        if magic == b"\x28\xb5\x2f\xfd":  # zstd
            return None
        return source, "gzip" if magic.startswith(b"\x1f\x8b") else "bzip2" if magic.startswith(b"BZh") else ""

    def _stream(self) -> Any:
        source, compression = self._stored
        raw = _raw(source)
        return _GzipFile(fileobj=raw, mode="rb") if compression == "gzip" else bz2.open(raw) if compression else raw

    @cached_property
    def is_stored_unscaled(self) -> bool:
        """Whether stored values are real numbers in the image's unit."""
        proxy = self.image.dataobj
        if self._stored is None or proxy.dtype.kind == "c" or proxy.dtype.names:
            return False
        return (float(proxy.slope), float(proxy.inter)) == (1.0, 0.0)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Stored values to floating point numbers in the image's unit; complex numbers to their magnitude; RGB as it is."""
        if values.dtype.names:
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            if self._stored is not None:  # else nibabel has scaled them
                slope, inter = float(self.image.dataobj.slope), float(self.image.dataobj.inter)
                if (slope, inter) != (1.0, 0.0):
                    values = values * slope + inter
            values = np.abs(values) if np.iscomplexobj(values) else values
            return values if values.dtype == np.float64 else values.astype(np.float32)

    def world(self, voxel: tuple[float, float, float]) -> np.ndarray:
        return self.affine[:3, :3] @ np.asarray(voxel, float) + self.affine[:3, 3]

    def nearest(self, world: np.ndarray) -> tuple[int, int, int] | None:
        """The voxel at a point (mm); None outside."""
        voxel = np.rint(np.linalg.inv(self.affine) @ np.append(world, 1.0))[:3]
        return tuple(int(v) for v in voxel) if ((voxel >= 0) & (voxel < self.shape)).all() else None


class Mask:
    """The voxels of an image that are not zero, one bit each.

    Args:
        image: a nibabel image; of several volumes the middle one

    Attributes:
        ml (`float`): their volume in millilitres
        centre (`numpy.ndarray` or `None`): a point (mm) in the axial, coronal and sagittal plane with most of them

    Raises:
        CannotDraw: see `Volume.of`
    """

    def __init__(self, image: Any):
        self.volume = Volume.of(image)
        rows, columns, planes = self.volume.shape
        self._bits = np.zeros((planes, (rows * columns + 7) // 8), np.uint8)
        counts = [np.zeros(n, np.int64) for n in self.volume.shape]
        for k, plane in enumerate(self.volume.planes()):
            if plane.dtype.names:
                raise CannotDraw("a colour image, no mask")
            inside = (plane if self.volume.is_stored_unscaled else self.volume.scaled(plane)) > 0
            if inside.any():
                self._bits[k] = np.packbits(inside.ravel(order="F"))
                ones = inside.astype(np.float32)  # summed by BLAS, several times faster than as bool
                counts[0] += (ones @ np.ones(columns, np.float32)).astype(np.int64)
                counts[1] += (np.ones(rows, np.float32) @ ones).astype(np.int64)
                counts[2][k] = np.count_nonzero(inside)
        voxels = int(counts[2].sum())
        self.ml = voxels * abs(float(np.linalg.det(self.volume.affine[:3, :3]))) / 1000
        self.centre = self.volume.world(tuple(int(c.argmax()) for c in counts)) if voxels else None

    def on(self, volume: Volume, axis: int, index: int) -> np.ndarray:
        """Which voxels of another volume's slice are inside.

        Args:
            volume (`Volume`): on whatever grid
            axis, index (`int`): the slice across this voxel axis

        Returns:
            `numpy.ndarray`: bool, the other two axes in their order
        """
        to_mask = np.linalg.inv(self.volume.affine) @ volume.affine
        first, second = (other for other in range(3) if other != axis)
        inside, voxel = np.True_, []
        for row, n in zip(to_mask[:3], self.volume.shape, strict=True):
            down = row[first] * np.arange(volume.shape[first]) + row[axis] * index + row[3]
            places = np.rint(down[:, None] + row[second] * np.arange(volume.shape[second])).astype(np.int64)
            inside = inside & (places >= 0) & (places < n)
            voxel.append(places)
        i, j, k = (np.where(inside, places, 0) for places in voxel)
        flat = i + j * self.volume.shape[0]
        return inside & (self._bits[k, flat >> 3] >> (7 - (flat & 7)) & 1).astype(bool)


class Slices:
    """What one forward read of a volume leaves: slices through some points, and a coarse grid of all voxels (stored values).

    Args:
        image: a nibabel image
        centres: points (mm) that slices go through; `None`, or one that lies outside, stands for the middle
        face (`bool`): keep the coarse grid fine enough for `draw` to show a face

    Raises:
        CannotDraw: see `Volume.of`; or the file is cut off
    """

    def __init__(self, image: Any, centres: Iterable[np.ndarray | None] = (None,), face: bool = False):
        self.volume = Volume.of(image)
        voxels = {self.voxel(centre) for centre in centres}
        self.steps = tuple(math.ceil(n / (FACE if face else COARSE)) for n in self.volume.shape)
        first, second, third, coarse = {v[0]: [] for v in voxels}, {v[1]: [] for v in voxels}, {}, []
        for k, plane in enumerate(self.volume.planes()):
            for i, lines in first.items():
                lines.append(plane[i].copy())
            for j, lines in second.items():
                lines.append(plane[:, j].copy())
            if any(k == v[2] for v in voxels):
                third[k] = plane.copy()
            if k % self.steps[2] == 0:
                coarse.append(plane[:: self.steps[0], :: self.steps[1]].copy())
        self.coarse = self.volume.scaled(np.stack(coarse, axis=2))
        self._across = [
            {i: np.stack(lines, axis=1) for i, lines in first.items()},  # (y, z)
            {j: np.stack(lines, axis=1) for j, lines in second.items()},  # (x, z)
            third,  # (x, y)
        ]

    def voxel(self, centre: np.ndarray | None) -> tuple[int, int, int]:
        inside = self.volume.nearest(centre) if centre is not None else None
        return inside or tuple(n // 2 for n in self.volume.shape)

    def window(self, given: tuple[float, float] | None = None) -> "Window | None":
        """The values that are black and white; None for a colour image, and where no voxel is a number."""
        if self.coarse.dtype.names:
            return None
        finite = self.coarse[np.isfinite(self.coarse)]
        if not len(finite):
            return None
        hounsfield = is_hounsfield(finite)
        return Window(*given, "HU" if hounsfield else "") if given else Window.of(finite)

    def across(self, axis: int, voxel: tuple[int, int, int]) -> np.ndarray:
        """The slice across a voxel axis, in the image's unit; its axes are the other two in their order."""
        return self.volume.scaled(self._across[axis][voxel[axis]])


@dataclass(frozen=True)
class Window:
    """The values that are black and white."""

    low: float
    high: float
    unit: str = ""

    @classmethod
    def of(cls, values: np.ndarray) -> "Window":
        """Of finite values: the brain window for Hounsfield units, else robust percentiles of what is not background."""
        if is_hounsfield(values):
            return cls(*BRAIN_WINDOW, "HU")
        background = values.min() if (values == values.min()).mean() > 0.05 else None
        inside = values if background is None else values[values != background]
        low, high = np.quantile(inside, (SATURATED[0], 1 - SATURATED[1])) if len(inside) else (background, background)
        if background is not None:
            low = min(low, max(float(background), low - (high - low)))
        if high <= low:
            low, high = float(values.min()), float(values.max())
        return cls(float(low), float(high))

    def grey(self, values: np.ndarray) -> np.ndarray:
        """uint8; what is not a number is black."""
        with np.errstate(invalid="ignore", over="ignore"):
            part = (values - self.low) * (255 / max(self.high - self.low, np.finfo(np.float32).tiny))
        part = np.clip(part, 0, 255)
        return np.where(np.isnan(part), 0, part + 0.5).astype(np.uint8)

    def __str__(self) -> str:
        return f"{_number(self.low)} … {_number(self.high)}{' ' * bool(self.unit)}{self.unit}"


def _raw(source: str | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def is_hounsfield(values: np.ndarray) -> bool:
    """Whether these are Hounsfield units: whole numbers, air around -1000 (or a scanner's padding below it), and soft tissue."""
    if not len(values) or values.min() > -900 or values.min() < -10_000:
        return False
    air = ((values > -1100) & (values < -900) | (values == values.min())).mean()
    tissue = ((values > -150) & (values < 250)).mean()
    return bool(air > 0.05 and tissue > 0.02)


def draw(
    image: Any,
    *,
    mask: Mask | None = None,
    centre: np.ndarray | None = None,
    labels: bool = False,
    window: tuple[float, float] | None = None,
    face: bool = False,
    max_nbytes: int = 300_000,
) -> bytes:
    """A picture of an image.

    Args:
        image: any nibabel image, whose file is read once, forward; or its `Slices`
        mask (`Mask`, *optional*): drawn over the image
        centre (`numpy.ndarray`, *optional*): the point (mm) that the slices go through; by default the mask's, else the middle
        labels (`bool`): the image is a mask or a segmentation itself: a colour for each value
        window (`tuple`, *optional*): the values that are black and white; by default told from the data
        face (`bool`): add a view of the head's surface from the front, to see whether the face was removed
        max_nbytes (`int`): the picture's size at most, as far as it stays a picture

    Returns:
        `bytes`: JPEG; of an image that cannot be drawn or read, one that says why
    """
    try:
        centre = mask.centre if centre is None and mask is not None else centre
        slices = image if isinstance(image, Slices) else Slices(image, [centre], face)
        return _encode(_draw(slices, mask, centre, labels, window, face), max_nbytes)
    except UNREADABLE as e:
        return placeholder(e)


def placeholder(error: Exception, path: str | None = None) -> bytes:
    """A picture that says why there is none. JPEG.

    Args:
        path (`str`, *optional*): the file's; its directories are left out, since pictures are published
    """
    text = str(error) if isinstance(error, CannotDraw) else f"cannot be read: {error}"
    text = text.replace(path, os.path.basename(path)) if path else text
    picture = Image.new("L", (3 * PANEL, PANEL // 2), 40)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=90)
    font = _font(16)
    lines, line = [], ""
    for word in " ".join(text.split())[:300].split(" "):
        if line and pen.textlength(f"{line} {word}", font=font) > picture.width - 40:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    pen.multiline_text(
        (picture.width / 2, picture.height / 2),
        "\n".join([*lines, line][:5]),
        fill=200,
        font=font,
        anchor="mm",
        align="center",
    )
    return _encode(picture, 100_000)


def _draw(slices, mask, centre, labels, window, face) -> Image.Image:
    volume, voxel = slices.volume, slices.voxel(centre)
    notes = [] if volume.count == 1 else [f"volume {volume.number} of {volume.count}"]
    if mask is not None:
        if mask.centre is None:
            notes.append("mask is empty")
        elif volume.nearest(mask.centre) is None:
            notes.append("mask lies outside")
    coarse = slices.coarse
    if coarse.dtype.names:
        shades = None
        if not any(coarse[name].any() for name in coarse.dtype.names):
            raise CannotDraw("all voxels are black")
    else:
        finite = coarse[np.isfinite(coarse)]
        if not len(finite):
            raise CannotDraw("no voxel is a number (all NaN or infinite)")
        exact = [slices.across(axis, voxel) for axis in range(3)]
        low = min([finite.min(), *(s[np.isfinite(s)].min(initial=np.inf) for s in exact)])
        high = max([finite.max(), *(s[np.isfinite(s)].max(initial=-np.inf) for s in exact)])
        if low == high:
            raise CannotDraw(f"all voxels are {_number(low)}")
        shades = slices.window(window)
        if shades.low >= shades.high:
            shades = Window(float(low), float(high))
        if not labels:
            notes.insert(0, str(shades))
    panels = [_panel(slices, voxel, shades, mask, labels, world) for world in (2, 1, 0)]
    panels = [panel for panel in panels if panel is not None]
    if face and shades is not None:
        panels.append(_face(slices))
    return _compose(panels, volume, notes)


# What is left and what is up in a picture, as world axes (0 right, 1 anterior, 2 superior): all three run from the end that is
# named first, so the patient's right is on the left (radiological convention), front and top are up, and noses point to the left.
_LAYOUT = {2: (0, 1, "R", "L"), 1: (0, 2, "R", "L"), 0: (1, 2, "A", "P")}


@dataclass(frozen=True)
class _Panel:
    pixels: Image.Image
    mask: Image.Image | None
    mm: tuple[float, float]  # width, height
    left: str
    right: str


def _panel(
    slices: Slices, voxel: tuple[int, int, int], shades: Window | None, mask: Mask | None, labels: bool, world: int
) -> _Panel | None:
    """The slice across a world axis, turned; None if it is a line or a point."""
    volume = slices.volume
    axes, along = volume.orientation
    across_world, up_world, left, right = _LAYOUT[world]
    if volume.shape[axes[across_world]] < 2 or volume.shape[axes[up_world]] < 2:
        return None

    def turned(array: np.ndarray) -> np.ndarray:
        """`array` has the two voxel axes in their order; rows of the result go down, columns to the right."""
        if axes[across_world] < axes[up_world]:
            array = np.swapaxes(array, 0, 1)
        down = slice(None, None, -1) if along[up_world] else slice(None)
        over = slice(None, None, -1) if along[across_world] else slice(None)
        return array[down, over]

    values = turned(slices.across(axes[world], voxel))
    if values.dtype.names:
        pixels = np.stack([values[name] for name in values.dtype.names[:3]], axis=-1).astype(np.uint8)
    elif labels:
        whole = np.nan_to_num(values, posinf=0, neginf=0)
        colours = np.array(COLOURS, np.uint8)[((np.ceil(np.abs(whole)) - 1) % len(COLOURS)).astype(np.int64)]
        pixels = np.where((whole != 0)[..., None], colours, np.uint8(0))
    else:
        pixels = shades.grey(values)
    drawn = None
    if mask is not None and mask.centre is not None:
        inside = turned(mask.on(volume, axes[world], voxel[axes[world]]))
        drawn = Image.fromarray(inside.astype(np.uint8) * 255)
    mm = tuple(volume.voxel_mm[axes[w]] * volume.shape[axes[w]] for w in (across_world, up_world))
    return _Panel(Image.fromarray(np.ascontiguousarray(pixels)), drawn, mm, left, right)


def _face(slices: Slices) -> _Panel:
    """The head's surface seen from the front, from the coarse grid: light where it looks at the viewer."""
    volume = slices.volume
    axes, along = volume.orientation
    head = np.nan_to_num(slices.coarse, posinf=0.0, neginf=0.0)
    head = np.transpose(head, axes)  # right, anterior, superior
    head = head[tuple(slice(None) if forward else slice(None, None, -1) for forward in along)]
    steps = [slices.steps[axis] * volume.voxel_mm[axis] for axis in axes]
    solid = head > (-300 if is_hounsfield(head.ravel()) else _otsu(head))
    depth = solid[:, ::-1].argmax(axis=1) * steps[1]  # mm from the front
    seen = solid.any(axis=1)
    depth = np.where(seen, depth, head.shape[1] * steps[1])
    dx, dz = np.gradient(depth, steps[0], steps[2]) if min(depth.shape) > 1 else (depth * 0.0, depth * 0.0)
    light = (1 + 0.5 * dz - 0.3 * dx) / np.sqrt(1 + dx**2 + dz**2) / 1.16
    haze = 1 - 0.5 * (depth / max(float(depth[seen].max(initial=1.0)), 1.0))
    pixels = np.where(seen, (light.clip(0.05, 1) * haze * 255), 0).astype(np.uint8)
    pixels = pixels.T[::-1, ::-1]  # rows from the top, columns from the patient's right
    mm = (head.shape[0] * steps[0], head.shape[2] * steps[2])
    return _Panel(Image.fromarray(np.ascontiguousarray(pixels)), None, mm, "R", "L")


def _otsu(values: np.ndarray) -> float:
    """The threshold between air and head: the variance between the two classes is largest there."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts), np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        between = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below))
    # Brain and scalp are far apart from each other too; half of the way is still far above air.
    return float(middles[np.nan_to_num(between).argmax()]) / 2


def _compose(panels: list[_Panel], volume: Volume, notes: list[str]) -> Image.Image:
    scale = min(PANEL / size for panel in panels for size in panel.mm)
    sizes = [tuple(max(2, round(size * scale)) for size in panel.mm) for panel in panels]
    width = sum(w for w, _ in sizes) + _MARGIN * (len(panels) - 1)
    height = max(h for _, h in sizes)
    foot = 20 if notes else 0
    width = max(width, 120)
    colour = any(panel.mask is not None or panel.pixels.mode == "RGB" for panel in panels)
    picture = Image.new("RGB" if colour else "L", (width, height + foot), 0)
    pen, font = ImageDraw.Draw(picture), _font(18)
    doubt = "" if volume.sides_are_known else "?"
    x = 0
    for panel, size in zip(panels, sizes, strict=True):
        y = (height - size[1]) // 2
        resample = Image.Resampling.NEAREST if panel.pixels.mode == "RGB" else Image.Resampling.LANCZOS
        pixels = panel.pixels.resize(size, resample).convert(picture.mode)
        if panel.mask is not None:
            inside = panel.mask.resize(size, Image.Resampling.BOX).point(lambda v: 255 if v > 127 else 0)
            pixels.paste(COLOURS[0], mask=inside.point(lambda v: v * 35 // 100))
            edge = Image.fromarray(np.asarray(inside) & ~np.asarray(inside.filter(ImageFilter.MinFilter(3))))
            pixels.paste(COLOURS[0], mask=edge)
        picture.paste(pixels, (x, y))
        for text, place, anchor in ((panel.left, x + 3, "lm"), (panel.right, x + size[0] - 3, "rm")):
            fill = (255, 230, 120) if colour else 235
            pen.text(
                (place, height / 2), text + doubt, fill=fill, font=font, anchor=anchor, stroke_width=2, stroke_fill=0
            )
        x += size[0] + _MARGIN
    if notes:
        fill = (_GREY,) * 3 if colour else _GREY
        pen.text((3, height + foot / 2), ", ".join(notes), fill=fill, font=_font(13), anchor="lm")
    return picture


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _encode(picture: Image.Image, max_nbytes: int) -> bytes:
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality, subsampling=0)
            if file.tell() <= max_nbytes:
                return file.getvalue()
        if picture.width < 64:
            return file.getvalue()
        picture = picture.resize((picture.width // 2, max(picture.height // 2, 1)), Image.Resampling.BOX)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"  # the font has no ×
