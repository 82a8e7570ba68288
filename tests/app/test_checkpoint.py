"""Checkpoints: parts that are written once, atomic, complete, verified."""

import errno
import os
import zipfile
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from app import config
from app.errors import AgreedStorageError, UserError
from app.training import files as written_files
from app.training import state as states
from app.training.checkpoint import Checkpoints
from app.training.early_stopping import BEST_KEYS, EarlyStopping
from app.training.state import _load, restore
from oialr.placement.processes import Processes


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
    write = written_files.write

    def noting(path, content):
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(written_files, "write", noting)
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


@pytest.mark.parametrize("is_the_same", [True, False])
def test_nothing_is_written_through_a_link_that_is_there_already(
    tmp_path, monkeypatch, is_the_same
):
    """Where an answer is lost NFS asks again, and is told that the link that it has made exists."""
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10, 1)
    other = tmp_path / "other"
    other.write_text("of somebody else")
    link, write, written = os.link, written_files.write, []

    def asked_twice(earlier, path):
        link(earlier if is_the_same else other, path)
        raise FileExistsError(errno.EEXIST, "File exists")

    def noting(path, content):
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(os, "link", asked_twice)
    monkeypatch.setattr(written_files, "write", noting)
    save(checkpoints, 20, 1)
    first, newest = checkpoints.complete()
    name = "process-00000-part-1.pt"
    assert (name in written) == (not is_the_same)
    assert (first / name).samefile(newest / name) == is_the_same
    assert other.read_text() == "of somebody else"
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


