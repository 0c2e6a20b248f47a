"""Which names of `datasets` are replaced, why, and how to put them back.

How it works:

- A `Patch` names one method or function of `datasets`, the one-line defect, and a probe that shows the defect by calling it.
- Each module of this package that mends something lists its patches in a tuple `PATCHES`; `apply` collects them.
- `apply` replaces what the installed release lacks and nothing else. A function is replaced in every `datasets` module that
  imported it by name.
- On a release newer than the newest tested one, a name is touched only if its signature is still one the replacement understands.
- Datasets and features that are pickled while patches are in force apply them where they are unpickled: worker processes that are
  spawned (`DataLoader`, `map(num_proc=...)`) need no import of this package.
- `undo` puts every original back.
"""

import copyreg
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import datasets
from packaging.version import Version


NEWEST_TESTED = Version("5.2.0")

_MODULES = ("nifti", "stock")
"""Modules of this package that may define `PATCHES`."""


@dataclass(frozen=True)
class Patch:
    """One name of `datasets` that is replaced when the installed release needs it.

    Attributes:
        target: `"module:name"` or `"module:Class.name"`, e.g. `"datasets.table:embed_table_storage"`.
        replace: Takes the original (the raw attribute; `None` if the release has none) and returns what stands in its place,
            or `None` if the original is not one it understands.
        needed: The behaviour probe: True if the installed release has the defect. Called once, before anything is replaced;
            it must be cheap (milliseconds, no files). A probe that raises counts as True on tested releases.
        defect: The defect in one line.
        adds: The name is missing from some releases and is to be added there. Without it, a missing name is left alone.
    """

    target: str
    replace: Callable[[Any], Any]
    needed: Callable[[], bool]
    defect: str
    adds: bool = False


@dataclass(frozen=True)
class Applied:
    """A patch in force: `owner.name` was `original` (`None` if it was not there) and is now `replacement`."""

    patch: Patch
    owner: Any
    name: str
    original: Any
    replacement: Any


_applied: list[Applied] = []
_warned = False


def patches() -> tuple[Patch, ...]:
    """All patches that this package knows, needed or not."""
    found: list[Patch] = []
    for name in _MODULES:
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ModuleNotFoundError as e:
            if e.name != f"{__package__}.{name}":
                raise
            continue
        found.extend(getattr(module, "PATCHES", ()))
    return tuple(found)


def applied() -> tuple[Patch, ...]:
    """The patches in force."""
    return tuple(a.patch for a in _applied)


def apply(selected: Iterable[Patch] | None = None) -> None:
    """Replace what the installed `datasets` lacks. Calling it again changes nothing.

    Args:
        selected: Only these patches. By default all that this package knows.
    """
    global _warned
    in_force = set(applied())
    todo = [p for p in (patches() if selected is None else selected) if p not in in_force]
    unknown = Version(datasets.__version__) > NEWEST_TESTED
    # All probes run before the first replacement, so that none sees a half-patched library.
    found: list[Applied] = []
    skipped: list[str] = []
    for patch in todo:
        located = _locate(patch.target)
        if located is None:
            continue
        owner, name, original = located
        if original is None and not patch.adds:
            continue
        if original is not None and not _is_needed(patch, unknown):
            continue
        replacement = patch.replace(original)
        if replacement is None or (unknown and original is not None and not _understands(replacement, original)):
            skipped.append(patch.target)
            continue
        found.append(Applied(patch, owner, name, original, replacement))
    for a in found:
        setattr(a.owner, a.name, a.replacement)
    _swap_copies({id(a.original): a.replacement for a in found if inspect.ismodule(a.owner)})
    _applied.extend(found)
    if _applied:
        for cls in _CARRIERS:
            copyreg.pickle(cls, _reduce)
    if unknown and (found or skipped) and not _warned:
        _warned = True
        left = f"; left alone because they changed: {', '.join(skipped)}" if skipped else ""
        warnings.warn(
            f"datasets {datasets.__version__} is newer than {NEWEST_TESTED}, the newest release datasets_bids was tested "
            f"with. Replaced: {', '.join(a.patch.target for a in found) or 'nothing'}{left}.",
            stacklevel=2,
        )


def undo() -> None:
    """Put every original back."""
    for a in reversed(_applied):
        if a.original is None:
            delattr(a.owner, a.name)
        else:
            setattr(a.owner, a.name, a.original)
    _swap_copies(
        {id(a.replacement): a.original for a in _applied if inspect.ismodule(a.owner) and a.original is not None}
    )
    _applied.clear()
    for cls in _CARRIERS:
        if copyreg.dispatch_table.get(cls) is _reduce:
            del copyreg.dispatch_table[cls]


_CARRIERS = (datasets.Dataset, datasets.IterableDataset, datasets.Features)
"""What reaches a worker process if anything of `datasets` does."""


def _reduce(obj: Any) -> tuple:
    rebuild, args, *rest = obj.__reduce_ex__(4)
    return _rebuild, (rebuild, args), *rest


def _rebuild(rebuild: Callable, args: tuple) -> Any:
    # To find this function a worker process imports the package, which applies the patches. Not more than that: every
    # `Dataset.features` is a deep copy and comes through here.
    return rebuild(*args)


def _locate(target: str) -> tuple[Any, str, Any] | None:
    """The owner, the name and the raw attribute (not bound, `staticmethod` kept) that `target` names."""
    module_name, _, qualname = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    *parents, name = qualname.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
        if owner is None:
            return None
    return owner, name, vars(owner).get(name)


def _is_needed(patch: Patch, unknown: bool) -> bool:
    try:
        return bool(patch.needed())
    except Exception:
        # What a probe calls may have moved in a release nobody has tested: leave that alone.
        return not unknown


def _understands(replacement: Any, original: Any) -> bool:
    """True if `replacement` takes every parameter that `original` takes."""
    if isinstance(original, staticmethod | classmethod) or isinstance(replacement, staticmethod | classmethod):
        if type(original) is not type(replacement):
            return False
        original, replacement = original.__func__, replacement.__func__
    if not callable(original):
        return False
    theirs = inspect.signature(original, follow_wrapped=False).parameters
    ours = inspect.signature(replacement, follow_wrapped=False).parameters
    if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
        return True
    named = [name for name, p in theirs.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named == [name for name in ours if name in named]


def _swap_copies(new_by_id: dict[int, Any]) -> None:
    """Replace objects in every `datasets` module: `from .table import embed_table_storage` makes copies of the reference."""
    if not new_by_id:
        return
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("datasets.") and module is not None:
            for name, value in list(vars(module).items()):
                if id(value) in new_by_id:
                    setattr(module, name, new_by_id[id(value)])
