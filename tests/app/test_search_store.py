"""The store of a search: whole rows, many writers, kill -9."""

import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import h5py
import numpy as np
import pytest
from support.evaluations import PARAMETERS, create, evaluation
from support.launching import TIMEOUT, environment

from app import config
from app.errors import StorageError, UserError
from app.search.objective import FAILED, OUT_OF_BOUNDS
from app.search.space import read_space
from app.search.store import (
    Additions,
    Store,
    _read,
    mend,
    read_evaluations,
    seconds_spent,
    sessions,
)
from app.search.tally import Tally, best_first, best_of


def test_what_is_written_is_read_while_others_write(tmp_path):
    first, second = create(tmp_path), create(tmp_path, worker=1)
    assert read_evaluations(tmp_path) == []
    first.append(evaluation(2))
    second.append(evaluation(0, curve=()))
    assert read_evaluations(tmp_path) == [evaluation(0, curve=()), evaluation(2)]
    first.append(evaluation(1))
    assert [one.number for one in read_evaluations(tmp_path)] == [0, 1, 2]
    first.close()
    later = create(tmp_path, session=1)
    later.append(evaluation(3))
    later.append(evaluation(2, loss=0.0))  # counted once: the earlier session's
    assert read_evaluations(tmp_path)[2:] == [evaluation(2), evaluation(3)]
    assert sessions(tmp_path) == 2


def test_choices_come_back_as_the_configuration_has_them(tmp_path):
    """Whole numbers for a float: "1.0" was cut to "1.", which nobody could read."""
    base = config.load()
    space = read_space({"training.gradient_clip": {"choices": [1, 10]}}, base)
    assert space.parameters[0].choices == (1.0, 10.0)
    parameters = space.values_of(space.configure(base, space.decode([0.9])))
    one = evaluation(0, parameters=parameters)
    store = Store.create(tmp_path, session=0, worker=0, parameters=space.column_types())
    store.append(one)
    assert read_evaluations(tmp_path) == [one]
    assert one.parameters == {"training.gradient_clip": 10.0}


def test_choices_that_an_earlier_version_cut_are_read(tmp_path):
    store = create(tmp_path)
    store.append(evaluation(0))
    rows = store._file["evaluations"]
    row = rows[0]
    row["training.gradient_clip"] = b"1."
    rows[0] = row
    rows.flush()
    (one,) = read_evaluations(tmp_path)
    assert one.parameters["training.gradient_clip"] == 1.0


def test_a_look_brings_what_came_since_the_last_one(tmp_path):
    additions, tally = Additions(tmp_path), Tally()
    first, second = create(tmp_path), create(tmp_path, worker=1)
    assert additions.read() == []
    shown = []
    for number, store in enumerate([first, first, second, first, second]):
        one = evaluation(number, loss=0.5 - 0.1 * (number % 3), curve=(0.5,) * (number % 3))
        store.append(one)
        shown.append(one)
        if number % 2:
            new = additions.read()
            assert sorted(new, key=lambda one: one.number) == shown[number - 1 :]
            tally.add(new)
    tally.add(additions.read())
    second.append(evaluation(1, loss=0.0))  # counted once: what was there first
    assert additions.read() == []
    assert tally.count == 5
    assert tally.best == best_of(shown) == shown[2]
    assert sorted(tally.curves) == sorted(one.curve for one in shown)


def test_a_look_waits_for_a_row_that_has_not_reached_its_file(tmp_path):
    store, additions = create(tmp_path), Additions(tmp_path)
    store.append(evaluation(0))
    rows = store._file["evaluations"]
    row = rows[0]
    rows.resize(2, 0)
    rows.flush()
    assert additions.read() == [evaluation(0)]
    row["number"] = 1
    curves = store._file["curves"]
    found = curves[:]
    found["number"] = 1
    curves.resize(2 * len(found), 0)
    curves[len(found) :] = found
    curves.flush()
    rows[1] = row
    rows.flush()
    assert [one.number for one in additions.read()] == [1]
    assert additions.read() == []


def test_a_look_reads_no_row_twice(tmp_path, monkeypatch):
    store, additions = create(tmp_path), Additions(tmp_path)
    read = []

    def noting(path, *first):
        rows, curves = _read(path, *first)
        read.append((len(rows), len(curves)))
        return rows, curves

    monkeypatch.setattr("app.search.store._read", noting)
    for number in range(6):
        store.append(evaluation(number))
        additions.read()
    assert read == [(1, len(evaluation(0).curve))] * 6


def test_the_seconds_of_a_search_are_those_of_its_sessions(tmp_path):
    assert seconds_spent(tmp_path) == 0
    times = {  # session, worker: start and seconds of each evaluation
        (0, 0): [("12:00:10", 20), ("12:00:30", 25)],
        (0, 1): [("12:00:00", 10), ("12:00:12", 50)],  # from 0 to 62
        (1, 0): [("15:30:00", 7)],
        (2, 0): [],
    }
    numbers = itertools.count()
    for (session, worker), evaluations in times.items():
        store = create(tmp_path, session=session, worker=worker)
        for start, seconds in evaluations:
            started = f"2026-11-24T{start}.000+00:00"
            store.append(evaluation(next(numbers), started=started, seconds=float(seconds)))
    assert seconds_spent(tmp_path) == 62 + 7


