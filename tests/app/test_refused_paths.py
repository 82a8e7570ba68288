"""What the system refuses, such as the folder of another user: one line from every front door."""

import errno
import os

import pytest
import torch
from support.closed_folders import close
from torch import nn

from app import analyze, evaluate, export, report, train
from app.analysis.files import find_checkpoints
from app.command import EXIT_USER, run_command
from app.data.image_listing import LeftOut, list_folder
from app.data.sets import DATA_SETS
from app.errors import AgreedUserError, UserError, refused_path, refusing_paths
from app.reporting.report import _read_runs
from app.search import __main__ as search
from app.training.initial import load_initial
from oialr.placement.processes import Processes, agree

CURE = "; have it opened to this user, or name another path"


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder that is closed, with what the doors look for in it."""
    folder = tmp_path / "closed"
    (folder / "run").mkdir(parents=True)
    for name in ("config.yaml", "search.yaml", "metrics.h5", "summary.json"):
        (folder / "run" / name).touch()
    close(folder, monkeypatch)
    return folder


def refusal(number, path):
    return OSError(number, os.strerror(number), path)


def test_a_refused_path_is_told_with_its_cure():
    assert refused_path(refusal(errno.EACCES, "a")) == f"a: Permission denied{CURE}"
    assert refused_path(refusal(errno.EPERM, b"a")) == f"a: Operation not permitted{CURE}"
    line = refused_path(refusal(errno.ENAMETOOLONG, "a" * 5000))
    assert line == f"{'a' * 60}...: File name too long; name a shorter path"
    assert refused_path(refusal(errno.EACCES, "a\nb")) == f"'a\\nb': Permission denied{CURE}"


@pytest.mark.parametrize(
    "error",
    [
        refusal(errno.ENOENT, "a"),
        refusal(errno.ENOSPC, "a"),
        refusal(errno.EACCES, None),
        refusal(errno.EACCES, 3),
    ],
    ids=str,
)
def test_other_errors_are_faults(error):
    assert refused_path(error) is None
    with pytest.raises(OSError, match=r".") as caught, refusing_paths():
        raise error
    assert caught.value is error
    with pytest.raises(OSError, match=r".") as caught:
        run_command(lambda: raise_(error))
    assert caught.value is error


def raise_(error):
    raise error


DOORS = {
    "train": (train.main, ["--resume"]),
    "report": (report.main, []),
    "follow": (report.main, ["--follow"]),
    "evaluate": (evaluate.main, []),
    "export": (export.main, []),
    "analyze": (analyze.main, []),
    "search": (search.main, ["--resume"]),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_tells_it_in_one_line(door, closed, capsys):
    main, arguments = DOORS[door]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([*arguments, str(closed / "run")]))
    assert end.value.code == EXIT_USER
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {closed}")
    assert line.endswith(CURE)
    assert said.out == ""


def test_all_processes_agree_on_it():
    def gather(message):
        return [None, message]

    with pytest.raises(AgreedUserError, match=f"^a: Permission denied{CURE}"):
        agree(gather, lambda: raise_(refusal(errno.EACCES, "a")))
    with pytest.raises(FileNotFoundError):
        agree(gather, lambda: raise_(refusal(errno.ENOENT, "a")))


def test_of_several_runs_it_is_skipped(closed, tmp_path):
    with pytest.raises(UserError, match=r"Permission denied.* \(and 1 more\)"):
        _read_runs([closed / "run", tmp_path / "gone"])


def test_a_link_into_it_is_as_good_as_no_link(closed):
    assert report._distinct([closed / "run", closed / "run"]) == [closed / "run"] * 2


def test_links_to_themselves_are_no_runs(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: report.main([str(tmp_path / "loop")]))
    assert end.value.code == EXIT_USER
    assert len(capsys.readouterr().err.splitlines()) == 1


class Data:
    """What a set asks of its section."""

    name, root = "cifar10", ""


def test_data_and_weights_in_it_are_no_faults(closed):
    processes = Processes()
    Data.root = str(closed)
    for read in (
        lambda: load_initial(nn.Linear(2, 2), str(closed / "weights.pt")),
        lambda: DATA_SETS["cifar10"].load(Data),
        lambda: list_folder(closed / "train", LeftOut()),
    ):
        with pytest.raises(AgreedUserError, match=f"^{closed}/.*: Permission denied"):
            processes.agree(read)


def test_closed_folders_among_checkpoints_are_named(tmp_path, monkeypatch):
    (tmp_path / "all" / "closed").mkdir(parents=True)
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "all" / "a.pt")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "all" / "closed" / "b.pt")
    close(tmp_path / "all" / "closed", monkeypatch)
    sources, problems = find_checkpoints([tmp_path / "all"])
    assert [source.path for source in sources] == [tmp_path / "all" / "a.pt"]
    line = f"{tmp_path / 'all' / 'closed'}: cannot be read (Permission denied)"
    assert problems == [line]
    with pytest.raises(UserError, match=r"closed: cannot be read"):
        find_checkpoints([tmp_path / "all" / "closed"])
