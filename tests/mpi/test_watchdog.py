"""A process that stands still ends the program and says at what; one that moves is left alone."""

import threading

import pytest
from support.launching import ROOT, launch
from support.tiny_run import PAPER

from app.runtime.watchdog import Watchdog

DISTURBED = ROOT / "tests" / "support" / "workers" / "disturbed.py"
SMALL = [
    "training.epochs=4",
    "training.warmup_epochs=1",
    *PAPER,
    "oialr.delay=30",
    "model.arguments={patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}",
]


def stand_still(ended):
    assert ended.wait(30)


def test_a_process_that_stands_still_says_where(capfd):
    ended, codes = threading.Event(), []

    def abort(code):
        codes.append(code)
        ended.set()

    with Watchdog(timeout=0.5, abort=abort, name="process 1 of 3") as watchdog:
        watchdog.progress("step 21")
        stand_still(ended)
    assert codes == [1]
    line = capfd.readouterr().err.splitlines()[0]
    assert line.startswith("process 1 of 3 on ")
    assert "no progress in 0.5 s (distributed.timeout) at step 21, in wait < wait < " in line
    assert "stand_still" in line


def test_progress_is_seen_also_in_the_same_words(monkeypatch):
    """Between any two beats, of which there are more than the timeout has."""
    watchdog = Watchdog(timeout=2.0, abort=lambda _: None, name="")
    beats, ends = iter(range(60)), []

    class Ended:
        def wait(self, beat):
            watchdog.progress("evaluation")
            return next(beats, None) is None

    monkeypatch.setattr(watchdog, "_ended", Ended())
    monkeypatch.setattr(watchdog, "_end", lambda: ends.append(True))
    watchdog._watch()
    assert not ends


def watching():
    """Return the number of threads that watch; others may be about to end."""
    return sum(thread.name == "watchdog" for thread in threading.enumerate())


def test_without_a_timeout_nothing_is_started():
    with Watchdog(timeout=None, abort=lambda _: None, name="") as watchdog:
        watchdog.progress("step 1")
        assert watching() == 0


def test_nothing_is_left_behind():
    with Watchdog(timeout=100, abort=lambda _: None, name=""):
        assert watching() == 1
    assert watching() == 0


def test_an_error_tells_what_was_going_on():
    watchdog = Watchdog(timeout=None, abort=lambda _: None, name="process 1 of 3")

    def fail():
        with watchdog:
            watchdog.progress("checkpoint after step 20")
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert caught.value.__notes__ == ["process 1 of 3: at checkpoint after step 20"]


def test_a_hang_in_mpi_ends_all_processes(tmp_path):
    """MPI itself would wait for ever: process 1 in a barrier, the others for its gradients."""
    arguments = [*SMALL, f"run.dir={tmp_path}", "distributed.timeout=40"]
    result = launch(3, DISTURBED, "mpi", 1, 15, *arguments, code=1)
    assert "process 1 of 3" in result.stderr
    assert "self.runtime.communicator.Barrier()" in result.stderr
    for index, step in ((0, 16), (2, 16), (1, 15)):
        assert f"process {index} of 3" in result.stderr
        assert f"no progress in 40 s (distributed.timeout) at step {step}" in result.stderr


def test_a_process_that_is_alone_is_watched_where_it_says_so(monkeypatch):
    watchdog = Watchdog(timeout=2.0, abort=lambda _: None, name="", alone=True)
    ends = []
    monkeypatch.setattr(watchdog, "_end", lambda: ends.append(watchdog._what[0]))

    def beats(number):
        remaining = iter(range(number))

        class Ended:
            def wait(self, beat):
                return next(remaining, None) is None

        monkeypatch.setattr(watchdog, "_ended", Ended())
        watchdog._watch()

    beats(60)
    assert not ends
    with watchdog.guard("the stored state"):
        beats(60)
    assert ends == ["the stored state"]
    beats(60)
    assert len(ends) == 1
