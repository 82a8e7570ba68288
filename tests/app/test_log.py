"""What a run says, on the streams and in its folder; the link to the newest run."""

import io
import logging
import os
import subprocess

import pytest
from support.launching import TIMEOUT, command, environment

from app.recording.log import Log
from app.runtime.latest import led_to, point_to
from app.training import stopwatch
from app.training.progress import Progress
from oialr.placement.processes import Processes


def test_lines_lie_in_the_folder_as_they_were_said(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("an earlier session\n")
    log = Log(is_first=True)
    log.say("node a")
    log.warn("WARNING: of both")
    log.begin(tmp_path)
    log.say("epoch 1")
    log.note("alone in the file")
    streams = capsys.readouterr()
    assert streams.out == "node a\nepoch 1\n"
    assert streams.err == "WARNING: of both\n"
    assert (tmp_path / "log.txt").read_text() == (
        "an earlier session\nnode a\nWARNING: of both\nepoch 1\nalone in the file\n"
    )


def test_other_processes_tell_of_what_went_wrong_alone(tmp_path, capsys):
    log = Log(is_first=False)
    log.begin(tmp_path)
    log.say("epoch 1")
    log.note("epoch 1")
    assert not (tmp_path / "log.txt").exists()
    log.warn("process 1 of 2 failed")
    assert capsys.readouterr() == ("", "process 1 of 2 failed\n")
    assert (tmp_path / "log.txt").read_text() == "process 1 of 2 failed\n"


def test_records_of_logging_are_written_too(tmp_path, capsys):
    log = Log(is_first=True)
    log.begin(tmp_path)
    handler = log.handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.handle(logging.makeLogRecord({"levelname": "WARNING", "msg": "a damaged file"}))
    assert capsys.readouterr().err == "WARNING: a damaged file\n"
    assert (tmp_path / "log.txt").read_text() == "WARNING: a damaged file\n"


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    log = Log(is_first=True)
    log.begin(folder)
    log.say("one")
    log.say("two")
    streams = capsys.readouterr()
    assert streams.out == "one\ntwo\n"
    told = f"warning: {folder / 'log.txt'} lacks lines from here on: No such file or directory\n"
    assert streams.err == told  # once
    folder.mkdir()
    log.say("three")
    assert (folder / "log.txt").read_text() == "one\ntwo\nthree\n"


def test_where_nobody_reads_any_more_the_run_goes_on(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom app.recording.log import Log\n"
        "log = Log(is_first=True)\nlog.begin(Path(sys.argv[1]))\n"
        "sys.stdin.readline()\nlog.say('one')\nlog.say('two')\n"
    )
    done = behind_a_closed_pipe("-c", program, str(tmp_path))
    assert done == (0, "")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_a_reader_that_has_enough_is_no_fault():
    program = (
        "import sys\nfrom app.command import run_command\nfrom app.train import main\n"
        "sys.stdin.readline()\nrun_command(lambda: main(['--keys']))"
    )
    assert behind_a_closed_pipe("-c", program) == (0, "")


def behind_a_closed_pipe(*arguments):
    """Run a program that waits for a line until its stdout is closed; its exit code and stderr."""
    process = subprocess.Popen(
        command(0, *arguments),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    errors = process.communicate("\n", timeout=TIMEOUT)[1]
    return process.returncode, errors


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell_of_steps(log, *, quiet=False):
    times = iter([100.0, 110.0, 130.0])
    progress = Progress(
        log,
        steps=200,
        first_step=20,
        epochs=10,
        quiet=quiet,
        clock=lambda: next(times),
    )
    for step, epoch, due in ((30, 2, True), (35, 2, False), (50, 3, True)):
        progress.steps(
            step,
            epoch=epoch,
            loss=2.0,
            learning_rate=1e-3,
            samples_per_second=1234.4,
            line_due=due,
        )
    progress.close()


LINES = (  # 1 s a step
    "epoch 2/10  step 30/200  loss 2.0000  lr 1.00e-03  1234 samples/s  0:02:50 left\n"
    "epoch 3/10  step 50/200  loss 2.0000  lr 1.00e-03  1234 samples/s  0:02:30 left\n"
)


def test_lines_of_steps_tell_the_time_left(tmp_path, capsys):
    log = Log(is_first=True)
    log.begin(tmp_path)
    tell_of_steps(log)
    assert capsys.readouterr() == (LINES, "")
    assert (tmp_path / "log.txt").read_text() == LINES


def test_on_a_terminal_a_bar_shows_the_same_and_the_file_has_the_lines(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    log = Log(is_first=True)
    log.begin(tmp_path)
    tell_of_steps(log)
    said = terminal.getvalue()
    assert LINES.splitlines()[0] not in said
    assert "epoch 3/10:  25%" in said
    assert "50/200" in said
    assert "loss 2.0000, lr 1.00e-03, 1234 samples/s" in said
    assert (tmp_path / "log.txt").read_text() == LINES


def test_a_quiet_training_says_nothing(tmp_path, capsys):
    log = Log(is_first=True)
    log.begin(tmp_path)
    tell_of_steps(log, quiet=True)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "log.txt").exists()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    return tmp_path / "runs"


def test_the_link_leads_to_the_newest_run(runs):
    for folder in (runs / "a", type(runs)("runs/b")):  # absolute or not
        point_to(folder)
        assert os.readlink(runs / "latest") == folder.name
    assert led_to(type(runs)("runs/latest")) == type(runs)("runs/b")
    assert led_to(runs / "a") == runs / "a"
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "latest"]


def test_only_runs_that_lie_beside_it_are_linked(runs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (runs / "a" / "evaluation").mkdir()
    point_to(tmp_path / "elsewhere")
    point_to(runs / "a" / "evaluation")
    assert not (runs / "latest").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_somebody_else_has_called_latest_stays(runs, kind):
    (runs / "latest").mkdir() if kind == "folder" else (runs / "latest").write_text("mine")
    point_to(runs / "a")
    assert not (runs / "latest").is_symlink()
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "latest"]


def test_a_file_system_without_links_is_no_harm(runs, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    point_to(runs / "a")
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b"]


def test_no_second_of_a_training_counts_twice(monkeypatch):
    clocks = iter([(0.0, 0.0), (10.0, 5.0), (13.0, 6.0), (17.0, 8.0)])
    monkeypatch.setattr(stopwatch, "_clocks", lambda: next(clocks))
    watch = stopwatch.Stopwatch()
    watch.start()
    for _ in range(2):
        watch.lap(Processes())
    assert (watch.seconds, watch.cpu_seconds) == (7.0, 3.0)
