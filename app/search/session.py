"""A search from its definition to its summary: puts the parts together."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from app.runtime.launch import Launch
from app.runtime.lease import Claim, Lease
from app.runtime.rendezvous import make_store
from app.runtime.stop_signal import StopRequest
from app.runtime.workers import Workers, wait
from app.search import objective
from app.search.budget import Budget
from app.search.conclusion import Interrupted, conclude, write_best
from app.search.definition import STORED, Definition
from app.search.evaluation import evaluate, leave_sign
from app.search.evolution import Known, check_islands, evolve, island_of
from app.search.progress import Progress
from app.search.store import (
    STORE,
    Additions,
    Evaluation,
    Store,
    mend,
    read_evaluations,
    seconds_spent,
    sessions,
)
from app.search.tally import Tally
from app.training.folder import check_free, make_folder, naming, write_text
from app.training.inspection import check_run
from oialr.compatibility import import_heat


def search(
    definition: Definition,
    workers: Workers,
    stop_signal: StopRequest,
    *,
    resume: bool,
    start: float,
    on_folder: Callable[[Path], None],
) -> dict[str, Any]:
    """Search as defined, in the folder run.dir, and train the best. Collective over all workers.

    Args:
        definition: checked; run.dir may be None in a new search.
        workers: this process among them.
        stop_signal: asks for a stop.
        resume: go on with what the folder holds.
        start: value of time.perf_counter() at the start of the program.
        on_folder: told of the search's folder as soon as there is one, on every process.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: data, model, space or folder are not what the definition says; on all processes.
        StorageError: a file system failed, or another program owns the folder; on some processes.
        Interrupted: a signal came before the end.
        NoResult: every evaluation failed.
    """
    definition = definition.counted(workers.count)
    section = definition.base.search
    islands = workers.agree(lambda: check_islands(section, workers.count))
    _check_free(definition, workers, resume=resume)
    with ExitStack() as held:

        def own(folder: Path) -> Claim:
            """Let process 0 own the folder until the search ends; all may hold that against it."""
            world = workers.world
            lease = workers.agree(lambda: None if world.Get_rank() else Lease.take(folder))
            claim = world.bcast(held.enter_context(lease).claim if lease else None)
            assert isinstance(claim, Claim)
            return claim

        claim: Claim | None = None
        if resume:
            assert definition.base.run.dir is not None
            claim = own(Path(definition.base.run.dir))
        _check_all(definition, workers, resume=resume)
        folder = _prepare_folder(definition, workers)
        on_folder(folder)
        if claim is None:
            claim = own(folder)
            _check_free(definition, workers, resume=resume)  # nothing has begun there meanwhile
        if workers.world.Get_rank() == 0:
            claim.check()
            write_text(folder / STORED, definition.to_yaml())
            (folder / "summary.json").unlink(missing_ok=True)  # of the search that goes on now
        session = _Session(definition, workers, stop_signal, claim=claim, islands=islands)
        try:
            session.run(start)
        finally:
            session.close()
        return conclude(definition, workers, stop_signal, claim, session.times)


def _check_all(definition: Definition, workers: Workers, *, resume: bool) -> None:
    """Find out on every process whether what all candidates share can be built."""
    if definition.base.distributed.factorization == "heat" and find_spec("heat"):
        import_heat()  # a collective call of all processes, which no worker can make later
    # The first worker before the others, so that data are downloaded once.
    workers.agree(lambda: None if workers.index else _check(definition, workers, resume=resume))
    workers.agree(lambda: _check(definition, workers, resume=resume) if workers.index else None)


def _check_free(definition: Definition, workers: Workers, *, resume: bool) -> None:
    """Reject a folder that holds a search or a run already, on all processes alike."""
    directory = definition.base.run.dir

    def check() -> None:
        if directory is not None and not workers.world.Get_rank():
            check_free(Path(directory))

    if not resume:
        workers.agree(check)


def _prepare_folder(definition: Definition, workers: Workers) -> Path:
    """Make the search's folder; the same path on all processes."""

    def prepare() -> Path | None:
        if workers.world.Get_rank():
            return None
        folder = make_folder(definition.base.run)
        with naming("run.dir", folder):
            (folder / STORE).mkdir(exist_ok=True)
        return folder

    folder = workers.world.bcast(workers.agree(prepare))
    assert isinstance(folder, Path)
    return folder


def _check(definition: Definition, workers: Workers, *, resume: bool) -> None:
    """Build what all candidates share, once, and hold every delay against the number of steps.

    Raises:
        UserError: what would make every evaluation fail, or those at an end of the space.
    """
    base = definition.base
    with workers.join(timeout=base.distributed.timeout) as runtime:
        train_size = check_run(base, runtime)
    definition.check_candidates(train_size, resume=resume)


