"""The columns of a tree that nobody wrote a schema for.

How it works:

- A tree holds datasets (its own, `derivatives/NAME`, nested ones): each is a config, by its name. The images of no subject
  (templates, atlases, group maps) are a config of their own beside it.
- An image is in the row of its subject and session. Its column is named by its datatype, those of its entities that tell
  images of a row apart (and always its task), and its suffix.
- Images of a row that differ in nothing but run, split or chunk are a list. So every image has one cell.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .index import NIFTI_EXTENSIONS, Index, without_gc
from .schema import (
    CaptureColumn,
    Column,
    CompanionColumn,
    ImageColumn,
    Match,
    Pattern,
    ScanColumn,
    SchemaError,
    bids_schema,
    did_you_mean,
)


# Repetitions and pieces of one recording: they make a list. So do sessions where a row is a subject.
_REPEATED = ("run", "split", "chunk")

# Images that the feature cannot hold.
_OTHER_IMAGES = (".img", ".hdr", ".img.gz", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".mnc", ".dcm")
_OTHER_IMAGES += (".ome.tif", ".ome.btf", ".tif")

_KEYS = ("subject_id", "session_id", "path")

FILTERS = ("subjects", "sessions", "datatypes", "suffixes")


class Image(NamedTuple):
    """What the path of an image says.

    Attributes:
        path (`str`): relative to the root
        subject (`str` or `None`): `sub-<label>`
        session (`str` or `None`): `ses-<label>`
        datatype (`str`): `anat`, `func`, ...; where there is none of BIDS, the directory below the subject's, or `""`
        entities (`dict[str, str]`): key -> label, without subject and session; also `place` (other directories on the way),
            `words` (parts of the name that are no entity) and `kind` (`dtseries` of `.dtseries.nii`), if there are any
        suffix (`str`): `T1w`, `bold`, ..., or `""`
        dataset (`str`): name of the derivative that the image is joined from, or `""`
    """

    path: str
    subject: str | None
    session: str | None
    datatype: str
    entities: dict[str, str]
    suffix: str
    dataset: str = ""


@dataclass(frozen=True)
class Layout:
    """What a build without a schema is made of.

    Attributes:
        row (`str`): `"subject"`, `"session"` or `"file"`
        columns (`dict[str, Column]`): as from `parse_schema`
        matches (`list[Match]`): one for each image
        subjects (`set[str]`): further subjects that have a row: those with a directory and no image
        metadata_from (`list`): the tables of the dataset
        lists_subjects (`bool`): whoever is in the tables has a row; not where they are those of another dataset
        left_out (`dict[str, str]`): image -> why it is in no column
        descriptions (`dict[str, str]`): column -> what is in it
    """

    row: str
    columns: dict[str, Column]
    matches: list[Match]
    subjects: set[str]
    metadata_from: list[Any]
    lists_subjects: bool
    left_out: dict[str, str]
    descriptions: dict[str, str]


def parse_image(path: str, dataset: str = "") -> Image:
    """Takes the path of an image apart.

    Args:
        path (`str`): relative to the root
        dataset (`str`): directory of the dataset it belongs to, relative to the root
    """
    directory, _, name = path[len(dataset) + 1 if dataset else 0 :].rpartition("/")
    subject, session, places, above_subject = _parse_directory(directory)
    # What is left is the same for every subject.
    for identifier in (subject, session):
        if identifier is not None and name.startswith(identifier + "_"):
            name = name[len(identifier) + 1 :]
    named, datatype, entities, suffix = _parse_name(name, places, above_subject)
    return Image(path, subject or named.get("sub"), session or named.get("ses"), datatype, entities, suffix)


@functools.lru_cache(maxsize=10_000)
def _parse_directory(directory: str) -> tuple[str | None, str | None, tuple[str, ...], int | None]:
    """Subject, session, all other parts of the directory, and how many of these are above the subject's."""
    identifiers: dict[str, str] = {}
    places: list[str] = []
    above_subject = None
    for part in directory.split("/") if directory else ():
        if part[:4] in ("sub-", "ses-"):
            identifiers.setdefault(part[:3], part)
            above_subject = len(places)
        else:
            places.append(part)
    return identifiers.get("sub"), identifiers.get("ses"), tuple(places), above_subject


