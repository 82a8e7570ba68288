"""Signals that ask for a stop, as a program meets them that may be stuck in a library."""

import signal
import subprocess
import sys

import pytest
from support.image_folders import write_images
from support.launching import ROOT, TIMEOUT, command, environment, launch
from support.tiny_run import DISTURBED, last_checkpoint

# A process that waits for ever inside the C library: its handlers never get their turn.
STUCK = """
import ctypes
from app.runtime.stop_signal import StopSignal
with StopSignal():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)
"""
FORKED = """
import os, signal
from app.runtime.stop_signal import StopSignal
with StopSignal() as stop:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(stop.number)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), stop.number)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.number)
"""

TERMINAL_CLOSES = """
import os, signal, sys
from app.runtime.stop_signal import StopSignal
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))  # whatever started the tests
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.number)
"""


def run(program, *arguments):
    """Run a program that comes to its end, and return what it has printed."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )


@pytest.mark.parametrize(("start", "number"), [("SIG_DFL", signal.SIGHUP), ("SIG_IGN", 0)])
def test_a_closed_terminal_stops_what_was_not_started_to_outlive_it(start, number):
    assert run(TERMINAL_CLOSES, start).stdout == f"{number:d}\n"


def test_a_second_interrupt_ends_a_process_that_is_stuck():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None:  # two that come together are one
            process.send_signal(signal.SIGINT)
    finally:
        process.kill()
    assert process.wait() == 130


EARLY = """
import os
from app.command import run_command
def main():
    if os.environ["PMI_RANK"] == "1":
        raise KeyboardInterrupt
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
    return 0
run_command(main)
"""


def test_an_interrupt_of_one_process_before_mpi_is_up_ends_all():
    """The others waited for ever in the import of MPI, where no watchdog sees them."""
    process = subprocess.run(
        command(2, "-c", EARLY),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode


def test_children_that_the_terminal_interrupts_too_do_not_count():
    result = run(FORKED)
    assert result.stdout == "2 0\n2\n"
    assert result.stderr.count("Ctrl-C: stops after a checkpoint") == 1


def test_a_stop_of_the_whole_process_group_leaves_a_checkpoint(tmp_path):
    """Processes that load data died of it, and the run with them."""
    for part in ("train", "val"):
        write_images(tmp_path / part, 12)
    keys = ["data.name=image_folder", f"data.root={tmp_path}", "data.image_size=16"]
    keys += ["model.name=lenet5", "model.arguments={}", "oialr.enabled=false"]
    keys += ["data.workers=1", "training.batch_size=4", f"run.dir={tmp_path / 'run'}"]
    result = launch(0, DISTURBED, "group", 0, 3, *keys, code=75)
    assert "stopped by signal 15 after step 3" in result.stderr
    assert last_checkpoint(tmp_path / "run")["position"]["step"] == 3
