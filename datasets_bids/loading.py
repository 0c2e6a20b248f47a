"""Lets `load_dataset` see the name `bids` and local builder directories. Everything else goes to stock `datasets`.

Stock `datasets` runs no scripts since 4.0, for security. So does this: a script is run only where the user names a
directory of their own disk, with a script in it that declares a `BidsBuilder`. Nothing from the Hub, or from the cache
of what came from there, is ever run.
"""

import ast
import functools
import inspect
import os
import sys
from pathlib import Path

import datasets.load
from huggingface_hub.constants import HF_HUB_CACHE

from . import __version__, _loaded
from .bids import BidsConfig
from .index import index_tree
from .layout import find_configs
from .storage import is_url


def find_script(path: str | os.PathLike) -> str | None:
    """The builder script that `path` stands for: `x/x.py` of a local directory `x`, or a local `x.py` itself.

    Returns:
        `str` or `None`: its absolute path, if it declares a `BidsBuilder` and is no file from the Hub
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    script = path if path.endswith(".py") else os.path.join(path, os.path.basename(path) + ".py")
    if not os.path.isfile(script) or _is_cached(script) or _is_cached(os.path.realpath(script)):
        return None
    return script if _declares_bids_builder(script) else None


def _is_cached(path: str) -> bool:
    caches = [HF_HUB_CACHE, datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE]
    caches += [datasets.config.HF_MODULES_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    roots = {resolve(os.path.expanduser(cache)) for cache in caches for resolve in (os.path.abspath, os.path.realpath)}
    return any(Path(path).is_relative_to(root) for root in roots)


def _declares_bids_builder(script: str) -> bool:
    with open(script, "rb") as file:
        try:
            tree = ast.parse(file.read(), script)
        except SyntaxError as e:
            raise ValueError(f"{script}, line {e.lineno}: {e.msg}; mend the builder script") from None
    bases = [base for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases]
    return any(getattr(base, "attr", getattr(base, "id", None)) == "BidsBuilder" for base in bases)


def wrap(original, lists_configs: bool = False):
    """`dataset_module_factory` that answers `bids` and local builder directories before `original` does.

    Args:
        lists_configs (`bool`): look into the tree for what configs `bids` has, as the functions of `datasets.inspect` ask
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dataset_module_factory(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        path = arguments["path"]
        if path == "bids":
            module_path, code_hash, base_path, name = f"{__package__}.bids", __version__, "", "bids"
        else:
            script = None if is_url(os.fspath(path)) or arguments.get("revision") else find_script(path)
            if script is None:
                return original(*args, **kwargs)
            module_path, code_hash = _loaded.module_name(script)
            base_path, name = os.path.split(script)
            name = name.removesuffix(".py")
        builder_kwargs = {"base_path": base_path, "dataset_name": name}
        parameters = datasets.load.BuilderConfigsParameters()
        data_dir = arguments.get("data_dir")
        if data_dir is not None:
            data_dir = os.fspath(data_dir)
            if not is_url(data_dir):
                data_dir = os.path.abspath(os.path.expanduser(data_dir))
            builder_kwargs["data_dir"] = data_dir
            if path == "bids" and lists_configs:
                options = getattr(arguments.get("download_config"), "storage_options", None)
                configs = [BidsConfig(name=config) for config in find_configs(index_tree(data_dir, options))]
                parameters = datasets.load.BuilderConfigsParameters(
                    builder_configs=configs or None, default_config_name=configs[0].name if configs else None
                )
        return datasets.load.DatasetModule(module_path, f"{code_hash}-{__version__}", builder_kwargs, parameters)

    dataset_module_factory._datasets_bids = True
    return dataset_module_factory


def _holders():
    """The loaded modules that hold the function by name; those loaded later copy what `datasets.load` has by then."""
    names = ("datasets.load", "datasets.inspect", "datasets.commands.test")
    return [sys.modules[name] for name in names if hasattr(sys.modules.get(name), "dataset_module_factory")]


def install() -> None:
    """Puts the wrapped function in the place of the original. Does nothing the second time."""
    original = datasets.load.dataset_module_factory
    if getattr(original, "_datasets_bids", False):
        return
    wrapped, listing = wrap(original), wrap(original, lists_configs=True)
    for module in _holders():
        if module.dataset_module_factory is original:
            module.dataset_module_factory = listing if module.__name__ == "datasets.inspect" else wrapped


def uninstall() -> None:
    """Puts the original back."""
    for module in _holders():
        module.dataset_module_factory = getattr(
            module.dataset_module_factory, "__wrapped__", module.dataset_module_factory
        )
