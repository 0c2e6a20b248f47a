"""`python -m datasets_bids.push BUILDER --data-dir TREE`: options in, words and progress out."""

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import yaml

from . import loading
from .card import builder_card
from .hub import PushPlan, plan_push, push_to_directory, size
from .pictures import ROW_NBYTES
from .upload import HubPush, Workers, dask_executor, make_target
from .validation import refuse_exposure


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datasets_bids.push", description="Push a tree of brain images as a dataset."
    )
    parser.add_argument("builder", help="a builder directory, such as builders/isles24, or the name bids")
    parser.add_argument("--data-dir", required=True, help="root of the tree")
    parser.add_argument("--config", help="name of the builder's config; for bids, of a dataset in the tree")
    parser.add_argument("--schema", help="for bids: a YAML file with schema, row, metadata_from and splits")
    parser.add_argument("--row", help="for bids: subject, session or file (default: session where there are any)")
    for what, example in (("subjects", "01"), ("sessions", "baseline"), ("datatypes", "anat"), ("suffixes", "T1w")):
        parser.add_argument(f"--{what}", nargs="+", metavar=what.upper(), help=f"take only these, such as {example}")
    parser.add_argument(
        "--derivatives", nargs="+", metavar="NAME", help="for bids: join the images of these to the rows"
    )
    parser.add_argument(
        "--sidecars", action="store_true", default=None, help="for bids: a column of each image's JSON"
    )
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for a data dir in a bucket, such as anon=true; may be given several times",
    )
    parser.add_argument("--output-dir", help="write the repository into this directory")
    parser.add_argument("--repo-id", help="push to this dataset on the Hub, such as hugging-science/isles24-stroke")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="push to a new pull request")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that embed and upload shards (default: 1)")
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="let an existing Dask cluster do it, such as tcp://scheduler:8786"
    )
    parser.add_argument(
        "--affirm-defaced",
        action="store_true",
        help="for a public push of anatomical images: they are defaced, or shared with the participants' explicit consent",
    )
    parser.add_argument(
        "--allow-identity-fields",
        action="store_true",
        help="push to a public repository although names, dates, serial numbers or ages above 89 were found",
    )
    parser.add_argument("--verify-only", action="store_true", help="compare what is on the Hub with the tree, no more")
    parser.add_argument("--abort", action="store_true", help="remove what an unfinished push left, no more")
    parser.add_argument("--dry-run", action=argparse.BooleanOptionalAction, help="build and plan, but write nothing")
    parser.add_argument(
        "--preview",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add a config of pictures of the same rows, for the Hub's viewer (default: yes)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--max-shard-size", help="bound of a shard's size (default: 500MB)")
    size.add_argument("--num-shards", type=int, help="number of shards of each split")
    options = parser.parse_args(args)
    if not options.dry_run and not options.output_dir and not options.repo_id:
        parser.error("say where to: --repo-id ORG/NAME, --output-dir DIR, or --dry-run")
    if options.output_dir and options.repo_id:
        parser.error("--repo-id and --output-dir are two pushes; choose one")
    if options.num_proc < 1:
        parser.error("--num-proc is at least 1")
    if not options.repo_id:
        needs_hub = ("private", "revision", "create_pr", "dask", "verify_only", "abort")
        for name in (*needs_hub, "affirm_defaced", "allow_identity_fields"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} goes with --repo-id")
    return options


def load_builder(options: argparse.Namespace, **kwargs: Any) -> datasets.DatasetBuilder:
    """The builder that the options name; without a `data_dir`, what it declares."""
    if options.builder != "bids" and loading.find_script(options.builder) is None:
        raise ValueError(
            f"{options.builder}: is no builder directory (NAME/ with a NAME.py that declares a BidsBuilder), nor the name bids"
        )
    config = {}
    if options.schema:
        with open(options.schema, encoding="utf-8") as file:
            try:
                config = yaml.safe_load(file)
            except yaml.YAMLError as e:
                raise ValueError(f"{options.schema}: is no YAML ({e})") from e
        if not isinstance(config, dict):
            raise ValueError(f"{options.schema}: expected the keys schema, row, metadata_from and splits")
    for key in ("row", "subjects", "sessions", "datatypes", "suffixes", "derivatives", "sidecars"):
        if getattr(options, key, None) is not None:
            config[key] = getattr(options, key)
    storage_options = {}
    for option in getattr(options, "storage_option", ()):
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"--storage-option {option}: expected KEY=VALUE, such as anon=true")
        storage_options[key] = yaml.safe_load(value)
    return datasets.load_dataset_builder(
        options.builder, options.config, storage_options=storage_options or None, **config, **kwargs
    )


