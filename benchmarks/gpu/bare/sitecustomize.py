"""Put this folder on PYTHONPATH, and packages that a bare GPU host lacks cannot be imported.

BLOCKED_PACKAGES names others, separated by commas.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MISSING = "mpi4py,heat,propulate,pydantic,rich,scipy,sklearn,matplotlib,jinja2"
"""What a host with torch, timm, h5py and numpy need not have."""


class Blocked(MetaPathFinder):
    """Finds none of some packages, wherever they are installed."""

    def __init__(self, packages: set[str]) -> None:
        """Block these top-level packages."""
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise the error of a package that is not installed."""
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


sys.meta_path.insert(0, Blocked(set(os.environ.get("BLOCKED_PACKAGES", MISSING).split(","))))