@functools.lru_cache(maxsize=10_000)
def _parse_name(
    name: str, places: tuple[str, ...], above_subject: int | None
) -> tuple[dict[str, str], str, dict[str, str], str]:
    """Identifiers, datatype, entities (with `place`, `words` and `kind`) and suffix. The dictionaries are shared."""
    stem, _, extension = name.partition(".")
    parts = stem.split("_")
    suffix = "" if "-" in parts[-1] else parts.pop()
    entities: dict[str, str] = {}
    words = []
    for part in parts:
        key, dash, label = part.partition("-")
        if dash and key and key not in entities:
            entities[key] = label
        else:
            words.append(part)
    identifiers = {key: f"{key}-{entities.pop(key)}" for key in ("sub", "ses") if key in entities}
    datatype = next((place for place in reversed(places) if place in _datatypes()), "")
    if not datatype and above_subject is not None and len(places) > above_subject:
        datatype = places[-1]
    others = list(places)
    if datatype:
        del others[len(others) - 1 - others[::-1].index(datatype)]
    # tpl-MNI152/cohort-1/: the file's name says it again
    others = [
        place for place in others if "-" not in place or entities.get(place.split("-")[0]) != place.split("-", 1)[1]
    ]
    kind = [piece for piece in extension.split(".") if piece not in ("nii", "gz", "bz2", "zst")]
    for key, pieces in (("place", others), ("words", words), ("kind", kind)):
        if pieces:
            entities[key] = "_".join(pieces)
    return identifiers, datatype, entities, suffix


@functools.lru_cache
def _datatypes() -> frozenset[str]:
    return frozenset(bids_schema().objects.datatypes)


@without_gc()
def find_configs(index: Index) -> dict[str, list[Image]]:
    """Config name -> its images. The tree's own dataset is `default`, any other bears the name of its directory; images of
    no subject are in `group` (`NAME-group`), unless a dataset has no others. Every image is in one config.
    """
    present = set(index.images)
    by_dataset: dict[str, list[Image]] = defaultdict(list)
    for path in index.images:
        dataset = index.dataset_of(path)
        image = parse_image(path, dataset)
        if not path.endswith(".nii.gz"):
            extension = next(extension for extension in NIFTI_EXTENSIONS if path.endswith(extension))
            if path.removesuffix(extension) + ".nii.gz" in present:
                image = image._replace(entities={**image.entities, "kind": extension[1:].replace(".", "_")})
        by_dataset[dataset].append(image)
    configs: dict[str, list[Image]] = {}
    groups: dict[str, list[Image]] = {}
    for name, dataset in _names(by_dataset).items():
        images = by_dataset[dataset]
        of_subjects = [image for image in images if image.subject is not None]
        of_none = [image for image in images if image.subject is None]
        if of_subjects:
            configs[name] = of_subjects
        if of_none and not of_subjects:
            configs[name] = of_none
        elif of_none:
            groups["group" if name == "default" else f"{name}-group"] = of_none
    for name, images in groups.items():
        configs[_unique(name, configs)] = images
    return configs


def _names(datasets: Iterable[str]) -> dict[str, str]:
    """Name -> directory of the dataset: its last part, or all of them where two would have the same."""
    datasets = sorted(datasets)
    last = [dataset.rpartition("/")[2].lower() for dataset in datasets]
    names = {}
    for dataset, short in zip(datasets, last, strict=True):
        unique = last.count(short) == 1 and short not in ("default", "group", "data")
        name = (dataset.rpartition("/")[2] if unique else dataset.replace("/", "-")) or "default"
        # `datasets` makes a directory of a config's name.
        names[_unique("".join("_" if c in '<>:|?*"\\' else c for c in name), names)] = dataset
    return names


