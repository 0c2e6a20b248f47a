"""Where a dataset goes: a directory with the layout of a Hub repository.

How it works:

- The plan (rows of every shard, bytes of every row) is made before anything is written.
- A shard is written to a hidden directory beside the data, under a temporary name, and renamed when it is whole. Its name
  there tells what is in it (sources with size and time, values, features), so a shard that an earlier run finished is
  recognised, and one whose sources changed since is not.
- When all shards are there, they are renamed into place, what an earlier push left over goes, and the card is written
  last.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import tqdm
from huggingface_hub import DatasetCard

from . import __version__
from .card import is_preview, remove_config, update_card
from .embed import write_shard
from .nifti import refuse_image
from .pictures import Preview, beside
from .shards import Shard, embedded_nbytes, plan_shards, table_leaves
from .storage import stamp


# The hidden directory of shards that are not in place yet; load_dataset looks into no hidden directory.
_STAGING = ".datasets-bids"


@dataclass(frozen=True)
class PushPlan:
    """What a push will write.

    Attributes:
        config_name (`str`): the config
        splits (`dict[str, Dataset]`): split -> rows of paths
        shards (`dict[str, list[Shard]]`): split -> its shards
        largest_row (`int`): bytes
        preview (`Preview`, *optional*): what the config of pictures beside this one shows
    """

    config_name: str
    splits: Mapping[str, datasets.Dataset]
    shards: Mapping[str, list[Shard]]
    largest_row: int
    preview: Preview | None = None

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shards in self.shards.values() for shard in shards)

    @property
    def directory(self) -> str:
        """Directory of the shards in the repository, as `Dataset.push_to_hub` names it."""
        return "data" if self.config_name == "default" else self.config_name

    def path_in_repo(self, split: str, shard: Shard) -> str:
        return f"{self.directory}/{split}-{shard.index:05d}-of-{shard.num_shards:05d}.parquet"

    @property
    def preview_name(self) -> str:
        """Config (and directory) of the pictures."""
        return "preview" if self.config_name == "default" else f"{self.config_name}-preview"

    def preview_path(self, path: str) -> str:
        """Of the shard with a path in the repository, the preview's path."""
        return f"{self.preview_name}/{path.rpartition('/')[2]}"

    def data_files(self) -> dict[str, str]:
        """Split -> glob of its shards."""
        return {split: f"{self.directory}/{split}-*" for split in self.splits}


def plan_push(
    splits: Mapping[str, datasets.Dataset],
    config_name: str = "default",
    max_shard_size: int | str | None = None,
    num_shards: int | None = None,
    preview: Mapping[str, Any] | None = None,
) -> PushPlan:
    """Measures every file, looks at every image's header, and plans the shards. Reads no volume.

    Args:
        preview (`dict`, *optional*): see `BidsConfig.preview`, `{}` if it says nothing; without it no pictures are made

    Raises:
        ValueError: files that cannot be stored, all of them by name
    """
    nbytes, refused = {}, []
    for split, dataset in splits.items():
        try:
            nbytes[split] = embedded_nbytes(dataset, inspect=refuse_image)
        except ValueError as e:
            refused.append(f"split {split!r}: {e}" if len(splits) > 1 else str(e))
    if refused:
        raise ValueError("\n".join(refused))
    shards = {split: plan_shards(nbytes[split], max_shard_size, num_shards) for split in splits}
    largest_row = max((int(sizes.max()) for sizes in nbytes.values() if len(sizes)), default=0)
    shown = None if preview is None else Preview.of(splits, preview)
    if shown is not None and is_preview(config_name):
        raise ValueError(f"config {config_name!r} has the name of a preview: rename it, or push with --no-preview")
    return PushPlan(config_name, splits, shards, largest_row, shown)


