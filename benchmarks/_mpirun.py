"""How benchmarks start several processes."""

import shutil
import sys
from pathlib import Path


def mpirun(count: int, *arguments: str) -> list[str]:
    """Return the command of this Python under the mpirun that lies beside it, or the PATH's."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    return [found, "-n", str(count), sys.executable, *arguments]
