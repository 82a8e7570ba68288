"""Workarounds for what the library imports: one function each, with the version seen."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_libraries: list[Any] = []
"""Declarations of operators, which last as long as the objects that made them."""


def import_torchvision() -> None:
    """Import torchvision even where its compiled operators do not load; idempotent.

    Call it before an import of torchvision, or of timm, which imports torchvision.

    Seen with torchvision 0.28.0: its wheel is built against a CUDA torch, and beside a CPU torch
    the import fails with "operator torchvision::nms does not exist", since it describes operators
    that nobody has declared. Declared by schema alone they satisfy it; datasets, transforms and
    models need none of them. With a torchvision that imports, nothing else is done. It can go when
    the wheel imports beside a CPU torch.

    Raises:
        RuntimeError: torchvision does not import for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import has left behind
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    importlib.import_module("torchvision")


def import_heat() -> Any:
    """Import heat, and leave torch's random generators as they are; return the package.

    A collective call: the import duplicates MPI's COMM_WORLD.

    Seen with heat 1.8.0: its random module seeds torch's generators with the time of day when it is
    imported. It can go when the import no longer does. It imports torchvision unconditionally, see
    :func:`import_torchvision`.
    """
    import torch

    import_torchvision()
    with torch.random.fork_rng():
        return importlib.import_module("heat")


@contextmanager
def free_communicators_of_heat() -> Iterator[None]:
    """Free the MPI communicators that heat makes in the block, at its end.

    Seen with heat 1.8.0: its linear algebra never frees the communicators that it makes by
    MPICommunication.Split; under MPICH the 1,022nd tall-skinny QR aborts for want of another. All
    processes of a communicator split it in the same order, so they also free in the same order, as
    MPI demands. It can go with the release after 1.8, which frees them itself.
    """
    from heat.core.communication import MPICommunication

    split, made = MPICommunication.Split, []

    def remember(self: Any, *arguments: Any, **options: Any) -> Any:
        made.append(split(self, *arguments, **options))
        return made[-1]

    MPICommunication.Split = remember  # type: ignore[method-assign]
    try:
        yield
        for communicator in made:
            communicator.Free()
    finally:
        MPICommunication.Split = split  # type: ignore[method-assign]


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer and nn.MultiheadAttention from their one kernel for all.

    It calls none of their layers, so that nobody sees what these meet, and ONNX does not know it.
    The setting is the whole program's and comes back at the end.
    """
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
