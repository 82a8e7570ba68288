"""The weights that a run starts from, out of a file (model.initial), in place of random ones."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from app.errors import UserError
from app.training.checkpoint import Checkpoints
from app.training.foreign_files import (
    STATE_KEYS,
    CheckpointError,
    find_state,
    load,
    without_wrappers,
)
from oialr.layers.base import FROZEN
from oialr.naming import some
from oialr.placement.processes import Processes

MOST_PREFIXES = 3
"""Parts before all names, such as those of two wrappers around a module of Lightning."""


@torch.no_grad()
def load_initial(model: nn.Module, path: str) -> None:
    """Give a full-rank network the weights of a file; every one of them, and nothing else.

    Names may have what DistributedDataParallel and torch.compile put into them, or one prefix that
    all of them share.

    Args:
        model: on any device; its parameters and buffers are overwritten in place.
        path: of a file of safetensors or torch.save, or a folder of a run or of its checkpoint.

    Raises:
        UserError: it cannot be read or does not fit the network, which is then as it was.
    """
    file = _find_file(Path(path))
    try:
        state = find_state(load(file))
    except CheckpointError as error:
        raise UserError(f"model.initial: {error}") from None
    if state is None:
        raise UserError(
            f"model.initial: {file}: no state_dict, neither at the top nor under "
            f"{', '.join(STATE_KEYS)}"
        )
    own = model.state_dict()
    state = _of_the_network(state, own)
    if problem := _misfit(state, own):
        raise UserError(f"model.initial: {file} does not fit the network: {problem}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"model.initial: {path} not found")
        return path
    if (path / "state.pt").exists():
        return path / "state.pt"
    complete = Checkpoints(path / "checkpoints", Processes(), keep=1).complete()
    if not complete:
        raise UserError(
            f"model.initial: {path} is neither a run with checkpoints nor one checkpoint; name a "
            f"file of weights"
        )
    return complete[-1] / "state.pt"


def _of_the_network(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off of the names what others have put there, if the network's are left then.

    A part of a name may be a wrapper's or the network's own, such as module, and the first part
    may be the one that all of the network's names share, too.
    """
    plain = without_wrappers(state)
    candidates = [plain, _without_prefix(plain)]
    for _ in range(MOST_PREFIXES + 1):
        candidates += [state, without_wrappers(state)]
        state = _without_prefix(state)
    # Where none has all names, the one with most of the network's says best what is wrong.
    return max(candidates, key=lambda names: len(names.keys() & own.keys()))


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the first part of the names, if all share it."""
    if len({name.partition(".")[0] for name in state}) != 1:
        return state
    rest = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state if "" in rest else rest


def _misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say in one line what is missing, too much, of another shape or not finite; or nothing."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if missing and any(name.rpartition(".")[2] in FROZEN for name in unexpected):
        return (
            "it holds low-rank factors, and a run starts full-rank; go on with that run by "
            "--resume, or name a checkpoint from before its conversion"
        )
    shared = [(name, state[name], tensor) for name, tensor in own.items() if name in state]
    shapes = [
        f"{name} is {tuple(stored.shape)} and not {tuple(tensor.shape)}"
        for name, stored, tensor in shared
        if stored.shape != tensor.shape
    ]
    problems = [
        f"{what} {some(names)}"
        for what, names in (
            ("it lacks", missing),
            ("the network has no", unexpected),
            ("of another shape:", shapes),
        )
        if names
    ]
    if problems:
        return "; ".join(problems)
    broken = [
        name
        for name, stored, _ in shared
        if stored.is_meta or (stored.is_floating_point() and not stored.isfinite().all())
    ]
    return f"not finite: {some(broken)}" if broken else ""
