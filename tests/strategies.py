"""Hypothesis strategies that the test modules share."""

import os
from pathlib import Path

import pyarrow as pa
from datasets import Audio, Features, Image, LargeList, List, Nifti, Pdf, Value, Video
from hypothesis import strategies as st


FILE_FEATURES = (Nifti(), Nifti(decode=False), Image(), Audio(), Video(), Pdf())


def make_files(directory: Path, sizes=(1, 2, 7, 255, 4096, 70_001)) -> list[str]:
    """Files of these sizes (bytes) with different contents; their names have spaces and non-ASCII letters."""
    paths = []
    for i, size in enumerate(sizes):
        path = directory / f"sub-{i:02d}" / f"sub-{i:02d} größe_T1w.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes((i * 37 + k * 11) % 251 for k in range(size)))
        paths.append(str(path))
    return paths


def file_values(paths: list[str]):
    """One value of an embedding feature: null, a path, bytes, or both."""
    path = st.sampled_from(paths)
    data = st.binary(min_size=1, max_size=40)
    return st.one_of(
        st.none(),
        st.fixed_dictionaries({"bytes": st.none(), "path": path}),
        st.fixed_dictionaries({"bytes": data, "path": st.none()}),
        st.fixed_dictionaries({"bytes": data, "path": st.one_of(path, st.just("elsewhere/x.nii"))}),
    )


def features():
    """A feature that embeds files at some depth: plain, list, large list, fixed-size list, struct, and these in each other."""
    return st.recursive(
        st.sampled_from(FILE_FEATURES),
        lambda inner: st.one_of(
            inner.map(List),
            inner.map(LargeList),
            st.tuples(inner, st.integers(1, 3)).map(lambda t: List(t[0], length=t[1])),
            inner.map(lambda f: {"file": f, "note": Value("string")}),
            st.tuples(inner, inner).map(lambda t: {"a": t[0], "b": t[1]}),
        ),
        max_leaves=3,
    )


def values_of(feature, paths: list[str]):
    """Python values of a feature as from `features`, nulls at every level."""
    if isinstance(feature, tuple(type(f) for f in FILE_FEATURES)):
        return file_values(paths)
    if isinstance(feature, dict):
        return st.one_of(st.none(), st.fixed_dictionaries({k: values_of(f, paths) for k, f in feature.items()}))
    if isinstance(feature, List) and feature.length != -1:
        inner = values_of(feature.feature, paths)
        return st.one_of(st.none(), st.lists(inner, min_size=feature.length, max_size=feature.length))
    if isinstance(feature, List | LargeList):
        return st.one_of(st.none(), st.lists(values_of(feature.feature, paths), max_size=3))
    return st.one_of(st.none(), st.text(max_size=5))


@st.composite
def columns(draw, paths: list[str], max_rows: int = 6):
    """`(feature, chunked array, python values)`: a column in some Arrow layout, sliced and chunked, and what it holds."""
    feature = draw(features())
    pa_type = Features({"x": feature}).arrow_schema.field("x").type
    chunks, expected = [], []
    for _ in range(draw(st.integers(1, 2))):
        values = draw(st.lists(values_of(feature, paths), max_size=max_rows))
        start = draw(st.integers(0, len(values)))
        stop = draw(st.integers(start, len(values)))
        chunks.append(pa.array(values, type=pa_type)[start:stop])
        expected.extend(values[start:stop])
    return feature, pa.chunked_array(chunks, type=pa_type), expected


def embedded(value, feature):
    """The reference: read the file."""
    if value is None or isinstance(feature, Value):
        return value
    if isinstance(feature, dict):
        return {name: embedded(value[name], f) for name, f in feature.items()}
    if isinstance(feature, List | LargeList):
        return [embedded(v, feature.feature) for v in value]
    data, path = value["bytes"], value["path"]
    data = Path(path).read_bytes() if data is None else data
    return {"bytes": data, "path": None if path is None else os.path.basename(path)}


LABELS = st.text(alphabet="abAB01+", min_size=1, max_size=2)


@st.composite
def image_paths(draw):
    """The path of an image, of BIDS or nearly so: with odd directories, entities, words, suffixes and extensions."""
    subject = draw(st.one_of(st.none(), st.sampled_from(["1", "2", "A"])))
    session = draw(st.one_of(st.none(), st.sampled_from(["1", "x"])))
    top = ["", "derivatives/a/", "derivatives/A+/", "sourcedata/raw/", "site 1/", "derivatives/", "stimuli/", "tpl-x/"]
    directories = draw(st.sampled_from(top))
    if subject and draw(st.integers(0, 4)):
        directories += f"sub-{subject}/"
        if session and draw(st.integers(0, 4)):
            directories += f"ses-{session}/"
    directories += draw(st.sampled_from(["anat/", "func/", "dwi/", "", "own dir/", "anat/deeper/"]))
    keys = draw(st.lists(st.sampled_from(["task", "acq", "run", "echo", "desc", "space", "odd", "1"]), max_size=3))
    parts = [f"sub-{subject}"] * bool(subject and draw(st.integers(0, 4))) + [f"ses-{session}"] * bool(session)
    parts += [f"{key}-{draw(LABELS)}" for key in keys]
    parts += draw(st.sampled_from([[], [], [], ["word"], ["-"], [""]]))
    parts += [draw(st.sampled_from(["T1w", "bold", "dwi", "t1W", "3d", "µ"]))] * bool(draw(st.integers(0, 8)))
    extension = draw(st.sampled_from([".nii.gz", ".nii.gz", ".nii", ".dtseries.nii", ".nii.bz2", ".v2.nii.gz"]))
    return directories + ("_".join(parts) or "image") + extension


def trees():
    """Paths of the images of a tree, without two that differ in nothing."""
    return st.lists(image_paths(), min_size=1, max_size=12, unique=True)
