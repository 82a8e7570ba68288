"""The programs in examples/, what docs/integrations.md says of them, and how they are run."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from support.documentation import ROOT, blocks

from oialr.compatibility import import_torchvision

PAGE = "docs/integrations.md"
TIMEOUT = 300


def need_framework(name: str) -> None:
    """Skip a module of tests where a framework is not installed, and let it find torchvision."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    import_torchvision()


def added_lines(name: str) -> list[str]:
    """Return the lines of an example that its author had to add for the method."""
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    return [line.strip() for mark, line in pairwise(lines) if mark.strip() == "# added:"]


def described(command: str) -> tuple[list[str], str]:
    """Return the lines that the page says are added, and the output that it shows, of a command."""
    page = [block for block in blocks() if block.page == PAGE]
    for added, output in pairwise(page):
        if added.language == "python" and output.text.splitlines()[0] == command:
            return [line for line in added.text.splitlines() if line], output.text.partition("\n")[
                2
            ]
    raise AssertionError(f"{PAGE} does not show {command}")


def run_example(command: str, place: Path) -> str:
    """Run a command of the page, of ``python`` or ``torchrun``, in a folder; return its output."""
    program, *words = command.split()
    start = [sys.executable]
    if program != "python":
        start = [str(Path(sys.executable).parent / program)]
    result = subprocess.run(
        [*start, *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def words_of(output: str) -> str:
    """Return an output without its figures, which differ in their last digits between machines."""
    return re.sub(r"\d+(\.\d+)?", "N", output)