def derive(config: Any, index: Index) -> Layout:
    """Columns and cells of a config (`BidsConfig`) without a schema.

    Raises:
        SchemaError: there is no such config, no image, or nothing that passes a filter
    """
    configs = find_configs(index)
    left_out = {
        file.path: "no NIfTI file; convert it, for example with nibabel or dcm2niix"
        for file in index.files
        if file.path.lower().endswith(_OTHER_IMAGES)
    }
    if not configs:
        kinds = sorted({file.path.rpartition(".")[2] for file in index.files if "." in file.path.rpartition("/")[2]})
        raise SchemaError(
            f"there is no NIfTI image under {index.root}, of which a row could be made; it holds {len(index.files)} files"
            + (f" ({', '.join('.' + kind for kind in kinds[:8])}{' ...' if len(kinds) > 8 else ''})" if kinds else "")
            + (f", {len(left_out)} of them images that are no NIfTI: convert them" if left_out else "")
        )
    name = _resolve(config.name, configs)
    images = configs[name]
    joined = _joined(config.derivatives, name, configs)
    for other in configs:
        if other != name and other not in joined:
            left_out |= {image.path: f"in config {other!r}" for image in configs[other]}
    images = images + [image._replace(dataset=other) for other in joined for image in configs[other]]
    of_none = images[0].subject is None
    if of_none and config.row in ("subject", "session"):
        raise SchemaError(f'row={config.row!r}: the images of config {name!r} are of no subject; row="file" goes')
    row = "file" if of_none else config.row or ("session" if any(image.session for image in images) else "subject")

    # From all images, so that a filter does not change the names of columns.
    named = _file_columns(images) if row == "file" else _name_columns(images, row)
    chosen, filtered = _filter(config, images)
    left_out |= filtered
    columns: dict[str, Column] = {}
    descriptions: dict[str, str] = {}
    if row == "file":
        for key in named:
            columns[_unique(_identifier(key), [*_KEYS, "image", *columns])] = CaptureColumn(key)
        columns["image"] = ImageColumn((), optional=True)
        columns |= _described("image", images, config.sidecars, index, columns)
        matches = [Match("image", 0, image.path, _captures(image)) for image in chosen]
    else:
        column_of = {image.path: column for column, members in named.items() for image in members}
        matches = [Match(column_of[image.path], 0, image.path, _captures(image)) for image in chosen]
        for column in sorted({match.column for match in matches}):
            members = named[column]
            columns[column] = ImageColumn((), many=_has_several(members, row), optional=True)
            columns |= _described(column, members, config.sidecars, index, [*named, *columns])
            descriptions[column] = f"such as `{members[0].path}`"
    dataset = index.dataset_of(images[0].path)
    subjects = set()
    if row != "file" and not any(getattr(config, key) for key in FILTERS):
        children = {child for child in index.tree[dataset] if _inside(dataset, child) in index.tree}
        subjects = {child for child in children if child.startswith("sub-")} - {image.subject for image in images}
    # A derivative may leave its tables to the dataset it comes from.
    source = dataset
    while source and "participants.tsv" not in index.tree[source]:
        source = index.dataset_of(source)
    metadata_from = config.metadata_from
    if metadata_from is None:
        metadata_from = [] if of_none else _tables(source, row, index)
    lists_subjects = config.metadata_from is not None or source == dataset
    return Layout(row, columns, matches, subjects, metadata_from, lists_subjects, left_out, descriptions)


def _resolve(name: str, configs: Mapping[str, list[Image]]) -> str:
    if name in configs:
        return name
    if name == "default":
        # A root that holds nothing but datasets, as of a study: its raw one is meant.
        candidates = [
            other
            for other, images in configs.items()
            if images[0].subject is not None and "derivatives" not in images[0].path.split("/")[:-1]
        ]
        if len(candidates) == 1 or len(configs) == 1:
            return (candidates or list(configs))[0]
        raise SchemaError(f"the tree holds several datasets, say which one as the config's name: {', '.join(configs)}")
    raise SchemaError(
        f"there is no dataset {name!r} in the tree{did_you_mean(name, configs)}; it holds {', '.join(configs)}"
    )