def flip(path):
    """Flip one bit in the middle of the file's weights."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
    content = bytearray(path.read_bytes())
    content[content.index(PATTERN, entry.header_offset)] ^= 4
    path.write_bytes(content)


PATTERN = torch.full((3,), 1.5).numpy().tobytes()


@pytest.mark.parametrize("name", ["state.pt", "process-00000.pt", "process-00000-b.pt"])
def test_a_flipped_bit_in_any_file_is_named_and_the_one_before_is_taken(tmp_path, caplog, name):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    for step, names in ((10, "a"), (20, "ab")):
        weights = {"weights": torch.full((3,), 1.5)}
        parts = dict.fromkeys(names, weights)
        checkpoints.save(step, {"process_count": 1, **weights}, weights, parts)
    newest = checkpoints.complete()[-1]
    flip(newest / name)
    shared, (own,) = Checkpoints(tmp_path, Processes(), keep=2).load()
    assert shared["weights"].tolist() == [1.5] * 3 == own["weights"].tolist()
    (line,) = caplog.messages
    assert line.startswith(f"{newest} cannot be read: {name} is damaged (BadZipFile: Bad CRC-32")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010", "damaged-step-00000020"}


def saved_with_a_damaged_part(folder):
    """Save two checkpoints that have the parts a and b in common; damage a in place."""
    checkpoints = Checkpoints(folder, Processes(), keep=2)
    weights = {"weights": torch.full((3,), 1.5)}
    for step in (10, 20):
        shared = {"process_count": 1, "step": step, **weights}
        checkpoints.save(step, shared, {}, {"a": weights, "b": weights})
    first, newest = checkpoints.complete()
    flip(newest / "process-00000-a.pt")
    assert (first / "process-00000-a.pt").samefile(newest / "process-00000-a.pt")
    return first, newest


TOLD = (
    "{}: process-00000-a.pt is damaged (BadZipFile: Bad CRC-32 for file 'archive/data/0'); "
    "no checkpoint is whole, and this one is used without the bases of stability that were in there"
)


def test_damage_to_a_part_that_all_checkpoints_share_costs_no_checkpoint(tmp_path, caplog):
    first, newest = saved_with_a_damaged_part(tmp_path)
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    shared, (own,) = checkpoints.load()
    assert shared["step"] == 20
    assert own["parts"]["a"] == {}
    assert own["parts"]["b"]["weights"].tolist() == [1.5] * 3
    assert caplog.messages == [TOLD.format(newest)]
    assert checkpoints.complete() == [first, newest]


def test_the_newest_without_a_part_gives_way_where_more_of_it_is_damaged(tmp_path, caplog):
    first, newest = saved_with_a_damaged_part(tmp_path)
    flip(newest / "state.pt")
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    shared, (own,) = checkpoints.load()
    assert shared["step"] == 10
    assert own["parts"]["a"] == {}
    told, lost = caplog.messages
    assert told.startswith(f"{newest} cannot be read: state.pt is damaged (BadZipFile")
    assert lost == TOLD.format(first)
    assert checkpoints.complete() == [first]


def test_a_part_that_no_checkpoint_has_any_more_is_told(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=1)
    save(checkpoints, 10, 1, 2)
    (checkpoints.complete()[0] / "process-00000-part-1.pt").unlink()
    _, (own,) = Checkpoints(tmp_path, Processes(), keep=1).load()
    assert own["parts"].keys() == {"part-1", "part-2"}
    assert own["parts"]["part-1"] == {}
    assert "process-00000-part-1.pt'; no checkpoint is whole" in caplog.text


def test_who_reads_alone_renames_nothing(tmp_path):
    """Such as app.evaluate, beside the training whose folder it is."""
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10)
    save(checkpoints, 20)
    newest = checkpoints.complete()[-1]
    (newest / "state.pt").write_bytes(b"")
    reader = Checkpoints(tmp_path, Processes(), keep=2, read_only=True)
    assert reader.load()[0]["step"] == 10
    assert reader.newest_step() == 10
    assert checkpoints.complete()[-1] == newest


def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    save(checkpoints, 10)

    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoints.load()
    assert [path.name for path in checkpoints.complete()] == ["step-00000010"]


def test_an_old_checkpoint_that_stays_is_no_reason_to_end(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=1)
    save(checkpoints, 10)

    def gone(path, **_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("shutil.rmtree", gone)
    save(checkpoints, 20)
    assert checkpoints.complete()[-1].name == "step-00000020"
    assert "step-00000010 cannot be removed: No such file" in caplog.text


def test_a_checkpoint_without_one_of_its_keys_is_passed_over(tmp_path, caplog):
    save(Checkpoints(tmp_path, Processes(), keep=2), 10)
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    checkpoints.save(20, {"process_count": 1}, {"mine": 20})
    shared, _ = Checkpoints(tmp_path, Processes(), keep=2, keys=["step"]).load()
    assert shared["step"] == 10
    assert "state.pt lacks step" in caplog.text


def test_other_names_are_no_checkpoints_and_numbers_count_by_value(tmp_path):
    for name in ("step-00000009-10", "step-00000009-9", "step-100000000", "step-9-copy", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").write_text("a plain file")
    names = [path.name for path in Checkpoints(tmp_path, Processes(), keep=2).complete()]
    assert names == ["step-00000009-9", "step-00000009-10", "step-100000000"]


def test_damaged_best_weights_let_early_stopping_begin_anew(tmp_path, caplog):
    def early_stopping():
        best = Checkpoints(tmp_path, Processes(), keep=1, keys=BEST_KEYS)
        return EarlyStopping(best, patience=2)

    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.5)
    first = early_stopping()
    first.restore_best(model)
    assert caplog.messages == ["no epoch has ended as yet: the newest weights are tested"]
    caplog.clear()
    assert first.improves(10, 0.25)
    first.keep(10, model, None, process_count=1)
    state = first.state_dict()

    undamaged = early_stopping()
    undamaged.load_state_dict(state)
    assert not undamaged.improves(20, 0.5)
    assert not caplog.messages

    flip(tmp_path / "step-00000010" / "state.pt")
    damaged = early_stopping()
    damaged.load_state_dict(state)
    assert "state.pt is damaged" in caplog.text
    assert "early stopping begins anew: the best weights are damaged" in caplog.text
    torch.nn.init.zeros_(model.weight)
    damaged.restore_best(model)
    assert "the best weights are lost: the newest weights are tested" in caplog.text
    assert model.weight.tolist() == [[0.0] * 3]
    assert damaged.improves(20, 0.5)


def test_of_a_finished_run_the_newest_stays_without_parts(tmp_path):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=3)
    for step in (10, 20, 30):
        save(checkpoints, step, step, step + 1)
    (tmp_path / "best" / "step-00000010").mkdir(parents=True)
    (tmp_path / "partial-00000040").mkdir()
    sizes = {path.stat().st_ino: path.stat().st_size for path in tmp_path.rglob("*.pt")}
    before = sum(sizes.values())
    freed = checkpoints.tidy(2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000020",
        "step-00000030",
        "best",
    }
    for folder in checkpoints.complete():
        assert files(folder).keys() == {"state.pt", "process-00000.pt"}
    assert freed == before - sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    assert loaded(tmp_path) == (30, 30, {})
    checkpoints.tidy(1)
    assert [path.name for path in checkpoints.complete()] == ["step-00000030"]
    save(checkpoints, 40, 30, 40)  # more epochs: parts are written anew
    assert loaded(tmp_path) == (40, 40, {"part-30": 30.0, "part-40": 40.0})


@pytest.mark.parametrize("name", ["state.pt", "process-00000.pt"])
def test_where_the_newest_is_damaged_all_stay(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, Processes(), keep=2)
    for step in (10, 20):
        weights = {"weights": torch.full((3,), 1.5)}
        checkpoints.save(step, {"process_count": 1, **weights}, weights, {"a": weights})
    flip(tmp_path / "step-00000020" / name)
    with pytest.raises(AgreedStorageError, match=f"step-00000020: {name} is damaged"):
        checkpoints.tidy(1)
    for folder in checkpoints.complete():
        assert files(folder).keys() == {"state.pt", "process-00000.pt", "process-00000-a.pt"}
    assert len(checkpoints.complete()) == 2


def test_a_run_without_checkpoints_has_nothing_to_drop(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints", Processes(), keep=0).tidy(1) == 0


def test_a_checkpoint_of_a_cpu_is_restored_on_a_gpu(monkeypatch):
    """It has no state of a GPU's generator; the message blamed the configuration."""
    parts = MagicMock(method=None, average=None, tracker=None)
    parts.runtime.device, parts.runtime.process_count = torch.device("cuda"), 1
    keys = ("method", "model", "optimizer", "precision", "average", "early_stopping", "last_loss")
    shared = {**dict.fromkeys(keys), "position": {}, "seconds": 1.0, "process_count": 1}
    known, state = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: known.append(state))
    _load(parts, None, shared, [{"random_state": state}])
    assert known == []
    _load(parts, None, shared, [{"random_state": state, "random_state_cuda": state}])
    assert known == [state]


