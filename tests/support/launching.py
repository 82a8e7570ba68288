"""Start programs under the environment's own mpirun, with an end to every hang."""

import os
import subprocess
import sys
from pathlib import Path

from support.entered import with_noting

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
TIMEOUT = 240  # seconds; eight processes take up to 40 to start on two cores


def environment():
    """Return this process's environment without the traces of a launcher."""
    prefixes = ("PMI", "MPI_", "OMPI_", "SLURM_", "TORCHELASTIC", "HYDRA")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": with_noting(str(ROOT))}


def command(processes, *arguments):
    """Return the command line of a Python program on some processes; 0: without mpirun."""
    launcher = [str(MPIRUN), "-n", str(processes)] if processes else []
    return [*launcher, sys.executable, *map(str, arguments)]


def launch(processes, *arguments, cwd=ROOT, code=0, timeout=TIMEOUT):
    """Run a Python program to its end and check its exit code.

    A hang ends the test: mpirun is stopped after the timeout and takes its processes along.
    """
    process = subprocess.Popen(
        command(processes, *arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=30)
        raise AssertionError(f"no end after {timeout} s\n{out}\n{err}") from None
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(processes, *arguments, **options):
    """Run the training front door."""
    return launch(processes, "-m", "app.train", *arguments, **options)
