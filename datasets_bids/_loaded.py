"""Builder scripts as importable modules, named `datasets_bids._loaded.d_<directory>_<hash>.<name>`.

The name says where the script lies, so that a process that only unpickles a builder (a spawned DataLoader worker) can
import it too, and two scripts of the same name do not meet. Importing this package is what makes such names importable.
"""

import base64
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


# What makes this module a package, of modules that only the finder below finds.
__path__: list[str] = []

_PREFIX = __name__ + "."


def module_name(script: str) -> tuple[str, str]:
    """(importable name, hash of the code) of a builder script.

    Args:
        script (`str`): absolute path of the script
    """
    directory, filename = os.path.split(script)
    digest = hashlib.sha256()
    for name in sorted(os.listdir(directory)):
        if name.endswith((".py", ".yaml", ".yml", ".json")):
            with open(os.path.join(directory, name), "rb") as file:
                digest.update(name.encode() + b"\0" + file.read())
    code_hash = digest.hexdigest()[:16]
    where = base64.b32encode(os.fsencode(directory)).decode().rstrip("=")
    return f"{_PREFIX}d_{where}_{code_hash}.{filename.removesuffix('.py')}", code_hash


class _SourceLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        # Not by way of __pycache__: it would serve the old code of a script that was edited twice within a second.
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_PREFIX):
            return None
        package, _, name = fullname[len(_PREFIX) :].partition(".")
        if not name:
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        where = package.removeprefix("d_").rpartition("_")[0]
        directory = os.fsdecode(base64.b32decode(where + "=" * (-len(where) % 8)))
        script = os.path.join(directory, name + ".py")
        if not os.path.isfile(script):
            return None
        return importlib.util.spec_from_file_location(fullname, script, loader=_SourceLoader(fullname, script))


sys.meta_path.append(_Finder())
