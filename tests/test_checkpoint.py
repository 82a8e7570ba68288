"""Checkpoints: parts that are written once, atomic, complete."""

import os

import pytest
import torch

from app.distributed.processes import Processes
from app.errors import UserError
from app.training import checkpoint
from app.training.checkpoint import Checkpoints


def part(number):
    return {"x": torch.full((3,), float(number))}


def parts(*numbers):
    return {f"part-{number}": part(number) for number in numbers}


def save(checkpoints, step, *numbers):
    shared = {"process_count": 1, "step": step}
    checkpoints.save(step, shared, {"mine": step}, parts(*numbers))


def loaded(folder, keep=2):
    shared, (own,) = Checkpoints(folder, Processes(), keep=keep).load()
    return shared["step"], own["mine"], {k: v["x"][0].item() for k, v in own["parts"].items()}


def files(folder):
    return {path.name: path.stat() for path in folder.iterdir()}


def test_a_part_is_written_once_and_every_checkpoint_is_whole(tmp_path, monkeypatch):
    written = []
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda p, c: (written.append(p.name), write(p, c)))
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10, 1, 2)
    assert loaded(tmp_path) == (10, 10, {"part-1": 1.0, "part-2": 2.0})
    save(checkpoints, 20, 2, 3)
    save(checkpoints, 20, 2, 3)  # a second one of the same step
    save(checkpoints, 30, 3)
    assert loaded(tmp_path) == (30, 30, {"part-3": 3.0})
    assert [name for name in written if "part" in name] == [
        "process-00000-part-1.pt",
        "process-00000-part-2.pt",
        "process-00000-part-3.pt",
    ]
    before, last = checkpoints.complete()
    name = "process-00000-part-3.pt"
    assert files(last)[name].st_ino == files(before)[name].st_ino
    assert files(last)[name].st_nlink == 2  # those that were dropped hold nothing
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("partial")]


def test_a_resumed_run_writes_its_parts_anew(tmp_path):
    save(Checkpoints(tmp_path, Processes(), keep=2), 10, 1)
    again = Checkpoints(tmp_path, Processes(), keep=2)
    again.load()
    save(again, 20, 1, 2)
    first, second = again.complete()
    name = "process-00000-part-1.pt"
    assert files(first)[name].st_ino != files(second)[name].st_ino
    assert loaded(tmp_path)[2] == {"part-1": 1.0, "part-2": 2.0}


@pytest.mark.parametrize("obstacle", ["no links", "deleted"])
def test_where_nothing_can_be_linked_it_is_written(tmp_path, monkeypatch, obstacle):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10, 1)
    if obstacle == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    else:
        (*_, newest) = checkpoints.complete()
        newest.rename(tmp_path / "elsewhere")
    save(checkpoints, 20, 1)
    assert loaded(tmp_path) == (20, 20, {"part-1": 1.0})


def test_a_checkpoint_without_one_of_its_parts_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10, 1)
    save(checkpoints, 20, 1, 2)
    (checkpoints.complete()[-1] / "process-00000-part-2.pt").unlink()
    assert loaded(tmp_path) == (10, 10, {"part-1": 1.0})


def test_a_checkpoint_may_be_damaged_twice_at_one_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10)
    for _ in range(2):
        save(checkpoints, 20)
        (checkpoints.complete()[-1] / "state.pt").write_bytes(b"")
        assert loaded(tmp_path)[0] == 10
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000010", "damaged-step-00000020", "damaged-step-00000020-1"}


def test_where_no_checkpoint_can_be_read_nothing_is_lost(tmp_path):
    """A second try does not start over, as a run without checkpoints does."""
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10)
    save(checkpoints, 20)
    for folder in checkpoints.complete():
        (folder / "state.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of 2 checkpoints can be read .*; restore one"):
            loaded(tmp_path)
    assert len(checkpoints.complete()) == 2


def test_what_a_killed_session_wrote_later_does_not_outlive_the_new(tmp_path):
    """The best weights of a run that was resumed from before them."""
    save(Checkpoints(tmp_path, Processes(), keep=1), 60)
    again = Checkpoints(tmp_path, Processes(), keep=1)
    save(again, 40)
    assert loaded(tmp_path) == (40, 40, {})
    assert len(again.complete()) == 1
