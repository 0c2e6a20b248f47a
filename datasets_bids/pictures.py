"""The preview of a dataset: the same rows, with a picture in the place of each image, small enough for the Hub's viewer.

How it works:

- What a preview shows follows from the features and the builder's `preview` alone, so all shards have the same columns.
- A shard's preview is made by the worker that embeds the shard, at the same time and from the same files: whichever of the two reads a
  file first, the other finds it in the page cache.
- Of a row, masks are read first, since they say which slices of the images are shown. Each image is read once, forward.
"""

import base64
import contextlib
import html
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Nifti, Value

from .embed import parquet_writer
from .montage import UNREADABLE, Mask, Slices, Volume, draw, placeholder
from .shards import local_path, remote_nbytes


ROW_NBYTES = 300_000
"""Bytes of a row's pictures at most. The Hub's viewer scans at most 300 MB for a page of 100 rows, and no page should take long."""

TEXT_LENGTH = 200
"""Characters of a text cell that are kept: sidecars and gradient tables are long, and the viewer shows 200 kB of text in all."""

MEASURED = {"ml": "float64", "shape": "string", "voxel_mm": "string", "nbytes": "int64"}
"""What is measured on an image, in columns of its own: the volume of a mask (ml), voxels along each axis, their size, bytes as stored."""

_THREADS = (
    2  # rows drawn at a time: inflating leaves Python's lock alone, and takes several times as long as embedding
)

_THUMBNAILS = 3  # of a list, in a cell of a table

_GROUP_ROWS = 100  # a page of the viewer is one row group, of at most 30 MB

# Images that show a face if it was not removed.
_ANATOMY = re.compile(r"_(T1w|T2w|T2starw|FLAIR|PDw|PDT2|UNIT1|MP2RAGE|inplaneT[12]|(nc)?ct|cta)$", re.IGNORECASE)

# (column, number in a list)
_Cell = tuple[str, int]

# How file names and columns say that an image is a mask or a segmentation (BIDS suffixes mask and dseg, and what is used beside them).
_MASK = re.compile(r"(^|[_-])(mask|msk|dseg|seg|roi|lesion|label)s?$", re.IGNORECASE)