class _Session:
    """One start of a search, on one process."""

    def __init__(
        self,
        definition: Definition,
        workers: Workers,
        stop_signal: StopRequest,
        *,
        claim: Claim,
        islands: int,
    ) -> None:
        """Read what earlier sessions have found. Collective over all workers."""
        folder = claim.folder
        self._definition = definition
        self._workers = workers
        self._signal = stop_signal
        self._folder, self._claim = folder, claim
        self._island = island_of(workers.index, workers.count, islands)
        world, section = workers.world, definition.base.search
        store = folder / STORE
        parameters = definition.space.column_types()
        first = world.Get_rank() == 0
        self._mended = mend(store, parameters) if first else []
        self._number, self._earlier, spent = world.bcast(
            (sessions(store), read_evaluations(store), seconds_spent(store)) if first else None
        )
        limit = section.evaluations
        deadline = time.monotonic() + 3600 * (section.hours or math.inf) - spent
        launch = Launch(
            launcher="mpi", process_index=world.Get_rank(), process_count=world.Get_size()
        )
        self._budget = Budget(
            make_store(
                launch, world, timeout=timedelta(seconds=definition.base.distributed.timeout)
            ),
            finished={one.number for one in self._earlier},
            limit=limit,
            deadline=deadline,
        )
        self._progress = Progress(finished=len(self._earlier), total=limit, deadline=deadline)
        self._store: Store | None = None
        self._additions, self._tally = Additions(store), Tally()
        if workers.is_first:
            self._store = Store.create(
                store, session=self._number, worker=workers.index, parameters=parameters
            )
        self._medians: list[float] = []
        self._next: int | None = None
        self._busy = 0.0
        self.times = (0.0, 0.0, 0.0)
        """Seconds in evaluations, until the end of the last one, until all workers had theirs."""

    def run(self, start: float) -> None:
        """Evaluate until the budget is used up.

        Args:
            start: value of time.perf_counter() at the start of the program.
        """
        if self._workers.world.Get_rank() == 0:
            base, count = self._definition.base, self._workers.count
            for line in self._mended:
                self._progress.warn(line)
            self._progress.say(
                f"search {self._folder}: {count} workers of {base.search.processes_per_worker} "
                f"processes on {self._workers.device.type}, {len(self._earlier)} evaluations done"
            )
        if self._store:
            self._tally.add(self._additions.read())
        self._take_next()
        self._last_end = time.perf_counter()
        evolve(
            self._judge,
            section=self._definition.base.search,
            keys=self._definition.space.keys,
            workers=self._workers,
            seed=[self._definition.base.run.seed, self._number],
            known=self._known(),
            begin=self._next is not None,
            folder=self._folder,
        )
        wait(self._workers.world)
        end = time.perf_counter()
        self.times = (self._busy, self._last_end - start, end - start)
        interrupted = self._signal.number or self._budget.stopped()
        if any(self._workers.world.allgather(interrupted)):
            raise Interrupted(f"the search in {self._folder} was stopped by a signal")

    def close(self) -> None:
        """Close this worker's file."""
        if self._store:
            self._store.close()

    def _judge(self, position: np.ndarray) -> tuple[float, bool]:
        """Evaluate a candidate and see to the next; see :class:`app.search.evolution.Evaluate`."""
        assert self._next is not None
        start = time.perf_counter()
        evaluation = evaluate(
            self._definition,
            number=self._next,
            values=self._definition.space.decode(position),
            island=self._island,
            folder=self._folder,
            workers=self._workers,
            medians=self._medians,
            stop_signal=self._signal,
            stopped_elsewhere=self._budget.stopped,
        )
        self._last_end = time.perf_counter()
        if evaluation is None:
            self._budget.stop()
            return objective.FAILED, True
        self._busy += self._last_end - start
        self._record(evaluation)
        return evaluation.loss, self._next is None

    def _record(self, evaluation: Evaluation) -> None:
        """Store an evaluation, tell of it, and claim the next. Collective in the worker."""
        if self._store:
            self._claim.check()
            self._store.append(evaluation)
            leave_sign(self._folder / evaluation.folder)
            self._tally.add(self._additions.read())
            best = self._tally.best
            self._progress.evaluation(evaluation, self._tally.count, best)
            if best is not None and best.number == evaluation.number:
                write_best(self._definition, best, self._folder)
        self._take_next()

    def _take_next(self) -> None:
        """Claim a number and learn the medians by the worker's first process. Collective in it."""
        news = None
        if self._workers.is_first:
            news = (self._budget.claim(), objective.medians(self._tally.curves))
        self._next, self._medians = self._workers.own.bcast(news)

    def _known(self) -> list[Known]:
        space = self._definition.space
        return [
            Known(
                position=space.encode(one.parameters),
                loss=one.loss,
                worker=one.worker,
                island=one.island,
            )
            for one in self._earlier
        ]
