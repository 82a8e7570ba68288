"""What --help of the front doors costs: no heavy package is imported for it."""

import subprocess
import sys

import pytest
from support.launching import ROOT, TIMEOUT, environment

HEAVY = {"torch", "h5py", "matplotlib", "rich", "safetensors", "mpi4py", "propulate"}
PROGRAM = """
import sys
from importlib import import_module
try:
    import_module(sys.argv[1]).main(["--help"])
except SystemExit:
    pass
print(set(sys.argv[2:]) & set(sys.modules))
"""
READ_CONFIGURATIONS = ("train", "search.__main__")
"""These know the data sets, whose files take numpy."""
OTHERS = ("report", "analyze", "calibrate", "export", "evaluate")


@pytest.mark.parametrize("door", [*READ_CONFIGURATIONS, *OTHERS])
def test_help_imports_nothing_heavy(door):
    heavy = HEAVY | ({"numpy"} if door in OTHERS else set())
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"app.{door}", *sorted(heavy)],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
        env=environment(),
        cwd=ROOT,
    )
    assert "example" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"
