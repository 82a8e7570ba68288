"""Makes Python a bare host: packages that a GPU machine may lack are not found.

Python imports a module of this name at its start if its folder is on PYTHONPATH.
"""

import os
import sys
from importlib.machinery import PathFinder
from typing import Any

BLOCKED = os.environ.get(
    "BLOCKED_PACKAGES", "mpi4py,heat,propulate,pydantic,rich,scipy,sklearn,matplotlib,jinja2"
).split(",")


class BareFinder(PathFinder):
    """Finds what lies on the path, but for blocked packages."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Find a module, as if blocked packages were not installed."""
        if fullname.partition(".")[0] in BLOCKED:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[:] = [BareFinder if finder is PathFinder else finder for finder in sys.meta_path]