@dataclass(frozen=True)
class Preview:
    """What is shown of a dataset.

    Attributes:
        source (`Features`): the dataset's own
        masks (`frozenset[str]`): columns of masks
        on (`dict[str, str]`): column of a mask -> column of the image that it is drawn on
        windows (`dict[str, tuple[float, float]]`): column of an image -> values that are black and white
    """

    source: Features
    masks: frozenset[str]
    on: Mapping[str, str] = field(default_factory=dict)
    windows: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, splits: Mapping[str, Dataset], spec: Mapping[str, Any] | None = None) -> "Preview | None":
        """
        Args:
            splits (`dict[str, Dataset]`): split -> rows of paths
            spec (`dict`, *optional*): see `BidsConfig.preview`

        Returns:
            `Preview`, or `None` if the dataset has no image column

        Raises:
            ValueError: `spec` names a column that is none of the images
        """
        features = next(iter(splits.values())).features
        images = image_columns(features)
        if not images:
            return None
        on, windows = parse_preview(spec, images)
        masks = {name for name in images if name in on or _MASK.search(name)}
        for name in set(images) - masks:
            stems = {stem for dataset in splits.values() for stem in _stems(dataset, name)}
            if stems and all(_MASK.search(stem) for stem in stems):
                masks.add(name)
        return cls(features, frozenset(masks), on, windows)

    @property
    def images(self) -> list[str]:
        return image_columns(self.source)

    @property
    def features(self) -> Features:
        """Pictures and scalars in the dataset's order, then what is measured on each image."""
        features = {}
        for name, feature in self.source.items():
            if name in self.images:
                features[name] = _like(feature, datasets.Image())
            elif isinstance(feature, Value) or isinstance(feature, List) and isinstance(feature.feature, Value):
                features[name] = feature
        measured = {
            f"{name}_ml": _like(self.source[name], Value(MEASURED["ml"])) for name in self.images if name in self.masks
        }
        for name in self.images:
            for key in ("shape", "voxel_mm", "nbytes"):
                measured[f"{name}_{key}"] = _like(self.source[name], Value(MEASURED[key]))
        return Features(features | {name: feature for name, feature in measured.items() if name not in features})

    def look(
        self, example: Mapping[str, Any], faces: bool = False, max_nbytes: int = ROW_NBYTES
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Reads and draws the images of one row.

        Args:
            example (`dict`): the dataset's row, images not decoded: `{"path", "bytes"}`, `None`, or a list of these
            faces (`bool`): with the head's surface beside images of anatomy; see `montage.draw`
            max_nbytes (`int`): bytes of all pictures of the row

        Returns:
            `dict`: (column, number in a list) -> "picture" (JPEG) and, as far as they are known, "window" (black, white),
            "centre" (mm, what the slices go through) and the keys of `MEASURED`
        """
        values = {
            (name, i): value
            for name in self.images
            for i, value in enumerate(cells(example[name]))
            if value is not None
        }
        found: dict[_Cell, dict[str, Any]] = {cell: {"nbytes": _nbytes(value)} for cell, value in values.items()}
        masks: dict[_Cell, Mask] = {}
        for cell in [cell for cell in values if cell[0] in self.masks]:
            try:
                masks[cell] = Mask(_decode(values[cell], found[cell]))
                found[cell]["ml"] = round(masks[cell].ml, 4)
            except UNREADABLE as e:
                found[cell]["picture"] = placeholder(e, values[cell]["path"])
        base = {cell: (self.on[cell[0]], 0) for cell in masks if (self.on.get(cell[0]), 0) in values}
        share = max_nbytes // max(len(values), 1)
        for cell, value in values.items():
            if cell in base or "picture" in found[cell]:
                continue
            labels = cell in masks
            own = {mask: masks[mask] for mask, image in base.items() if image == cell}
            centres = [masks[cell].centre] if labels else [mask.centre for mask in own.values()] or [None]
            # Of several masks on an image, the image itself is shown at the first one that is not empty.
            centre = next((centre for centre in centres if centre is not None), None)
            options = {"window": self.windows.get(cell[0]), "max_nbytes": share}
            face = faces and not labels and bool(_ANATOMY.search(_stem(value)))
            try:
                slices = Slices(_decode(value, found[cell]), [centre, *centres], face)
                pictures = {cell: draw(slices, centre=centre, labels=labels, face=face, **options)}
                pictures |= {mask: draw(slices, mask=of, **options) for mask, of in own.items()}
                window = slices.window(options["window"])
                found[cell] |= {} if window is None or labels else {"window": [window.low, window.high]}
                for drawn, point in ((cell, centre), *((mask, of.centre) for mask, of in own.items())):
                    found[drawn] |= {} if point is None else {"centre": point.round(3).tolist()}
            except UNREADABLE as e:
                pictures = dict.fromkeys([cell, *own], placeholder(e, value["path"]))
            for drawn, picture in pictures.items():
                found[drawn]["picture"] = picture
        return found

    def row(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The preview of one row: a value for each of `features`. `example` is as for `look`."""
        found, row = self.look(example), {}
        for name in self.features:
            if name in self.images:
                row[name] = _with(example[name], name, found, "picture")
            elif name in example:
                row[name] = short(example[name])
            else:
                column, key = next(
                    (name.removesuffix(f"_{key}"), key)
                    for key in MEASURED
                    if name.endswith(f"_{key}") and name.removesuffix(f"_{key}") in self.images
                )
                row[name] = _with(example[column], column, found, key)
        return row

    @property
    def key(self) -> str:
        """Tells two previews apart that would show something else of the same rows."""
        said = f"{self.features} {sorted(self.masks)} {sorted(self.on.items())} {sorted(self.windows.items())}"
        return f"preview-{sha256(said.encode()).hexdigest()[:8]}"

    def write(
        self, dataset: Dataset, start: int, stop_row: int, path: str, stop: threading.Event | None = None
    ) -> None:
        """Writes the preview of rows `[start, stop_row)` as one Parquet file. The same files give the same bytes, under one
        release of Pillow and of pyarrow.

        Args:
            stop (`threading.Event`, *optional*): gives up before the next row once it is set
        """
        features = self.features

        def row(example: dict[str, Any]) -> dict[str, Any]:
            if stop is not None and stop.is_set():
                raise InterruptedError("the preview was given up")  # or half of it would pass for the whole
            return self.row(example)

        # By this the writer takes the rows for small ones, as they are.
        with (
            parquet_writer(path, features, np.array([ROW_NBYTES])) as writer,
            ThreadPoolExecutor(_THREADS, thread_name_prefix="draw") as threads,
        ):
            for first in range(start, max(stop_row, start + 1), _GROUP_ROWS):
                rows = list(threads.map(row, examples(dataset, first, min(first + _GROUP_ROWS, stop_row))))
                writer.write_table(
                    pa.Table.from_pylist(rows, schema=features.arrow_schema), row_group_size=_GROUP_ROWS
                )


def as_table(dataset: Dataset, max_rows: int = 4, seconds: float = 3.0) -> str:
    """A table of the first rows in HTML, with thumbnails of the images.

    Args:
        max_rows (`int`): no more rows than these
        seconds (`float`): once so much time has passed, images of further rows are named and not drawn, since a notebook waits
    """
    preview = Preview.of({"": dataset}) if image_columns(dataset.features) else None
    start, lines = time.monotonic(), []
    for example in examples(dataset, 0, min(max_rows, len(dataset))):
        drawn = preview is not None and time.monotonic() - start < seconds
        found = preview.look(example, max_nbytes=100_000) if drawn else {}
        line = []
        for name, cell in example.items():
            if preview is None or name not in preview.images:
                line.append(html.escape("" if cell is None else str(short(cell))))
                continue
            values = [(i, value) for i, value in enumerate(cells(cell)) if value is not None]
            items = [_thumbnail(found.get((name, i), {}), value) for i, value in values[:_THUMBNAILS]]
            line.append("".join(items) + (f"… {len(values)} in all" if len(values) > _THUMBNAILS else ""))
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in line) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in dataset.features)
    rest = f", the first {len(lines)} of them shown" if len(lines) < len(dataset) else ""
    return (
        f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f"<p>{len(dataset)} rows{rest}, {len(dataset.features)} columns</p>"
    )


