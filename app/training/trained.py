"""A run's trained network out of its folder: the weights that were tested, for their use."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app import config
from app.config.settings import Configuration
from app.errors import AgreedUserError, UserError
from app.runtime.processes import Runtime
from app.training.build import Parts, build
from app.training.checkpoint import CHECKPOINT_KEYS, Checkpoints
from app.training.description import read_description
from app.training.evaluation import evaluate
from app.training.initial import load_initial
from app.training.same_data import check_stored_data, restore_preprocessing
from app.training.state import restore
from app.training.storage import early_stopping_of
from oialr.export.formats import read_exported
from oialr.files import is_stored
from oialr.placement.processes import Processes

PROGRAMS = (".onnx", ".pt2")
"""Suffixes of files that hold a whole network, for the CPU."""


def read_configuration(run: Path, overrides: Iterable[str] = ()) -> Configuration:
    """Return the configuration of a run's folder, or of a YAML file.

    Raises:
        UserError: there is none, or a mistake in it.
    """
    if not run.is_dir():
        return config.load(run, overrides)
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} holds no run (no config.yaml there)")
    return config.load(run / "config.yaml", overrides, folder=str(run))


def run_of(file: Path) -> Path:
    """Return the folder of the run that an exported file lies in.

    Raises:
        UserError: it lies in none.
    """
    for folder in file.resolve().parents[:2]:
        if (folder / "config.yaml").exists():
            return folder
    raise UserError(f"{file} lies in the folder of no run: name its run or configuration by --run")


def has_weights(run: Path) -> bool:
    """Whether a run's folder holds a checkpoint, without which nobody can use its network."""
    return bool(Checkpoints(run / "checkpoints", Processes(), keep=1, read_only=True).complete())


@contextmanager
def trained(configuration: Configuration, runtime: Runtime) -> Iterator[tuple[Parts, int]]:
    """Bring the parts of a run to the weights that it tests. A collective call.

    They are those of the best epoch with early stopping, the average with training.ema_decay, and
    else those of the newest checkpoint. The run need not be finished.

    Args:
        configuration: of the run, with its folder as run.dir.
        runtime: this process among those that read.

    Yields:
        The parts, of which the model has these weights within the context, and their step.

    Raises:
        UserError: there is no checkpoint, or it does not fit.
    """
    folder = Path(configuration.run.dir or "")
    processes = runtime.processes
    checkpoints = Checkpoints(
        folder / "checkpoints", processes, keep=1, keys=CHECKPOINT_KEYS, read_only=True
    )
    state = checkpoints.load()
    if state is None:
        raise AgreedUserError(f"{folder} has no checkpoint: there are no weights as yet")
    # Checkpoints of earlier versions do not know how many steps their run had.
    steps = state[0].get("steps")
    parts = build(configuration, runtime, initial=False, trains=False, steps=steps)
    early_stopping = early_stopping_of(configuration, folder, processes, read_only=True)
    processes.agree(lambda: restore(parts, early_stopping, *state))
    step = None
    if early_stopping:
        step = early_stopping.restore_best(parts.model)
    average = parts.average if step is None else None
    with average.applied() if average else nullcontext():
        yield parts, parts.position.step if step is None else step


def samples_of(parts: Parts, count: int) -> Tensor:
    """Return the first samples of the validation part, at most so many: (b, ...) on the device."""
    found: list[Tensor] = []
    for batch in parts.task.evaluation_batches("validation"):
        if count <= 0:
            break
        found.append(batch.inputs[: min(count, batch.count)])
        count -= len(found[-1])
    if not any(map(len, found)):
        raise UserError("data: the validation part has no samples to compare with")
    return torch.cat(found)


def evaluate_run(
    configuration: Configuration, runtime: Runtime, part: str
) -> tuple[dict[str, float], int]:
    """Return the figures of a run's weights on a part of the data, and the step of the weights."""
    with trained(configuration, runtime) as (parts, step), parts.precision.autocast():
        return figures_of(parts, parts.model, part), step


def evaluate_file(
    file: Path, configuration: Configuration, runtime: Runtime, part: str
) -> dict[str, float]:
    """Return the figures of an exported file on a part of the data. A collective call.

    Args:
        file: of any format of :mod:`oialr.export`.
        configuration: tells the data, and the network of a file of weights.
        runtime: this process; on the CPU for a file that holds a whole network.
        part: "validation" or "test".

    Raises:
        UserError: the file cannot be read, or belongs to another network.
    """
    # The file itself says what is low-rank in it.
    full_rank = configuration.oialr.model_copy(update={"enabled": False})
    configuration = configuration.model_copy(update={"oialr": full_rank})
    parts = build(configuration, runtime, initial=False, trains=False)

    def read() -> Any:
        if described := read_description(file):
            check_stored_data(parts.data, described["data"])
            restore_preprocessing(parts.task, described["input"]["preprocessing"])
        try:
            return read_exported(file, parts.model)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except ValueError as error:
            if not is_stored(file):  # a state_dict that others have written, perhaps
                try:
                    load_initial(parts.model, str(file))
                except UserError:
                    pass
                else:
                    return parts.model.eval()
            raise UserError(str(error)) from None

    network = runtime.processes.agree(read)
    if isinstance(network, nn.Module) and file.suffix not in PROGRAMS:
        return figures_of(parts, network.to(runtime.device), part)
    return figures_of(parts, _Called(network), part)


def figures_of(parts: Parts, model: nn.Module, part: str) -> dict[str, float]:
    """Return a network's loss and figures of merit on a part of the data. A collective call.

    Raises:
        UserError: the data have no such part.
    """
    if part not in parts.task.splits:
        names = ", ".join(parts.task.splits)
        raise AgreedUserError(f"--part: the data have no part {part}: {names}")
    runtime = parts.runtime
    figures = evaluate(model, parts.task, part, runtime.processes, runtime.device)
    assert figures is not None  # nobody asks for a stop
    return figures


class _Called(nn.Module):
    """A network that is no module, or one that knows no modes."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = [network]  # in a list, which hides it from the module

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the one output."""
        output = self._network[0](inputs)
        (tensor,) = output if isinstance(output, list) else (output,)
        assert isinstance(tensor, torch.Tensor)
        return tensor