def push_to_directory(plan: PushPlan, output_dir: str | os.PathLike, card: DatasetCard) -> None:
    """Writes the shards and the card into a directory with the layout of the Hub repository.

    Killed anywhere and started again, it goes on with the shards that are not finished. Other configs in the directory
    are left alone; a config of the same name is replaced.

    Args:
        plan (`PushPlan`): what to write
        output_dir (`str` or `os.PathLike`): created if it is not there
        card (`DatasetCard`): the builder's card

    Raises:
        OSError: the disk is full, or the directory cannot be written
        ValueError: a file changed while it was read
    """
    output_dir = Path(output_dir).expanduser().absolute()
    staging = output_dir / _STAGING / plan.directory
    staging.mkdir(parents=True, exist_ok=True)
    staged = {
        (split, shard): staging / f"{fingerprint(dataset, shard)}.parquet"
        for split, dataset in plan.splits.items()
        for shard in plan.shards[split]
    }
    previews = {key: path.with_suffix(f".{plan.preview.key}") for key, path in staged.items()} if plan.preview else {}
    for leftover in set(staging.iterdir()) - {*staged.values(), *previews.values()}:
        leftover.unlink()
    todo = {key: path for key, path in staged.items() if not path.exists()}
    needed = sum(shard.nbytes for _, shard in todo)
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise OSError(f"{output_dir}: {needed:,} bytes are to be written and {free:,} are free; choose another disk")
    files = {(split, shard): count_files(plan.splits[split], shard) for split, shard in staged}
    files_done, files_total = 0, sum(files.values())
    with progress_bar(plan.nbytes) as bar:
        bar.update(plan.nbytes - needed)
        for done, (key, path) in enumerate(staged.items()):
            (split, shard), dataset = key, plan.splits[key[0]]
            bar.set_postfix_str(f"{files_done} of {files_total} files, shard {done + 1} of {len(staged)}")
            files_done += files[key]
            with contextlib.ExitStack() as stack:
                if plan.preview and not previews[key].exists():
                    draw = partial(plan.preview.write, dataset, shard.start, shard.stop)
                    stack.enter_context(beside(lambda stop: _write_whole(previews[key], partial(draw, stop=stop))))
                if key in todo:
                    _write_whole(path, lambda temporary: write_shard(dataset, shard, temporary, progress=bar.update))
    placed = {}
    for (split, shard), path in staged.items():
        in_repo = plan.path_in_repo(split, shard)
        placed[in_repo] = path
        if plan.preview:
            placed[plan.preview_path(in_repo)] = previews[split, shard]
    for directory in (plan.directory, plan.preview_name):
        for old in (output_dir / directory).glob("*.parquet"):
            if f"{directory}/{old.name}" not in placed:
                old.unlink()
    sizes = {}
    for in_repo, path in placed.items():
        sizes[in_repo] = path.stat().st_size
        (output_dir / in_repo).parent.mkdir(exist_ok=True)
        os.replace(path, output_dir / in_repo)
    if plan.preview is None:
        with contextlib.suppress(OSError):  # there is none, or it holds something else
            (output_dir / plan.preview_name).rmdir()
    readme = output_dir / "README.md"
    updated = DatasetCard.load(readme) if readme.exists() else None
    for info, data_files in config_infos(plan, sizes):
        updated = update_card(card, updated, info, data_files)
    if plan.preview is None:
        updated = remove_config(updated, plan.preview_name)
    _write_whole(readme, lambda temporary: Path(temporary).write_text(str(updated), encoding="utf-8"))
    shutil.rmtree(output_dir / _STAGING, ignore_errors=True)


def config_infos(plan: PushPlan, sizes: Mapping[str, int]) -> list[tuple[datasets.DatasetInfo, dict[str, str]]]:
    """What the card says of the config and of its preview: (info, split -> glob of its shards).

    Args:
        sizes (`dict[str, int]`): path in the repository -> bytes of the file
    """
    main = {plan.path_in_repo(split, shard): split for split, shards in plan.shards.items() for shard in shards}
    infos = [(dataset_info(plan, sum(sizes.get(path, 0) for path in main)), plan.data_files())]
    if plan.preview:
        info = datasets.DatasetInfo(config_name=plan.preview_name, features=plan.preview.features)
        info.splits = datasets.SplitDict()
        for split, dataset in plan.splits.items():
            nbytes = sum(sizes.get(plan.preview_path(path), 0) for path, of in main.items() if of == split)
            info.splits.add(datasets.SplitInfo(split, num_bytes=nbytes, num_examples=len(dataset)))
        info.download_size = info.dataset_size = sum(split.num_bytes for split in info.splits.values())
        infos.append((info, {split: f"{plan.preview_name}/{split}-*" for split in plan.splits}))
    return infos


def dataset_info(plan: PushPlan, download_size: int) -> datasets.DatasetInfo:
    """What the card says of a config: features, rows and bytes of its splits."""
    first = next(iter(plan.splits.values()))
    info = first.info.copy()
    info.config_name = plan.config_name
    info.features = first.features
    info.splits = datasets.SplitDict()
    for split, dataset in plan.splits.items():
        nbytes = sum(shard.nbytes for shard in plan.shards[split])
        info.splits.add(datasets.SplitInfo(split, num_bytes=nbytes, num_examples=len(dataset)))
    info.download_size = download_size
    info.dataset_size = plan.nbytes
    info.download_checksums = None
    return info


def fingerprint(dataset: datasets.Dataset, shard: Shard) -> str:
    """Tells two shards apart whose files would differ, by values, paths, sizes and times. Reads no volume."""
    digest = hashlib.sha256(f"{__version__} {dataset.features} {shard}".encode())
    rows = dataset.with_format("arrow")[shard.start : shard.stop]
    # Few rows at a time: they may hold images.
    for row in (row for batch in rows.to_batches(max_chunksize=16) for row in batch.to_pylist()):
        digest.update(repr(row).encode(errors="surrogateescape"))
        for path in _paths(row):
            digest.update(stamp(path).encode())
    return digest.hexdigest()[:32]


def _paths(value: object) -> list[str]:
    if isinstance(value, Mapping):
        own = [value["path"]] if isinstance(value.get("path"), str) and value.get("bytes", b"") is None else []
        return own + [path for item in value.values() for path in _paths(item)]
    return [path for item in value for path in _paths(item)] if isinstance(value, list) else []


def _write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Writes under a temporary name and renames, so that a file with its own name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def count_files(dataset: datasets.Dataset, shard: Shard) -> int:
    """Values of a shard that hold a file."""
    table = dataset.with_format("arrow")[shard.start : shard.stop]
    return sum(len(leaf.values) - leaf.values.null_count for leaf in table_leaves(table, dataset.features, 0))


def progress_bar(total: int) -> tqdm:
    """Bytes done, of how many, and the time left."""
    return tqdm(total=total, unit="B", unit_scale=True, desc="Embedding")


def size(nbytes: float) -> str:
    """Bytes for a reader: `98.7 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            break
        nbytes /= 1000
    else:
        unit = "TB"
    return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
