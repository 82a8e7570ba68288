"""What the user of an exported file must know and it does not say: what goes in, what comes out.

It stands in a JSON file beside it, and is what app.evaluate holds data against.
"""

import json
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.training.build import Parts
from app.training.folder import write_text
from app.training.same_data import preprocessing_of


def description_of(file: Path) -> Path:
    """Return where the description of an exported file is."""
    return file.with_name(file.name + ".json")


def describe(file: Path, parts: Parts, step: int) -> None:
    """Write the description of a file.

    Args:
        file: that was exported.
        parts: with the task that its network was trained with.
        step: of its weights.

    Raises:
        StorageError: it cannot be written.
    """
    data = parts.data
    dtype = str(parts.task.example_batch().inputs.dtype).removeprefix("torch.")
    outputs = data["outputs"]
    content = {
        "file": file.name,
        "model": parts.configuration.model.name,
        "step": step,
        "input": {
            "shape": ["batch", *data["input_shape"]],
            "dtype": dtype,
            "preprocessing": preprocessing_of(parts.task),
        },
        "output": {
            "shape": ["batch", *((outputs,) if isinstance(outputs, int) else outputs)],
            "class_names": data["class_names"],
        },
        "data": data,
    }
    write_text(description_of(file), json.dumps(content, indent=2) + "\n")


def read_description(file: Path) -> dict[str, Any] | None:
    """Return the description of an exported file; None: there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = description_of(file)
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if not content["data"].keys() >= {"class_names", "samples"}:
            raise KeyError("data")
        dict(content["input"]["preprocessing"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: export the network anew, or remove it") from None
    return content
