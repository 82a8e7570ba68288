"""HDF5 on file systems without locks: flock is made to fail, as it does there."""

import shutil
import subprocess
import sys

import pytest
from support.launching import ROOT, TIMEOUT, environment

COMPILER = shutil.which("cc")
FLOCK = """
#include <errno.h>
int flock(int handle, int operation) { errno = NUMBER; return -1; }
"""
# A writer with a reader beside it, a second writer in the first one's place, and a search's store.
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support import evaluations, metrics_rows
from app.errors import UserError
from app.recording.store import MetricsStore, read_rows
from app.search.store import read_evaluations
folder = Path(sys.argv[1])
try:
    with metrics_rows.create(folder / "metrics.h5") as store:
        store.append("train", **metrics_rows.train_row(1))
        store.flush()
        assert read_rows(folder / "metrics.h5", "train")["step"].tolist() == [1]
    MetricsStore.resume(folder / "metrics.h5", counts={"train": 1}).close()
    assert read_rows(folder / "metrics.h5", "train")["step"].tolist() == [1]
    (folder / "store").mkdir()
    store = evaluations.create(folder / "store")
    store.append(evaluations.evaluation(0))
    assert len(read_evaluations(folder / "store")) == 1
except OSError as error:
    sys.exit(f"OSError {error.errno}")
"""

pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="a C compiler makes flock fail"
)


def run(folder, number, **variables):
    (folder / "flock.c").write_text(FLOCK.replace("NUMBER", str(number)))
    library = folder / "flock.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, folder / "flock.c"], check=True)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        env={**environment(), "LD_PRELOAD": str(library), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.parametrize("number", [37, 95, 524], ids=["ENOLCK", "EOPNOTSUPP", "ENOTSUPP"])
def test_without_locks_files_are_used_without_and_that_is_told_once(tmp_path, number):
    result = run(tmp_path, number)
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        f"{tmp_path}: its file system has no locks (errno {number}): HDF5 files there are used "
        f"without, as with HDF5_USE_FILE_LOCKING=FALSE\n"
    )


def test_a_function_that_is_not_there_is_forgiven_in_silence(tmp_path):
    result = run(tmp_path, 38)  # ENOSYS, by HDF5 itself
    assert (result.returncode, result.stderr) == (0, "")


def test_who_insists_on_locks_gets_the_error(tmp_path):
    result = run(tmp_path, 37, HDF5_USE_FILE_LOCKING="TRUE")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "OSError 37"


def test_another_failure_is_no_lack_of_locks(tmp_path):
    result = run(tmp_path, 11)  # EWOULDBLOCK: somebody else holds the lock
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["OSError 11"]