WRAPPED = """Error(s) in loading state_dict for Linear:
While copying the parameter named "weight", an exception occurred : ('CUDA error: unspecified',)."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        RuntimeError(WRAPPED),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("size mismatch for weight"),
    ],
)
def test_a_fault_of_the_machine_is_no_mistake_in_the_configuration(monkeypatch, error):
    def fail(*_):
        raise error

    configuration = config.load(None, [])
    parts = MagicMock(configuration=configuration, method=None)
    monkeypatch.setattr(states, "_load", fail)
    is_mistake = "size mismatch" in str(error)
    with pytest.raises(UserError if is_mistake else type(error)) as caught:
        restore(parts, None, {"configuration": config.to_yaml(configuration), "method": None}, [])
    assert is_mistake == ("does not fit the configuration" in str(caught.value))


def test_a_checkpoint_is_seen_when_it_is_on_the_disk_and_the_folder_is_ours(tmp_path, monkeypatch):
    happened, fsync, rename = [], os.fsync, type(tmp_path).rename

    def sync(handle):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def move(path, target):
        happened.append(f"becomes {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(type(tmp_path), "rename", move)
    ours = partial(happened.append, "ours")
    save(Checkpoints(tmp_path, Processes(), keep=1, check_owner=ours), 10, 1)
    files = ["process-00000.pt", "process-00000-part-1.pt", "state.pt", "partial-00000010"]
    assert happened == ["ours", *files, "ours", "becomes step-00000010", tmp_path.name]


def test_a_run_goes_on_with_the_scale_of_its_loss():
    parts = MagicMock(method=None, average=None, tracker=None)
    parts.runtime.device, parts.runtime.process_count = torch.device("cpu"), 2
    keys = ("method", "model", "optimizer", "average", "early_stopping", "last_loss")
    shared = {**dict.fromkeys(keys), "position": {}, "seconds": 1.0, "process_count": 1}
    _load(parts, None, {**shared, "precision": {"scale": 8.0}}, [{}])
    parts.precision.load_state_dict.assert_called_once_with({"scale": 8.0})
