"""Where a run leaves what it comes to: its folder, checkpoints, records and best weights."""

import itertools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import to_yaml
from app.config.settings import Configuration
from app.errors import UserError
from app.recording.loggers.chosen import Loggers, find_loggers
from app.recording.store import read_rows
from app.recording.swmr import writing
from app.runtime.processes import Runtime
from app.runtime.watchdog import Watchdog
from app.training.build import Parts, read_initial
from app.training.checkpoint import CHECKPOINT_KEYS, Checkpoints
from app.training.early_stopping import BEST_KEYS, EarlyStopping
from app.training.folder import (
    check_free,
    hold_folder,
    mark_unfinished,
    naming,
    prepare_folder,
    write_text,
)
from app.training.recorder import Recorder
from app.training.state import check_epochs, check_records, check_stop, restore
from app.training.tidying import warn_of_missing_bases
from oialr.placement.processes import Processes

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Storage:
    """What a run writes to; on processes other than the first the recorder does nothing."""

    folder: Path
    checkpoints: Checkpoints
    """Others than at the start where the folder was lost and the run is rescued."""
    recorder: Recorder
    early_stopping: EarlyStopping | None
    """None without training.early_stopping."""


class Ownership:
    """Of the run's folder, from when it is known to the end of the run."""

    def __init__(self, held: ExitStack, runtime: Runtime) -> None:
        """Own nothing as yet; what is owned is given back when ``held`` ends."""
        self._held, self._runtime = held, runtime
        self._check: Callable[[], None] | None = None

    def take(self, folder: Path) -> None:
        """Own the folder if it is not owned already. A collective call.

        Raises:
            AgreedUserError: another program owns it.
        """
        if self._check is None:
            self._check = self._held.enter_context(hold_folder(folder, self._runtime))

    def check(self) -> None:
        """Make sure, before something is written, that no other program has taken over.

        Raises:
            StorageError: one has.
        """
        assert self._check
        self._check()


def open_storage(
    parts: Parts,
    watchdog: Watchdog,
    ownership: Ownership,
    *,
    earlier: Path | None,
    stop_given: bool,
    test: bool,
) -> Storage:
    """Make or find the run's folder, and bring the parts to its checkpoint. A collective call.

    Args:
        parts: which fit together, so that a new folder may be made.
        watchdog: told of the progress.
        ownership: of the folder, which is taken as soon as there is one.
        earlier: folder of a run that goes on; None: a new one is made.
        stop_given: whether run.stop_after was given for this session. One that was stored may be
            behind the run, which it has stopped.
        test: whether the test part is evaluated at the end. If not, and no checkpoints are kept,
            nobody needs the best weights.

    Raises:
        UserError: the folder or the checkpoint are not what the configuration says.
    """
    configuration, runtime = parts.configuration, parts.runtime
    processes = runtime.processes
    loggers = processes.agree(
        lambda: find_loggers(configuration.run.loggers if runtime.is_first else [])
    )
    watchdog.progress("the run's folder")
    folder = prepare_folder(configuration, runtime, earlier=earlier)
    ownership.take(folder)
    if not earlier:  # while this run was built another one may have begun there, and ended
        processes.agree(lambda: check_free(folder) if runtime.is_first else None)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        processes,
        keep=configuration.run.keep_checkpoints,
        keys=CHECKPOINT_KEYS,
        check_owner=ownership.check,
    )
    with watchdog.guard("the stored state"):
        state = checkpoints.load() if earlier else None
    keep = 1 if test or configuration.run.keep_checkpoints else 0
    early_stopping = early_stopping_of(configuration, folder, processes, ownership.check, keep=keep)
    if state:
        processes.agree(lambda: check_epochs(parts, state[0]))
        processes.agree(lambda: check_records(parts, state[0]))
        processes.agree(lambda: restore(parts, early_stopping, *state))
        processes.agree(lambda: check_stop(parts, folder) if stop_given else None)
        warn_of_missing_bases(parts, state[1])
    elif earlier:  # stopped before its first checkpoint
        processes.agree(lambda: _begin_anew(folder, ownership) if runtime.is_first else None)
        processes.agree(lambda: read_initial(configuration, parts.model))
    recorder = Recorder(None)
    with watchdog.guard("metrics.h5"):
        if runtime.is_first:
            with writing(folder / "metrics.h5"):
                ownership.check()
                recorder = _open_recorder(parts, folder, state[0] if state else None)
            recorder.loggers = Loggers.begin(
                loggers,
                folder,
                configuration=configuration.model_dump(),
                first_step=parts.position.step if state else None,
            )
        processes.barrier()
    mark_unfinished(folder, runtime)
    recorder.session(process_count=runtime.process_count, first_step=parts.position.step)
    return Storage(
        folder=folder, checkpoints=checkpoints, recorder=recorder, early_stopping=early_stopping
    )


def early_stopping_of(
    configuration: Configuration,
    folder: Path,
    processes: Processes,
    check_owner: Callable[[], None] = lambda: None,
    *,
    keep: int = 1,
    read_only: bool = False,
) -> EarlyStopping | None:
    """Return what keeps a run's best weights; None without training.early_stopping. Collective.

    Args:
        configuration: of the run.
        folder: of the run.
        processes: who writes and reads together.
        check_owner, keep, read_only: as of :class:`Checkpoints`.
    """
    patience = configuration.training.early_stopping
    if patience is None:
        return None
    best = Checkpoints(
        folder / "checkpoints" / "best",
        processes,
        keep=keep,
        keys=BEST_KEYS,
        check_owner=check_owner,
        read_only=read_only,
    )
    return EarlyStopping(best, patience=patience)


def _open_recorder(parts: Parts, folder: Path, state: dict[str, Any] | None) -> Recorder:
    """Write to the run's folder, now that everything fits together."""
    text = to_yaml(parts.configuration)
    metrics = folder / "metrics.h5"
    schema: dict[str, Any] = {
        "configuration": text,
        "layers": parts.layers,
        "figures": parts.task.figures,
    }
    if state:
        recorder = Recorder.resume(metrics, state["rows"], state.get("kept_rows", {}), **schema)
        write_text(folder / "config.yaml", text)  # of a run that can go on
        return recorder
    write_text(folder / "config.yaml", text)
    return Recorder.create(metrics, **schema)


def _has_steps(metrics: Path) -> bool:
    """Whether steps are recorded in a file, or it cannot be told, since it is damaged."""
    if not metrics.exists():
        return False
    try:
        return len(read_rows(metrics, "train")["step"]) > 0
    except UserError:
        return True


def _begin_anew(folder: Path, ownership: Ownership) -> None:
    """Keep the records of a run that goes on without a checkpoint, and say that it begins anew.

    Raises:
        UserError: it was finished, so that its checkpoints are lost, or none were to be kept.
    """
    if (folder / "summary.json").exists():
        raise UserError(
            f"--resume {folder}: the run is finished, and none of its checkpoints is there to go "
            "on from; put them back, or start a new run in another folder"
        )
    metrics = folder / "metrics.h5"
    if not _has_steps(metrics):
        return
    ownership.check()
    names = (folder / f"metrics-before-{number}.h5" for number in itertools.count(1))
    kept = next(path for path in names if not path.exists())
    with naming("run.dir", folder):
        metrics.rename(kept)
    logger.warning(
        "%s holds no checkpoint: the run begins with its first step again; what it has recorded "
        "so far is kept in %s",
        folder,
        kept.name,
    )
