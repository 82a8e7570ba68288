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


def added_lines(name: str, *purposes: str) -> list[str]:
    """Return the lines of an example that its author had to add, in their order.

    Args:
        name: of the module.
        purposes: as in the comment before each line, ``# added, for PURPOSE:``; none: ``# added:``.
    """
    marks = {f"# added, for {purpose}:" for purpose in purposes} or {"# added:"}
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    return [line.strip() for mark, line in pairwise(lines) if mark.strip() in marks]


def described(command: str, *, parts: int = 1) -> tuple[list[list[str]], str]:
    """Return what the page shows of a command: the lines to add, in parts, and its output."""
    page = [block for block in blocks() if block.page == PAGE]
    texts = [block.text.splitlines() for block in page]
    place = next(i for i, lines in enumerate(texts) if lines[0] == command)
    assert all(block.language == "python" for block in page[place - parts : place])
    added = [[line.strip() for line in lines if line] for lines in texts[place - parts : place]]
    return added, "\n".join([*texts[place][1:], ""])


def run_example(command: str, place: Path) -> str:
    """Run a command of the page, of ``python`` or ``torchrun``, in a folder; return its output."""
    program, *words = command.split()
    start = [sys.executable]
    if program != "python":
        start = [str(Path(sys.executable).parent / program)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    result = subprocess.run(
        [*start, *words],
        cwd=place,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_output(command: str, output: str, place: Path) -> None:
    """Run a command of the page: it prints what stands there, and its resume ends alike."""
    printed = run_example(command, place)
    assert words_of(printed) == words_of(output)
    assert printed.endswith("with the same bits in the end: True\n")


def words_of(output: str) -> str:
    """Return an output without its figures, which differ in their last digits between machines."""
    return re.sub(r"\d+(\.\d+)?", "N", output)
