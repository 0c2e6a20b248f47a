"""`python -m datasets_bids.validate BUILDER --data-dir TREE`: options in, a table out."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator

from .index import index_tree
from .push import load_builder
from .schema import SchemaError
from .validation import Built, ValidationResult, parse_expected, validate_repository, validate_tree


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datasets_bids.validate",
        description="Check a tree of brain images before a push, or a repository after it. Exits with 1 if a check fails.",
    )
    parser.add_argument("builder", help="a builder directory, such as builders/isles24, or the name bids")
    parser.add_argument("--data-dir", help="root of the tree")
    parser.add_argument(
        "--repo-id", help="a pushed dataset on the Hub: take the same counts there, without its volumes"
    )
    parser.add_argument("--output-dir", help="a pushed dataset in a directory, likewise")
    parser.add_argument("--config", help="name of the builder's config")
    parser.add_argument("--schema", help="for bids: a YAML file with schema, row, metadata_from, splits and expected")
    parser.add_argument("--deep", action="store_true", help="inflate every compressed file and compare its checksum")
    parser.add_argument("--archive", help="the archive that the tree was unpacked from, to compare its MD5")
    parser.add_argument(
        "--bids", action="store_true", help="ask the reference validator whether the tree is valid BIDS"
    )
    parser.add_argument("--json", action="store_true", help="write JSON, with everything that was found")
    options = parser.parse_args(args)
    if sum(map(bool, (options.data_dir, options.repo_id, options.output_dir))) != 1:
        parser.error("say what to check: --data-dir DIR, --repo-id ORG/NAME or --output-dir DIR")
    if options.data_dir and "://" in options.data_dir:
        parser.error("--data-dir is a local directory: check a copy of the tree, or what was pushed with --repo-id")
    if not options.data_dir:
        for name in ("deep", "archive", "bids"):
            if getattr(options, name):
                parser.error(f"--{name} goes with --data-dir")
    return options


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What the builder warns of, for the table instead of the screen."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(__package__)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def check_tree(options: argparse.Namespace) -> ValidationResult:
    index = index_tree(options.data_dir)
    config, error = None, None
    try:
        config = load_builder(options).config
    except SchemaError as e:  # the name bids without a schema has nothing to declare, but its tree can be checked
        error = str(e)
    expected = parse_expected(config.expected if config is not None else None)
    with collected_warnings() as warnings:
        try:
            builder = load_builder(options, data_dir=options.data_dir)
            build = Built(expected, builder.info.features, builder._rows, warnings=tuple(warnings))
        except (ValueError, OSError) as e:
            build = Built(expected, error=error or str(e), warnings=tuple(warnings))
    return validate_tree(index, build, deep=options.deep, archive=options.archive, bids=options.bids)


def check_repository(options: argparse.Namespace) -> ValidationResult:
    config = load_builder(options).config
    expected = parse_expected(config.expected)
    return validate_repository(options.repo_id or options.output_dir, config.name, expected, config.schema or ())


def main(args: list[str] | None = None) -> int:
    options = parse_args(args)
    # It tells what it mends in a header, but not in which.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    try:
        result = check_tree(options) if options.data_dir else check_repository(options)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_dict(), indent=1) if options.json else result.summary())
    return 0 if result.all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
