"""One program in a folder at a time."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from support.launching import ROOT, TIMEOUT, command, environment, launch, train
from support.tiny_run import DISTURBED, TINY

from app.errors import StorageError, TakenOverError, UserError
from app.runtime import lease as module
from app.runtime.lease import EXPIRY, Holder, Lease

HOLDER = """
import sys
from pathlib import Path
from app.runtime.lease import Lease
with Lease.take(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = {"host": "elsewhere", "boot_id": "another", "process": 7}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def another_process(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_refused_and_touches_nothing_until_the_first_is_gone(tmp_path):
    with another_process(tmp_path) as first:
        before = tmp_path.stat().st_mtime_ns, names(tmp_path)
        with pytest.raises(UserError) as refused:
            Lease.take(tmp_path)
        assert str(refused.value) == (
            f"run.dir: {tmp_path} is in use by process {first.pid} on {Holder.current().host}; "
            f"let it end, or choose another folder (in a copy of its folder, delete .lease-000001)"
        )
        assert (tmp_path.stat().st_mtime_ns, names(tmp_path)) == before
        first.communicate("", timeout=TIMEOUT)
        assert names(tmp_path) == []
        with Lease.take(tmp_path) as lease:
            assert names(tmp_path) == [".lease-000001"]
            lease.check()
        assert names(tmp_path) == []


def test_a_killed_owner_is_followed_at_once(tmp_path):
    with another_process(tmp_path) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie is gone, too
        with Lease.take(tmp_path):
            assert names(tmp_path) == [".lease-000002"]


def test_a_process_that_lives_here_is_not_followed_however_long_it_was_silent(tmp_path):
    with Lease.take(tmp_path):
        os.utime(tmp_path / ".lease-000001", (0, 0))
        with pytest.raises(UserError, match="in use by process"):
            Lease.take(tmp_path)


def test_another_process_of_the_same_number_is_another(tmp_path):
    with Lease.take(tmp_path, me=replace(Holder.current(), start="1")), Lease.take(tmp_path):
        assert names(tmp_path) == [".lease-000002"]


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_that_the_system_hides_is_not_followed_while_it_renews(
    tmp_path, monkeypatch, lives
):
    """Another user's, where /proc is mounted with hidepid."""

    def kill(process, number):
        assert number == 0
        raise PermissionError if lives else ProcessLookupError

    with Lease.take(tmp_path):
        me = Holder.current()
        monkeypatch.setattr(module, "_start_of", lambda process: None)
        monkeypatch.setattr(module.os, "kill", kill)
        if lives:
            with pytest.raises(UserError, match=r"in use by .*if that is gone, the folder is free"):
                Lease.take(tmp_path, me=me)
            silent_for(tmp_path, EXPIRY + 1)
        Lease.take(tmp_path, me=me).release()


def silent_for(folder, seconds):
    path = folder / ".lease-000001"
    time = path.stat().st_mtime - seconds
    os.utime(path, (time, time))


def test_an_owner_elsewhere_is_followed_when_it_has_not_renewed_for_long(tmp_path):
    first = Lease.take(tmp_path, me=replace(Holder.current(), **ELSEWHERE))
    silent_for(tmp_path, EXPIRY / 2)
    with pytest.raises(
        UserError, match=r"process 7 on elsewhere \(if that is gone, .* in \d\d s\)"
    ):
        Lease.take(tmp_path)
    assert names(tmp_path) == [".lease-000001"]
    silent_for(tmp_path, EXPIRY)
    with Lease.take(tmp_path) as second:
        second.check()
        with pytest.raises(StorageError, match=r"was taken over by process \d+ on .*, since"):
            first.check()
        first.release()
        assert names(tmp_path) == [".lease-000002"]


def test_an_owner_that_stood_still_is_none_again_when_its_follower_has_ended(tmp_path, monkeypatch):
    first = Lease.take(tmp_path, me=replace(Holder.current(), **ELSEWHERE))
    first._ended.set()
    first._thread.join()  # it stands still
    silent_for(tmp_path, EXPIRY + 1)
    Lease.take(tmp_path).release()
    now = module.time.time() + EXPIRY + 1
    monkeypatch.setattr(module.time, "time", lambda: now)
    with pytest.raises(TakenOverError, match=r"\.lease-000001 in .* another one may have been"):
        first.check()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("job", "restarts", "followed"), [("5", 1, True), ("5", 0, False), ("6", 1, False)]
)
def test_a_job_that_slurm_has_started_again_follows_itself(tmp_path, job, restarts, followed):
    def holder(job, restarts):
        variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
        return Holder.current(variables)

    first = Lease.take(tmp_path, me=replace(holder("5", 0), **ELSEWHERE))
    if followed:
        Lease.take(tmp_path, me=holder(job, restarts)).release()
    else:
        with pytest.raises(UserError, match=r"process 7 on elsewhere \(Slurm job 5\)"):
            Lease.take(tmp_path, me=holder(job, restarts))
    first.release()


@pytest.mark.parametrize("number", [1, 2])
def test_of_two_that_find_the_owner_gone_at_most_one_follows(tmp_path, monkeypatch, number):
    """The other has released its lease, or taken the next, while this one looked."""
    gone = tmp_path / ".lease-000001"
    Lease.take(tmp_path, me=replace(Holder.current(), start="1"))
    refuse = module._refuse_while_used

    def look(folder, path, me):
        owner = refuse(folder, path, me)
        gone.unlink()
        module._create(tmp_path / f".lease-{number:06d}", replace(me, process=7))
        return owner

    monkeypatch.setattr(module, "_refuse_while_used", look)
    with pytest.raises(UserError, match="another program is just starting in"):
        Lease.take(tmp_path)
    assert names(tmp_path) == [f".lease-{number:06d}"]


def test_a_lease_without_its_owner_s_name_counts_by_its_age(tmp_path):
    path = tmp_path / ".lease-000001"
    path.touch()
    with pytest.raises(UserError, match="is in use by another program"):
        Lease.take(tmp_path)
    silent_for(tmp_path, EXPIRY + 1)
    Lease.take(tmp_path).release()


def test_the_owner_notices_what_became_of_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lease.take(folder) as lease:
        (folder / ".lease-000001").unlink()  # somebody cleaned up
        lease.check()
        assert names(folder) == [".lease-000001"]
        folder.rename(tmp_path / "moved")
        with pytest.raises(StorageError, match=r"run was removed or moved while"):
            lease.check()


def test_it_is_renewed_until_its_end(tmp_path, monkeypatch):
    class Ended:
        beats = iter([False, False, True])

        def wait(self, seconds):
            assert seconds == module.RENEWAL
            return next(self.beats)

        def set(self):
            pass

    with Lease.take(tmp_path) as lease:
        silent_for(tmp_path, 50)
        before = (tmp_path / ".lease-000001").stat().st_mtime
        monkeypatch.setattr(lease, "_ended", Ended())
        lease._renew()
        assert (tmp_path / ".lease-000001").stat().st_mtime > before + 40
        lease._ended = module.threading.Event()
        lease._ended.set()


def test_two_programs_do_not_share_a_run(tmp_path):
    """Resuming a run that lives lost rows, with exit code 0."""
    first = subprocess.Popen(
        command(0, DISTURBED, "sleep", 0, 3, *TINY, f"run.dir={tmp_path}", "run.log_interval=1"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline().startswith(f"run {tmp_path}")
        for line in first.stdout:
            if line.startswith("epoch"):  # before it the lines above went into log.txt
                break
        before = {name: (tmp_path / name).stat().st_ino for name in names(tmp_path)}
        for processes in (0, 2):
            result = train(processes, "--resume", tmp_path, code=2)
            assert result.stderr.startswith(
                f"error: run.dir: {tmp_path} is in use by process {first.pid} on "
            )
            assert result.stderr.count("\n") == 1
        (tmp_path / "metrics.h5").rename(tmp_path / "elsewhere.h5")  # as before it is there
        result = train(0, *TINY, f"run.dir={tmp_path}", code=2)
        assert f"{tmp_path} is in use by process {first.pid} on " in result.stderr
        (tmp_path / "elsewhere.h5").rename(tmp_path / "metrics.h5")
        assert {name: (tmp_path / name).stat().st_ino for name in names(tmp_path)} == before
    finally:
        first.kill()
        first.communicate()


def test_two_programs_do_not_share_a_search(tmp_path):
    arguments = ["--config", "configs/search/digits.yaml", f"run.dir={tmp_path}"]
    with another_process(tmp_path) as first:
        result = launch(2, "-m", "app.search", *arguments, code=2)
    assert f"error: run.dir: {tmp_path} is in use by process {first.pid} on " in result.stderr
    assert result.stderr.count("\n") == 1
