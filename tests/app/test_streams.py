"""Streams that are closed, full, read no more, or without some characters: no work ends by them."""

import errno
import io
import os
import subprocess
import sys

import pytest
from support.checkpoint_files import save_series
from support.evaluations import evaluation
from support.launching import ROOT, TIMEOUT, command, environment
from support.tiny_run import TINY

from app import report
from app.analysis.estimate import Estimate
from app.analysis.progress import Progress as AnalysisProgress
from app.command import run_command
from app.errors import OutputError
from app.recording.log import Log
from app.reporting.follow import _Stdout
from app.runtime import processes, streams
from app.runtime.watchdog import Watchdog
from app.search.progress import Progress as SearchProgress
from app.training.progress import Progress

FULL = "No space left on device"


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text=""):
        raise OSError(self.number, os.strerror(self.number))

    flush = write


def run(redirection, *arguments, cwd=ROOT, **variables):
    """Run a Python program whose streams a shell has redirected; exit code, stdout, stderr."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command(0, *arguments)],
        capture_output=True,
        text=True,
        env={**environment(), **variables},
        cwd=cwd,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_line_is_shown_as_far_as_the_encoding_goes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Log(is_first=True).say("run ü/\udcff")
    streams.put("ñ")
    assert stream.buffer.getvalue() == b"run \\xfc/\\udcff\n\\xf1\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_passed_over(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    log = Log(is_first=True)
    log.say("one")
    log.warn("two")
    streams.put("three")
    streams.flush()
    Progress(log, steps=1, first_step=0, epochs=1, quiet=False).close()
    with AnalysisProgress(1, 0, Estimate(seconds=1.0, bytes=1), shown=True) as progress:
        progress.advance(1, 1.0)


def test_a_full_stdout_is_told_once_and_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Refusing(errno.ENOSPC))
    Log(is_first=True).say("one")
    assert capsys.readouterr().err == f"warning: stdout takes no more lines: {FULL}\n"
    with pytest.raises(OutputError, match=f"^cannot write to stdout: {FULL}$") as caught:
        streams.put("two")
    assert not caught.value.nobody_reads


def tell_of_a_search():
    progress = SearchProgress(finished=0, total=2, deadline=float("inf"))
    progress.say("search")
    progress.warn("mended")
    progress.evaluation(evaluation(0), 1, None)


def tell_of_an_analysis():
    with AnalysisProgress(1, 0, Estimate(seconds=1.0, bytes=1), shown=True) as progress:
        progress._last = float("-inf")
        progress.advance(1, 1.0)


@pytest.mark.parametrize("tell", [tell_of_a_search, tell_of_an_analysis])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_progress_that_nobody_takes_ends_nothing(monkeypatch, tell, number):
    monkeypatch.setattr(sys, "stdout", Refusing(number))
    tell()


def test_a_pipe_that_breaks_elsewhere_is_no_success():
    def fail():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_command(fail)


def test_of_what_is_followed_nobody_need_see_the_end(monkeypatch):
    with pytest.raises(OutputError) as caught, streams.printing():
        _Stdout(file=io.StringIO()).on_broken_pipe()
    assert caught.value.nobody_reads
    with pytest.raises(FileNotFoundError), streams.printing():
        os.stat("gone")


def test_all_processes_end_whatever_the_streams_take(monkeypatch):
    codes = []

    class Communicator:
        Abort = codes.append

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Refusing(errno.EPIPE))
    monkeypatch.setattr(processes.time, "sleep", lambda _: None)
    monkeypatch.setattr(processes.os, "_exit", lambda _: None)
    processes.abort_all(Communicator, 1)
    dog = Watchdog(timeout=1.0, abort=codes.append, name="process 0 of 2")
    dog._ended.set()
    dog._end()
    assert codes == [1, 1]


@pytest.mark.parametrize("arguments", [["--keys"], ["--print-config"], ["--help"], ["--version"]])
def test_what_was_asked_for_and_cannot_be_printed_is_one_line(arguments):
    told = f"error: cannot write to stdout: {FULL}\n"
    assert run(">/dev/full", "-m", "app.train", *arguments) == (1, "", told)


def test_a_closed_stdout_is_not_the_next_file(tmp_path):
    program = (
        "import os\nfrom app.command import run_command\n"
        "def main():\n"
        "    with open('file', 'w'):\n"
        "        os.write(1, b'printed by a library')\n"
        "    return 0\n"
        "run_command(main)"
    )
    assert run(">&-", "-c", program, cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.slow
def test_a_training_needs_no_stdout(tmp_path):
    code, _, errors = run(">&-", "-m", "app.train", *TINY, "run.dir=run", cwd=tmp_path)
    assert (code, "Traceback" in errors) == (0, False)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_training_in_a_folder_that_the_terminal_cannot_name(tmp_path):
    """And what it says at its end works: without a checkpoint there is nothing to export."""
    arguments = [*TINY, "run.dir=ü ñ/run 1", "run.keep_checkpoints=0"]
    code, out, errors = run(
        "", "-m", "app.train", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert (code, "Traceback" in errors) == (0, False)
    assert out.startswith("run \\xfc \\xf1/run 1: ")
    assert "use it:" not in out
    assert out.endswith("draw it: python -m app.report '\\xfc \\xf1/run 1'\n")
    assert "run ü ñ/run 1: " in (tmp_path / "ü ñ" / "run 1" / "log.txt").read_text()
    folder = os.fsencode(tmp_path) + b"/n\xff"
    os.rename(tmp_path / "ü ñ" / "run 1", folder)
    code, out, errors = run(">/dev/full", "-m", "app.report", os.fsdecode(folder), cwd=tmp_path)
    assert (code, out, errors) == (0, "", f"warning: stdout takes no more lines: {FULL}\n")
    assert os.path.getsize(folder + b"/report/report.html")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full", "| true"])
def test_an_analysis_that_nobody_reads_comes_to_its_end(tmp_path, redirection):
    save_series(tmp_path / "series")
    code, _, errors = run(
        f"{redirection}; exit ${{PIPESTATUS[0]}}", "-m", "app.analyze", "series", cwd=tmp_path
    )
    assert (code, "Traceback" in errors) == (0, False)
    assert (tmp_path / "series" / "analysis" / "metrics.h5").exists()


def test_intervals_that_nobody_can_wait_for_are_refused(tmp_path):
    for interval in ("inf", "nan", "1e10", "0", "-1"):
        with pytest.raises(report.UserError, match="--interval: "):
            report.main([str(tmp_path), "--follow", "--interval", interval])