def _joined(derivatives: Any, name: str, configs: Mapping[str, list[Image]]) -> list[str]:
    """The configs whose images are joined to the rows of config `name`."""
    others = [other for other, images in configs.items() if other != name and images[0].subject is not None]
    if derivatives is True:
        return others
    wanted = [derivatives] if isinstance(derivatives, str) else list(derivatives or [])
    for other in wanted:
        if other not in others:
            raise SchemaError(
                f"derivatives: there is no {other!r}{did_you_mean(str(other), others)} "
                f"(there {'is ' + ', '.join(others) if others else 'are none'})"
            )
    return wanted


def _filter(config: Any, images: list[Image]) -> tuple[list[Image], dict[str, str]]:
    """The images that pass the filters of the config, and why the others do not."""
    left_out: dict[str, str] = {}
    for key, get in (
        ("subjects", lambda image: image.subject),
        ("sessions", lambda image: image.session),
        ("datatypes", lambda image: image.datatype),
        ("suffixes", lambda image: image.suffix),
    ):
        wanted = wanted_labels(config, key)
        if wanted is None:
            continue
        found = sorted({get(image) for image in images} - {None, ""})
        for label in wanted:
            if label not in found:
                shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
                raise SchemaError(
                    f"{key}: no image of {label!r}{did_you_mean(label, found)} (there are {shown or 'none'})"
                )
        left_out |= {image.path: f"left out by {key}=" for image in images if get(image) not in wanted}
        images = [image for image in images if get(image) in wanted]
    if not images:
        raise SchemaError("no image passes all of the filters " + ", ".join(k for k in FILTERS if getattr(config, k)))
    return images, left_out


def wanted_labels(config: Any, key: str) -> list[str] | None:
    """What a filter of the config lets pass, with `sub-` and `ses-` before identifiers."""
    labels = getattr(config, key)
    if not labels:
        return None
    labels = [labels] if isinstance(labels, str) else list(labels)
    prefix = {"subjects": "sub-", "sessions": "ses-"}.get(key, "")
    return [prefix + str(label).removeprefix(prefix) for label in labels]


def _row_key(image: Image, row: str) -> tuple[str | None, ...]:
    return (image.subject, image.session) if row == "session" else (image.subject,)


def _by_row(images: Iterable[Image], row: str) -> Iterable[list[Image]]:
    rows = defaultdict(list)
    for image in images:
        rows[_row_key(image, row)].append(image)
    return rows.values()


def _has_several(images: Iterable[Image], row: str) -> bool:
    return any(len(members) > 1 for members in _by_row(images, row))


def _name_columns(images: list[Image], row: str) -> dict[str, list[Image]]:
    """Column -> its images."""
    alike: dict[tuple, list[Image]] = defaultdict(list)
    for image in images:
        alike[image.dataset, image.datatype, image.suffix].append(image)
    order = _entity_order(images)
    columns: dict[tuple, list[Image]] = defaultdict(list)
    for group, members in alike.items():
        telling = {"task"}
        for of_row in _by_row(members, row):
            if len(of_row) > 1:
                keys = {key for image in of_row for key in image.entities}
                telling |= {key for key in keys if len({image.entities.get(key) for image in of_row}) > 1}
        telling = [key for key in order if key in telling]
        for image in members:
            label = tuple((key, image.entities[key]) for key in telling if key in image.entities)
            columns[(*group, label)].append(image)
    names: dict[str, list[Image]] = {}
    for (dataset, datatype, suffix, labels), members in sorted(columns.items()):
        kind = [label for key, label in labels if key == "kind"]
        parts = [dataset, datatype, *(label for key, label in labels if key == "place")]
        parts += [f"{key}_{label}" for key, label in labels if key not in ("place", "words", "kind")]
        parts += [label for key, label in labels if key == "words"]
        parts += [suffix if suffix != datatype else "", *kind]
        names[_unique(_identifier("_".join(filter(None, parts))), [*_KEYS, *names])] = members
    return names