def build(options: argparse.Namespace) -> datasets.DatasetBuilder:
    """The builder with its rows of paths prepared."""
    builder = load_builder(options, data_dir=options.data_dir)
    builder.download_and_prepare()
    return builder


def describe(plan: PushPlan, unused_images: Mapping[str, str]) -> list[str]:
    """What the push will write, a line each."""
    subjects, images, nulls = set(), 0, {}
    for dataset in plan.splits.values():
        table = dataset.data.table
        subjects.update(table.column("subject_id").drop_null().to_pylist())
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
    if plan.preview:
        lines.append(
            f"Preview: config {plan.preview_name} with pictures of the same {rows} rows, at most {size(rows * ROW_NBYTES)} "
            "(--no-preview leaves it out)"
        )
    if any(nulls.values()):
        lines.append(
            "Null: " + ", ".join(f"{name} {count}" for name, count in nulls.items() if count) + f" of {rows} rows"
        )
    for reason, count in Counter(unused_images.values()).items():
        first = next(image for image, why in unused_images.items() if why == reason)
        lines.append(f"Images in no column of this config: {count}, such as {first} ({reason})")
    return lines


def push_to_hub(plan: PushPlan, options: argparse.Namespace, builder: datasets.DatasetBuilder) -> None:
    push = HubPush(
        plan,
        make_target(options.repo_id, options.revision, options.create_pr),
        builder_card(builder),
        options={"num_shards": options.num_shards, "max_shard_size": options.max_shard_size},
        private=options.private,
        private_because=builder.PRIVATE_BECAUSE,
    )
    repo_id = push.target.repo_id
    if options.abort:
        print("\n".join(push.abort()))
    elif options.verify_only:
        push.verify_only()
        print(f"{repo_id} is what the tree gives: {len(push.shards)} shards, first and last example read back.")
    else:
        if push.will_be_public():
            refuse_exposure(
                plan.splits, defaced=options.affirm_defaced, allow_identity_fields=options.allow_identity_fields
            )
        with dask_executor(options.dask) if options.dask else contextlib.nullcontext() as executor:
            commit = push.run(Workers(options.num_proc, executor))
        print(f"Done and verified: {commit.pr_url or commit.commit_url}")
        print(
            f"Load it with load_dataset({repo_id!r}{'' if plan.config_name == 'default' else f', {plan.config_name!r}'})"
        )


def main(args: list[str] | None = None) -> int:
    options = parse_args(args)
    try:
        builder = build(options)
        splits = builder.as_dataset()
        preview = (builder.config.preview or {}) if options.preview else None
        plan = plan_push(splits, builder.config.name, options.max_shard_size, options.num_shards, preview)
        print("\n".join(describe(plan, builder.unused_images)), flush=True)
        if options.dry_run:
            print("Dry run complete. Dataset built but not pushed.")
            return 0
        if options.repo_id:
            push_to_hub(plan, options, builder)
            return 0
        push_to_directory(plan, options.output_dir, builder_card(builder))
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    print(f"Wrote {Path(options.output_dir)}; load it with load_dataset({options.output_dir!r})")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Uploads that are in the middle after an error or Ctrl-C are not waited for: a push can be killed anywhere.
    os._exit(status)
