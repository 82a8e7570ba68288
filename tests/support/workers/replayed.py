"""A run whose last epoch is ended by a session of its own, and its replay, for test_faults.py.

The harness forks, which wants a process that nothing else has happened in.
"""

import sys
from pathlib import Path

from benchmarks.trials.comparison import difference, read_outcome
from benchmarks.trials.runs import STEPS, replay, sessions, start

folder = Path(sys.argv[1]) / "run"
assert not any(start(folder, (), 2, f"run.stop_after={STEPS}").wait().codes)  # as of torchrun
assert start(folder, (), 1, "run.stop_after=null").wait().codes == (0,)
assert sessions(folder) == [(2, 0), (1, STEPS)]
again = replay(folder.with_name("again"), (), sessions(folder))
assert difference(read_outcome(folder), again, counts_changed=True) is None