def _entity_order(images: Iterable[Image]) -> list[str]:
    """The keys of all entities that tell columns apart, in the order in which BIDS has them in a name."""
    schema = bids_schema()
    known = [schema.objects.entities[entity]["name"] for entity in schema.rules.entities]
    found = {key for image in images for key in image.entities} - {*_REPEATED, "place", "words", "kind"}
    rest = sorted(found - set(known))
    return ["place", *(key for key in known if key in found), *rest, "words", "kind"]


def _identifier(text: str) -> str:
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in text)
    return name if name and not name[0].isdigit() else f"image_{name}".rstrip("_")


def _unique(name: str, taken: Iterable[str]) -> str:
    # Tools that look at Parquet, the Hub's viewer among them, do not tell "A" from "a"; nor do some file systems.
    lower = {other.lower() for other in taken}
    candidate, number = name, 1
    while candidate.lower() in lower:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _file_columns(images: Iterable[Image]) -> list[str]:
    """The columns that say what an image is, where a row is a file."""
    images = list(images)
    found = {key for image in images for key in image.entities}
    order = _entity_order(images)
    repeated = [key for key in _REPEATED if key in found]
    always = ["dataset"] if any(image.dataset for image in images) else []
    keys = [key for key in [*order[1:-2], *repeated, "place", "words", "kind"] if key in found]
    return [*always, "datatype", "suffix", *keys]


def _captures(image: Image) -> dict[str, str]:
    captures = {"subject": image.subject, "session": image.session, "dataset": image.dataset}
    captures |= {"datatype": image.datatype, "suffix": image.suffix}
    return image.entities | {key: value for key, value in captures.items() if value}


def _described(
    column: str, images: list[Image], sidecars: bool, index: Index, taken: Iterable[str]
) -> dict[str, CompanionColumn]:
    """The columns with what lies beside the images: gradients of diffusion images, and sidecars if asked for."""
    columns: dict[str, CompanionColumn] = {}
    for extension in [".bval", ".bvec"] + [".json"] * bool(sidecars):
        if any(index.companions(image.path, extension) for image in images):
            name = extension[1:] if column == "image" else f"{column}_{extension[1:]}"
            columns[_unique(name, [*taken, *columns])] = CompanionColumn(column, extension)
    return columns


def _inside(dataset: str, name: str) -> str:
    return f"{dataset}/{name}" if dataset else name


def _tables(dataset: str, row: str, index: Index) -> list[dict[str, Any]]:
    """The tables of a dataset: who its participants are, and what was noted of their sessions."""
    tables = []
    if "participants.tsv" in index.tree[dataset]:
        tables.append({"path": _literal(_inside(dataset, "participants.tsv"))})
    sessions = Pattern(_literal(_inside(dataset, "")) + "{subject}/{subject}_sessions.tsv", anchored=True)
    if row != "subject" and any(
        sessions.match(file.path) for file in index.files if file.path.endswith("_sessions.tsv")
    ):
        tables.append({"path": sessions.text})
    return tables


def _literal(path: str) -> str:
    return path.replace("{", "{{").replace("}", "}}").replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def add_scans(layout: Layout, values: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    """Adds what `scans.tsv` says (variable -> type, path of an image -> value) as columns of the images."""
    images: dict[str, list[str]] = defaultdict(list)
    for match in layout.matches:
        images[match.column].append(match.path)
    for column in [name for name, column in layout.columns.items() if isinstance(column, ImageColumn)]:
        for variable, (dtype, of_image) in values.items():
            if any(of_image.get(path) is not None for path in images[column]):
                name = _identifier(variable) if layout.row == "file" else f"{column}_{_identifier(variable)}"
                layout.columns[_unique(name, [*_KEYS, *layout.columns])] = ScanColumn(column, dtype, of_image)
