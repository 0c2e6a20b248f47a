"""Lets `load_dataset` see the name `bids` and local builder directories. Everything else goes to stock `datasets`.

Stock `datasets` runs no scripts since 4.0, for security. So does this: a script is run only where the user names a
directory of their own disk, with a script in it that declares a `BidsBuilder`. Nothing from the Hub, or from the cache
of what came from there, is ever run.
"""

import ast
import functools
import importlib
import inspect
import os

from . import __version__, _loaded


# The modules that hold the function under their own name.
_HOLDERS = ("datasets.load", "datasets.inspect", "datasets.commands.test")


def find_script(path: str | os.PathLike) -> str | None:
    """The builder script that `path` stands for: `x/x.py` of a local directory `x`, or a local `x.py` itself.

    Returns:
        `str` or `None`: its absolute path, if it declares a `BidsBuilder` and is no file from the Hub
    """
    from datasets import config

    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    script = path if path.endswith(".py") else os.path.join(path, os.path.basename(path) + ".py")
    if not os.path.isfile(script):
        return None
    caches = [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.HF_MODULES_CACHE, config.HF_HUB_CACHE]
    caches += [config.DOWNLOADED_DATASETS_PATH]
    for name in (script, os.path.realpath(script)):
        for cache in caches:
            for root in (os.path.abspath(cache), os.path.realpath(cache)):
                if os.path.commonpath([root, name]) == root:
                    return None
    return script if _declares_bids_builder(script) else None


def _declares_bids_builder(script: str) -> bool:
    with open(script, "rb") as file:
        try:
            tree = ast.parse(file.read(), script)
        except SyntaxError as e:
            raise ValueError(f"{script}, line {e.lineno}: {e.msg}; mend the builder script") from None
    bases = [base for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases]
    return any(getattr(base, "attr", getattr(base, "id", None)) == "BidsBuilder" for base in bases)


def wrap(original):
    """`dataset_module_factory` that answers `bids` and local builder directories before `original` does."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dataset_module_factory(*args, **kwargs):
        from datasets.load import DatasetModule

        arguments = signature.bind(*args, **kwargs).arguments
        path = arguments["path"]
        if path == "bids":
            module_path, code_hash, base_path, name = f"{__package__}.bids", __version__, "", "bids"
        else:
            script = None if "://" in os.fspath(path) or arguments.get("revision") else find_script(path)
            if script is None:
                return original(*args, **kwargs)
            module_path, code_hash = _loaded.module_name(script)
            base_path, name = os.path.split(script)
            name = name.removesuffix(".py")
        builder_kwargs = {"base_path": base_path, "dataset_name": name}
        data_dir = arguments.get("data_dir")
        if data_dir is not None:
            if "://" in os.fspath(data_dir):
                raise ValueError(f"data_dir={data_dir!r}: only local directories can be read")
            builder_kwargs["data_dir"] = os.path.abspath(os.path.expanduser(os.fspath(data_dir)))
        return DatasetModule(module_path, f"{code_hash}-{__version__}", builder_kwargs)

    dataset_module_factory._datasets_bids = True
    return dataset_module_factory


def install() -> None:
    """Puts the wrapped function in the place of the original. Does nothing the second time."""
    import datasets.load

    original = datasets.load.dataset_module_factory
    if getattr(original, "_datasets_bids", False):
        return
    wrapped = wrap(original)
    for name in _HOLDERS:
        module = importlib.import_module(name)
        if getattr(module, "dataset_module_factory", None) is original:
            module.dataset_module_factory = wrapped


def uninstall() -> None:
    """Puts the original back."""
    for name in _HOLDERS:
        module = importlib.import_module(name)
        function = getattr(module, "dataset_module_factory", None)
        if getattr(function, "_datasets_bids", False):
            module.dataset_module_factory = function.__wrapped__
