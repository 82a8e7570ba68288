"""Workarounds for other packages: one function each, with the version seen and when it can go."""

import importlib
import sys
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
