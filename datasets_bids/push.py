"""`python -m datasets_bids.push BUILDER --data-dir TREE`: options in, words and progress out."""

import argparse
import sys
from pathlib import Path

import datasets
import yaml

from .card import builder_card
from .hub import PushPlan, plan_push, push_to_directory


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datasets_bids.push", description="Push a tree of brain images as a dataset."
    )
    parser.add_argument("builder", help="a builder directory, such as builders/isles24, or the name bids")
    parser.add_argument("--data-dir", required=True, help="root of the tree")
    parser.add_argument("--config", help="name of the builder's config")
    parser.add_argument("--schema", help="for bids: a YAML file with schema, row, metadata_from and splits")
    parser.add_argument("--output-dir", help="write the repository into this directory")
    parser.add_argument("--dry-run", action=argparse.BooleanOptionalAction, help="build and plan, but write nothing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-shard-size", help="bound of a shard's size (default: 500MB)")
    size.add_argument("--num-shards", type=int, help="number of shards of each split")
    options = parser.parse_args(args)
    if not options.dry_run and not options.output_dir:
        parser.error("say where to: --output-dir DIR, or --dry-run")
    return options


def build(options: argparse.Namespace) -> datasets.DatasetBuilder:
    """The builder with its rows of paths prepared."""
    config = {}
    if options.schema:
        with open(options.schema, encoding="utf-8") as file:
            try:
                config = yaml.safe_load(file)
            except yaml.YAMLError as e:
                raise ValueError(f"{options.schema}: is no YAML ({e})") from e
        if not isinstance(config, dict):
            raise ValueError(f"{options.schema}: expected the keys schema, row, metadata_from and splits")
    builder = datasets.load_dataset_builder(options.builder, options.config, data_dir=options.data_dir, **config)
    builder.download_and_prepare()
    return builder


def describe(plan: PushPlan, unused_images: list[str]) -> list[str]:
    """What the push will write, a line each."""
    subjects, images, nulls = set(), 0, {}
    for dataset in plan.splits.values():
        table = dataset.data.table
        subjects.update(table.column("subject_id").to_pylist())
        for name, feature in dataset.features.items():
            column = table.column(name)
            nulls[name] = nulls.get(name, 0) + column.null_count
            if isinstance(feature, datasets.Nifti):
                images += len(column) - column.null_count
            elif isinstance(getattr(feature, "feature", None), datasets.Nifti):
                images += sum(len(chunk.flatten()) for chunk in column.chunks)
    rows = sum(len(dataset) for dataset in plan.splits.values())
    shards = ", ".join(f"{len(shards)} of {split}" for split, shards in plan.shards.items())
    lines = [
        f"Found {len(subjects)} subjects",
        f"Config {plan.config_name}: {rows} rows, {images} images, {size(plan.nbytes)}; largest row {size(plan.largest_row)}",
        f"Shards: {shards}",
    ]
    if any(nulls.values()):
        lines.append("Null: " + ", ".join(f"{name} in {count} rows" for name, count in nulls.items() if count))
    if unused_images:
        lines.append(f"Images in no column of this config: {len(unused_images)}, such as {unused_images[0]}")
    return lines


def size(nbytes: float) -> str:
    """Bytes for a reader: `98.7 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            break
        nbytes /= 1000
    else:
        unit = "TB"
    return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"


def main(args: list[str] | None = None) -> int:
    options = parse_args(args)
    try:
        builder = build(options)
        splits = builder.as_dataset()
        plan = plan_push(splits, builder.config.name, options.max_shard_size, options.num_shards)
        print("\n".join(describe(plan, builder.unused_images)), flush=True)
        if options.dry_run:
            print("Dry run complete. Dataset built but not pushed.")
            return 0
        push_to_directory(plan, options.output_dir, builder_card(builder))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    print(f"Wrote {Path(options.output_dir)}; load it with load_dataset({options.output_dir!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
