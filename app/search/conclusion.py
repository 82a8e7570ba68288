"""The end of a search: the winner trained once more, with its test part, and the summary."""

import json
import shutil
from pathlib import Path
from typing import Any

from app import config
from app.config.settings import Configuration
from app.errors import AgreedUserError, UserError
from app.runtime.lease import Claim
from app.runtime.stop_signal import StopRequest
from app.runtime.workers import Workers, wait
from app.search.definition import Definition, train_again
from app.search.store import STORE, Evaluation, read_evaluations
from app.search.tally import best_of
from app.training.folder import write_text
from app.training.position import Stopped
from app.training.run import train


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The search was stopped by a signal; it can be resumed."""


class NoResult(Exception):  # noqa: N818 - evaluations failed, the search did not
    """No evaluation came to a result."""


def write_best(definition: Definition, best: Evaluation, folder: Path) -> None:
    """Write the best so far as a configuration of its own, best.yaml.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(folder / "best.yaml", config.to_yaml(definition.best(best.number, best.parameters)))


def conclude(
    definition: Definition,
    workers: Workers,
    stop_signal: StopRequest,
    claim: Claim,
    times: tuple[float, float, float],
) -> dict[str, Any]:
    """Train the best, with its test part, and sum up. Collective over all workers.

    Args:
        definition: of the search.
        workers: this process among them.
        stop_signal: asks for a stop.
        claim: on the search's folder.
        times: of this process, see :attr:`app.search.session._Session.times`.

    Returns:
        The summary, as in summary.json.

    Raises:
        AgreedUserError: the best cannot be trained.
        Interrupted: a signal came before the end.
        NoResult: every evaluation failed.
    """
    world, folder = workers.world, claim.folder
    first = world.Get_rank() == 0
    evaluations = world.bcast(read_evaluations(folder / STORE) if first else None)
    busy, working, total = (sum(column) for column in zip(*world.allgather(times), strict=True))
    best = best_of(evaluations)
    if best is None:
        raise NoResult(f"no evaluation in {folder} came to a result")
    if first:
        claim.check()
        write_best(definition, best, folder)
    figures: dict[str, Any] = {}
    if definition.base.search.train_best:
        figures = _train_best(definition, best, workers, stop_signal, folder)
    summary = {
        "evaluations": len(evaluations),
        "failed": sum(one.status not in ("finished", "hopeless") for one in evaluations),
        "best_number": best.number,
        "best_loss": best.loss,
        "validation_error": best.error,
        **{key: value for key, value in figures.items() if key.startswith("test_")},
        "trainable_percent": best.trainable_percent,
        "workers": workers.count,
        "processes_per_worker": workers.own.Get_size(),
        "seconds": round(times[2], 3),
        "train_again": train_again(folder, best.processes, best.number),
        "overhead_percent": 100 * (1 - busy / working) if busy else 0.0,  # nothing was left to do
        "idle_percent": 100 * (1 - working / total),
    }
    if first:
        claim.check()
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _train_best(
    definition: Definition,
    best: Evaluation,
    workers: Workers,
    stop_signal: StopRequest,
    folder: Path,
) -> dict[str, Any]:
    """Train the best as it was evaluated, on the first worker, unless that was done before.

    Returns:
        The summary of the run, on all processes.
    """
    summary, stopped, problem = None, False, None
    if workers.index == 0:
        configuration = definition.best(best.number, best.parameters)
        run = configuration.run.model_copy(update={"dir": str(folder / "best")})
        configuration = configuration.model_copy(update={"run": run})
        with workers.join(timeout=configuration.distributed.timeout) as runtime:
            same = runtime.processes.from_first(trains_alike(configuration, folder / "best"))
            if not same and runtime.is_first:
                shutil.rmtree(folder / "best", ignore_errors=True)
            try:
                summary = train(configuration, runtime, stop_signal, resume=same).summary
            except Stopped:
                stopped = True
            except AgreedUserError as error:  # of this worker: the others wait
                problem = str(error)
    wait(workers.world)
    reports = workers.world.allgather((stopped, problem))
    if problem := next((problem for _, problem in reports if problem), None):
        raise AgreedUserError(f"the best of {folder} cannot be trained: {problem}")
    if any(stopped for stopped, _ in reports):
        raise Interrupted(f"the training of the best in {folder} was stopped by a signal")
    result: dict[str, Any] = workers.world.bcast(summary)
    return result


def trains_alike(configuration: Configuration, folder: Path) -> bool:
    """Whether the run in a folder is trained as configured: what remains of it is good.

    How it is searched makes no difference to a run, nor does the way its folder is spelled.

    Args:
        configuration: of the best.
        folder: of a run, which need not exist.
    """
    try:
        stored = config.load(folder / "config.yaml")
    except UserError:  # there is none, it is damaged, or it is of another version
        return False
    besides: dict[str, Any] = {"search": True, "run": {"dir"}}
    return stored.model_dump(exclude=besides) == configuration.model_dump(exclude=besides)