def test_a_failure_keeps_the_end_of_its_traceback(tmp_path):
    store = create(tmp_path)
    text = "Traceback\n" + "é" * 9000 + "\nMemoryError: the last line"
    failed = evaluation(
        0,
        status="out of memory",
        error=math.nan,
        step_seconds=math.nan,
        loss=FAILED,
        traceback=text,
    )
    store.append(failed)
    (read,) = read_evaluations(tmp_path)
    assert read.traceback.endswith("MemoryError: the last line")
    assert read.status == "out of memory"
    assert math.isnan(read.error)
    assert not read.succeeded


def test_the_best_is_the_least_loss_that_came_to_an_end():
    ones = [evaluation(i) for i in range(4)]
    assert best_of(ones).number == 3
    hopeless = replace(evaluation(4), status="hopeless", loss=0.0)
    failed = replace(evaluation(5), loss=FAILED)
    assert best_of([*ones, hopeless, failed]).number == 3
    assert best_of([hopeless, failed]) is None


def test_what_did_not_come_to_an_end_is_shown_after_what_did():
    ones = [evaluation(i) for i in range(3)]  # the later, the better
    hopeless = replace(evaluation(4), status="hopeless", loss=0.0)  # of an earlier version
    failed = replace(evaluation(5), status="failed", loss=FAILED)
    shown = best_first([failed, hopeless, *ones])
    assert [one.number for one in shown] == [2, 1, 0, 4, 5]


def test_a_row_that_never_reached_the_file_does_not_count(tmp_path):
    store = create(tmp_path)
    store.append(evaluation(0))
    dataset = store._file["evaluations"]
    dataset.resize(2, axis=0)
    dataset.flush()
    assert read_evaluations(tmp_path) == [evaluation(0)]


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from support.evaluations import create, evaluation\n"
        "store = create(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    store.append(evaluation(number))\n"
        "    print(number, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in writer.stdout:
            if int(line) == 40:
                os.kill(writer.pid, signal.SIGKILL)
        writer.wait(timeout=TIMEOUT)
    finally:
        writer.kill()
    found = read_evaluations(tmp_path)
    assert len(found) > 40
    for number, one in enumerate(found):
        assert asdict(one) == asdict(evaluation(number))


def test_a_damaged_file_is_named(tmp_path):
    create(tmp_path).close()
    (path,) = tmp_path.glob("*.h5")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{path}: not a readable HDF5 file"):
        read_evaluations(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "chunk", "left"),
    # Chunks of 16 rows; three epochs each: the curve of number 10 lies in two chunks.
    [("evaluations", 1, 16), ("evaluations", 0, 0), ("curves", 2, 10), ("curves", 0, 0)],
)
def test_what_is_before_the_damage_is_kept(tmp_path, dataset, chunk, left):
    store = create(tmp_path)
    for number in range(20):
        store.append(evaluation(number))
    store.close()
    (path,) = tmp_path.glob("*.h5")
    damaged = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        damaged[file[dataset].id.get_chunk_info(chunk).byte_offset + 5] ^= 1
    path.write_bytes(damaged)
    (line,) = mend(tmp_path, PARAMETERS)
    aside = path.with_name("session-0000-worker-00000-damaged.h5")
    assert line.startswith(f"WARNING: {path}: not a readable HDF5 file (")
    assert f"it stays as {aside.name}, and {left} evaluations of it are left" in line
    assert aside.read_bytes() == damaged
    assert read_evaluations(tmp_path) == [evaluation(number) for number in range(left)]
    assert sessions(tmp_path) == 1
    assert mend(tmp_path, PARAMETERS) == []


def test_an_evaluation_is_not_written_into_a_file_that_is_gone(tmp_path):
    store = create(tmp_path)
    (path,) = tmp_path.glob("*.h5")
    path.unlink()
    with pytest.raises(StorageError, match=f"{path} was removed, moved or replaced meanwhile"):
        store.append(evaluation(0))


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*: No such file"):
        create(tmp_path / "gone")


def test_the_file_is_plain_hdf5(tmp_path):
    store = create(tmp_path)
    store.append(evaluation(3))
    store.close()
    (path,) = tmp_path.glob("*.h5")
    with h5py.File(path) as file:
        rows = file["evaluations"][:]
    np.testing.assert_array_equal(rows["oialr.delay"], [30])
    assert rows["status"][0] == b"finished"


def test_medians_are_of_what_has_finished():
    tally = Tally()
    for number, status in enumerate(("finished", "hopeless", "diverged", "finished")):
        tally.add([evaluation(number, status=status, curve=(float(number),))])
    assert (tally.count, tally.curves) == (4, [(0.0,), (3.0,)])
    # Nor the larger networks, against which those within the bound would be given up.
    tally.add([evaluation(4, loss=OUT_OF_BOUNDS + 0.5), evaluation(5, loss=1.0, curve=(5.0,))])
    assert tally.curves == [(0.0,), (3.0,), (5.0,)]
