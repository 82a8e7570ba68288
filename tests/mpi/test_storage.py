"""Folders that cannot be written, are moved, or are on a full disk: one line each, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support.launching import ROOT, TIMEOUT, environment, launch, train
from support.tiny_run import DISTURBED, TINY, assert_same_run, last_checkpoint
from torch.utils.data import DataLoader, Dataset

from app.config.settings import RunSection
from app.data.shared_memory import naming_shared_memory
from app.errors import StorageError, UserError
from app.recording.store import read_rows
from app.runtime import startup_check
from app.training.checkpoint import Checkpoints
from app.training.folder import make_folder, naming, write_text
from oialr.placement.processes import Processes

COMPILER = shutil.which("cc")


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "a\0b", "x" * 300])
def test_a_name_that_is_none_of_a_folder_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "within").mkdir()
    monkeypatch.chdir(tmp_path / "within")
    with pytest.raises(UserError, match=r"^run\.name: ") as refused:
        make_folder(RunSection(name=name))
    assert "\n" not in str(refused.value)
    assert [path for path in tmp_path.rglob("*") if path.name not in ("within", "runs")] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "File name too long"),
        ("a\0b", "is no path"),
        ("file", "is a file"),
        ("file/x", "Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_is_named(tmp_path, name, message):
    (tmp_path / "file").touch()
    folder = tmp_path / name
    with pytest.raises(UserError, match=rf"^run\.dir: .*{message}"), naming("run.dir", folder):
        folder.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.name=../../x"], "error: run.name: '../../x' is no name of a folder"),
        (["--resume", "x" * 300], "error: xxxxxxxx"),
    ],
)
def test_an_impossible_name_is_one_line(tmp_path, arguments, message):
    result = train(0, *TINY, *arguments, code=2)
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.h5.partial", "config.yaml", "checkpoints"])
def test_what_is_in_the_way_is_named(tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    result = train(0, *TINY, f"run.dir={tmp_path}", code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: run.dir: cannot write {tmp_path / name.removesuffix('.partial')}"
    )
    assert "Traceback" not in result.stderr


def test_leftovers_of_any_kind_make_way_for_a_checkpoint(tmp_path):
    (tmp_path / "partial-x").touch()
    (tmp_path / "partial-y").mkdir()
    (tmp_path / "partial-z").symlink_to(tmp_path / "partial-y")
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    checkpoints.save(10, {"process_count": 1}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_file_that_cannot_be_written_is_no_traceback(tmp_path):
    with pytest.raises(
        StorageError, match=r"^run\.dir: cannot write .*: No such file or directory"
    ):
        write_text(tmp_path / "gone" / "summary.json", "{}")


def test_the_check_of_nodes_removes_only_what_it_wrote(tmp_path, monkeypatch):
    """In a read-only folder the removal was a traceback; the check says that it is read-only."""

    class Two:
        process_index = local_index = 0
        process_count = 2

        class processes:  # noqa: N801
            barrier = staticmethod(lambda: None)
            gather = staticmethod(lambda value: [value, value])

    (tmp_path / ".process-0").touch()
    monkeypatch.setattr(startup_check, "_write_mark", lambda mark: f"cannot write to {tmp_path}")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}"):
        startup_check.check_folder(tmp_path, Two)
    assert (tmp_path / ".process-0").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, *TINY, f"run.dir={folder}")
    return folder


@pytest.mark.parametrize(("what", "step"), [("move", 17), ("unlink", 23)])
def test_a_run_whose_folder_is_lost_goes_on_from_memory(tmp_path, undisturbed, what, step):
    """It ended with exit code 0, and everything was gone."""
    folder, saved = tmp_path / "run", tmp_path / "run-rescued"
    result = launch(2, DISTURBED, what, 1, step, *TINY, f"run.dir={folder}", code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line == (
        f"error: run.dir: {folder / 'metrics.h5'} was removed, moved or replaced meanwhile; what "
        f"was in memory is in {saved} now: go on with --resume {saved}"
    )
    assert "Traceback" not in result.stderr
    assert last_checkpoint(saved)["position"]["step"] == 24
    train(2, "--resume", saved)
    assert_same_run(saved, undisturbed)
    if what == "move":
        assert not folder.exists()
        assert len(read_rows(tmp_path / "moved" / "metrics.h5", "eval")["step"]) == 2


def test_a_run_whose_folder_is_lost_in_its_test_is_saved_too(tmp_path, undisturbed):
    folder, saved = tmp_path / "run", tmp_path / "run-rescued"
    arguments = (DISTURBED, "move in the test", 0, 0, *TINY, f"run.dir={folder}")
    result = launch(2, *arguments, code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.endswith(f"what was in memory is in {saved} now: go on with --resume {saved}")
    assert read_rows(saved / "metrics.h5", "eval")["split"][-1] == "test"
    train(2, "--resume", saved)
    for name, value in last_checkpoint(undisturbed)["model"].items():
        assert torch.equal(last_checkpoint(saved)["model"][name], value)
    figures = [json.loads((each / "summary.json").read_text()) for each in (saved, undisturbed)]
    assert figures[0]["test_accuracy"] == figures[1]["test_accuracy"]


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    """Return what gives a program an environment with little room in some files."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("a C compiler makes the disk full")
    library = tmp_path_factory.mktemp("full") / "full_disk.so"
    source = ROOT / "tests" / "support" / "full_disk.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def run(program, *arguments, room, within):
        return subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            env={
                **environment(),
                "LD_PRELOAD": str(library),
                "ROOM": str(room),
                "ROOM_IN": str(within),
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_last_is_intact(tmp_path, full_disk):
    train(0, *TINY, f"run.dir={tmp_path}", "run.stop_after=8", code=75)
    before = last_checkpoint(tmp_path)
    arguments = ["--resume", tmp_path, "run.stop_after=16"]
    within = tmp_path / "checkpoints"
    result = full_disk(["-m", "app.train"], *arguments, room=100_000, within=within)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: run.dir: cannot write {within / 'partial-000000'}")
    assert line.endswith(
        ": No space left on device; once that is mended, go on by --resume from the newest "
        "complete checkpoint"
    )
    assert "Traceback" not in result.stderr
    assert not list(within.glob("partial-*"))
    for name, value in last_checkpoint(tmp_path)["model"].items():
        assert torch.equal(value, before["model"][name])
    train(0, *arguments, code=75)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support.metrics_rows import LAYERS, create, stability_row, train_row
from app.errors import StorageError
try:
    with create(Path(sys.argv[1])) as store:
        for step in range(1, 400):
            store.append("train", **train_row(step))
            for layer in LAYERS:
                store.append(f"layers/{layer}/stability", **stability_row(step))
            if step % 10 == 0:
                print(store.counts()["train"], flush=True)
except StorageError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("room", range(60_000, 180_000, 15_000))
def test_a_full_disk_beside_metrics_is_one_line_and_no_crash(tmp_path, full_disk, room):
    """HDF5 tried to write again at the end of the process, and crashed there."""
    path = tmp_path / "metrics.h5"
    result = full_disk(["-c", WRITER], path, room=room, within="metrics.h5")
    assert result.returncode == 1
    assert result.stderr == (
        f"error: run.dir: cannot write {path}: No space left on device; once that is mended, go "
        f"on by --resume\n"
    )
    safe = int((result.stdout.split() or ["0"])[-1])
    assert read_rows(path, "train")["step"][:safe].tolist() == list(range(1, safe + 1))


CLOSER = """
import os, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support.metrics_rows import create
from app.errors import StorageError
store = create(Path(sys.argv[1]))
os.environ["ROOM_IN"] = "metrics.h5"
try:
    store.close()
except StorageError as error:
    sys.exit(f"error: {error}")
"""


def test_a_disk_that_is_full_when_metrics_are_closed_is_one_line(tmp_path, full_disk):
    """The last block was written by the closing itself, which ended in a traceback."""
    path = tmp_path / "metrics.h5"
    result = full_disk(["-c", CLOSER], path, room=0, within="nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: run.dir: cannot write {path}: No space left on device")
    assert result.stderr.count("\n") == 1


def test_a_run_with_a_full_disk_beside_its_metrics_ends_in_one_line(tmp_path, full_disk):
    arguments = [*TINY, f"run.dir={tmp_path}"]
    result = full_disk(["-m", "app.train"], *arguments, room=150_000, within="metrics.h5")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "metrics.h5: No space left on device" in line
    assert "Traceback" not in result.stderr


class Ended(Dataset):
    """Loads nothing: its process is ended as by the system where shared memory is full."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_that_dies_names_shared_memory_and_the_cure():
    loader = DataLoader(Ended(), num_workers=1)
    with pytest.raises(StorageError) as caught, naming_shared_memory():
        list(loader)
    assert str(caught.value).startswith("data.workers: a process that loads data has ended (DataL")
    assert "/dev/shm has " in str(caught.value)
    assert str(caught.value).endswith("make it larger, or set data.workers=0")


def test_other_errors_of_loading_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_shared_memory():
        raise RuntimeError("shapes differ")