def _thumbnail(image: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    name = html.escape(os.path.basename(value["path"] or "image"), quote=True)
    if "picture" not in image:
        return name
    facts = ", ".join(str(image[key]) for key in ("shape", "voxel_mm") if key in image)
    return f'<img src="{data_url(image["picture"])}" alt="{name}" title="{name} {facts}" style="height:64px;max-width:none">'


def data_url(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


@contextlib.contextmanager
def beside(write: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `write` in a thread of its own during the block. If the block fails, the event is set that `write` is given."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="preview") as thread:
        written = thread.submit(write, stop)
        try:
            yield
            written.result()
        except BaseException:
            stop.set()
            raise


def parse_preview(
    spec: Mapping[str, Any] | None, images: list[str]
) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
    """`BidsConfig.preview` as (column of a mask -> column of an image, column of an image -> window).

    Raises:
        ValueError: names the entry and what is wrong with it
    """
    on, windows = {}, {}
    for name, value in (spec or {}).items():
        for column in [name, *[value] * isinstance(value, str)]:
            if column not in images:
                raise ValueError(f"preview: {column!r} is no column of images (they are {', '.join(images)})")
        if isinstance(value, str) and value != name:
            on[name] = value
        elif isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
            windows[name] = (float(value[0]), float(value[1]))
            if value[0] >= value[1]:
                raise ValueError(f"preview: the window of {name!r} is [black, white] with black < white, not {value}")
        else:
            raise ValueError(
                f"preview: {name!r}: {value!r} is neither the image column that a mask is drawn on nor a window [black, white]"
            )
    return on, windows


def examples(dataset: Dataset, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Rows `[start, stop)`, one after the other, images not decoded."""
    table = dataset.with_format("arrow")
    for index in range(start, stop):
        yield table[index : index + 1].to_pylist()[0]


def image_columns(features: Features) -> list[str]:
    """The columns of `Nifti` and of lists of them."""
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, Nifti) or isinstance(getattr(feature, "feature", None), Nifti)
    ]


def _stems(dataset: Dataset, name: str) -> Iterator[str]:
    """The file names of a column, without extensions."""
    for value in dataset.data.table.column(name).to_pylist():
        for item in cells(value):
            if item is not None and item["path"]:
                yield _stem(item)


def _stem(value: Mapping[str, Any]) -> str:
    return os.path.basename(value["path"] or "").split(".")[0]


def _like(feature: Any, one: Any) -> Any:
    return List(one) if isinstance(feature, List) else one


def cells(cell: Any) -> list[Any]:
    """The values of a cell: those of a list, or the one."""
    return cell if isinstance(cell, list) else [cell]


def _with(cell: Any, name: str, found: Mapping[_Cell, Mapping[str, Any]], key: str) -> Any:
    """`cell` with each of its images replaced by what was found of it."""

    def one(i: int) -> Any:
        value = found.get((name, i), {}).get(key)
        return {"bytes": value, "path": f"{name}.jpg"} if key == "picture" and value is not None else value

    return [one(i) for i in range(len(cell))] if isinstance(cell, list) else one(0)


def short(value: Any) -> Any:
    """A cell of a preview: long text is cut."""
    if isinstance(value, str):
        return value if len(value) <= TEXT_LENGTH else value[: TEXT_LENGTH - 1] + "…"
    return [short(item) for item in value] if isinstance(value, list) else value


def _decode(value: Mapping[str, Any], found: dict[str, Any]) -> Any:
    """The image of a cell; what its header says goes into `found`."""
    image = Nifti().decode_example(value)
    found["shape"] = "x".join(map(str, image.shape))
    found["voxel_mm"] = " x ".join(f"{size:.4g}" for size in Volume.of(image).voxel_mm)
    return image


def _nbytes(value: Mapping[str, Any]) -> int:
    if value["bytes"] is not None:
        return len(value["bytes"])
    local = local_path(value["path"])
    return remote_nbytes(value["path"]) if local is None else os.path.getsize(local)
