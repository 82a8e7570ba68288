"""What becomes of a run whose folder or metrics.h5 is gone: it is saved beside, from memory."""

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from app.config import to_yaml
from app.errors import AgreedStorageError, StorageError, TakenOverError, UserError
from app.recording.store import LostFileError
from app.training.checkpoint import Checkpoints
from app.training.folder import write_text

if TYPE_CHECKING:
    from app.training.trainer import Trainer


def end_without_storage(trainer: "Trainer") -> NoReturn:
    """End on all processes alike, where the first can write no more. A collective call.

    Raises:
        AgreedStorageError: always; says what became of the run.
    """
    problem = trainer.recorder.problem
    if trainer.runtime.is_first:
        try:
            trainer.storage.checkpoints.check_owner()
        except TakenOverError as error:
            problem = error
        except StorageError:  # the recorder says more
            pass
    problem = trainer.runtime.processes.from_first(problem)
    line = str(problem)
    if isinstance(problem, LostFileError):
        line += f"; {_rescue(trainer, trainer.storage.folder)}"
    raise AgreedStorageError(line)


def _rescue(trainer: "Trainer", folder: Path) -> str:
    """Write a checkpoint, all rows and the configuration into a new folder. A collective call.

    Best weights of early stopping were on the disk alone, and are where that went.

    Args:
        trainer: between two steps.
        folder: the run's, which is not there any more, or without its metrics.h5.

    Returns:
        Where it is, as the end of a line; or why it is nowhere.
    """
    processes = trainer.runtime.processes
    problem, home = "", folder
    if trainer.runtime.is_first:
        try:
            home = _make_sibling(folder)
            trainer.recorder.move_to(home / "metrics.h5")
            write_text(home / "config.yaml", to_yaml(trainer.configuration))
        except (OSError, StorageError) as error:
            problem = f"what was in memory is lost, since {home} cannot be written ({error})"
        except UserError as error:  # the rows cannot be read where they are
            problem = f"what was in memory is lost, since the rows cannot be copied ({error})"
    problem, home = processes.from_first((problem, home))
    if problem:
        return problem
    trainer.storage.checkpoints = Checkpoints(home / "checkpoints", processes, keep=1)
    try:
        trainer.save_checkpoint()
    except AgreedStorageError as error:
        return f"what was in memory is lost ({error})"
    return f"what was in memory is in {home} now: go on with --resume {home}"


def _make_sibling(folder: Path) -> Path:
    sibling, number = folder.with_name(f"{folder.name}-rescued"), 1
    while sibling.exists():
        sibling, number = folder.with_name(f"{folder.name}-rescued-{number}"), number + 1
    sibling.mkdir(parents=True)
    return sibling
