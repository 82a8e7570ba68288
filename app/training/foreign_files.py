"""Opens files of checkpoints, whatever program wrote them, without running what they may hold.

Files of torch.save are pickles, which could call anything. torch's own restricted reader takes
tensors and plain values; what else is found in the files of well-known programs and is harmless is
admitted here through its list of safe globals, mostly as an inert stand-in: the settings that lie
beside the weights are not needed, and no code of their packages is imported or run.
"""

import collections
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.errors import typed_line
from app.training.archive import DamagedFileError, verify_foreign

STATE_KEYS = ("state_dict", "model", "model_state_dict")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that DistributedDataParallel, torch.compile and the like put in, where they wrap
the network or a module within it."""


class CheckpointError(Exception):
    """A file that cannot be read as a checkpoint; says why in one line."""


class _Inert:
    """Stands for an object that holds plain values, and can do nothing."""

    def __init__(self, *values: Any, **named: Any) -> None:
        """Take and forget whatever the object was made of."""

    def __setstate__(self, state: Any) -> None:
        """Take and forget what it held."""


class _InertDict:
    """Stands for a class derived from dict: what the reader takes for one is an OrderedDict."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        return collections.OrderedDict()


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    """Return a number of numpy, as numpy's own function does from bytes."""
    return np.frombuffer(content, dtype, count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes that older pickles write as text."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


_NUMPY = [
    value
    for name, value in vars(np.dtypes).items()
    if name.endswith("DType") and name != "ObjectDType"
]
_ADMITTED: list[Any] = [
    *_NUMPY,
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    (_encode, "_codecs.encode"),
    *(
        (function, f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")
        for name, function in (
            ("_reconstruct", np.empty(0).__reduce__()[0]),
            ("scalar", _scalar),
        )
    ),
    (_InertDict, "collections.defaultdict"),
    *(
        (_Inert, f"{module}.{name}")
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "object")
    ),
]
_PLAIN = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w+(\._local\.\w+)?|pathlib\._local\.\w+"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|uuid\.UUID|decimal\.Decimal|typing\.Any"
    r"|omegaconf\.[\w.]+"
)
"""Types that hold plain values, by full name, as torch spells it in its refusal."""
_PLAIN_DICT = re.compile(
    r"[\w.]+\.(AttributeDict|AttrDict|EasyDict|ConfigDict|CfgNode|HParams)|addict\.addict\.Dict"
    r"|munch\.Munch|ml_collections\.[\w.]+\.(ConfigDict|FrozenConfigDict)"
)
"""Types derived from dict."""
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>|function <\w+ ([\w.]+)")


def load(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a file of safetensors or of torch.save; tensors come from the disk when they are used.

    Args:
        path: of the file.
        verify: whether to read one of torch.save to its end first, and to compare its checksums.

    Returns:
        The dictionary that it holds; of safetensors one with the tensors under "state_dict".

    Raises:
        CheckpointError: damaged, no such file, no dictionary, or with more than plain values.
    """
    try:
        if path.suffix == ".safetensors":
            content = _load_safetensors(path)
        else:
            content = _load_torch(path, verify)
    except CheckpointError:
        raise
    except DamagedFileError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # a damaged file may raise anything
        reason = typed_line(error)[:200]
        raise CheckpointError(f"{path}: cannot be read, it is damaged or no checkpoint ({reason})")\
            from None  # fmt: skip
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: cannot be read (it holds a {type(content).__name__}, not a dictionary)"
        )
    return dict(content)


def find_state(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors of the state_dict, which may lie one level down."""
    for candidate in (*(content.get(key) for key in STATE_KEYS), content):
        if isinstance(candidate, Mapping):
            tensors = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
    return None


def without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the wrappers' parts out of all names, unless two would become one."""
    renamed = {}
    for name, tensor in state.items():
        *path, key = name.split(".")
        renamed[".".join([*(part for part in path if part not in WRAPPERS), key])] = tensor
    return renamed if len(renamed) == len(state) else state


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {"state_dict": load_file(path)}


def _load_torch(path: Path, verify: bool) -> Any:
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_archive(path)
    if mapped and verify:
        verify_foreign(path)
    admitted = list(_ADMITTED)
    for _ in range(100):
        with torch.serialization.safe_globals(admitted):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:
                kind = _refused_type(str(error))
                if kind is None:
                    raise
        if _PLAIN.fullmatch(kind):
            admitted.append((_Inert, kind))
        elif _PLAIN_DICT.fullmatch(kind):
            admitted.append((_InertDict, kind))
        else:
            break
    raise CheckpointError(
        f"{path}: cannot be read, it holds more than tensors and plain values: {kind}; save the "
        f"state_dict alone"
    )


def _check_archive(path: Path) -> None:
    """Refuse programs, and what would grow when it is unpacked: torch.save does not compress.

    Raises:
        CheckpointError: it is one of both.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise CheckpointError(
            f"{path}: is a TorchScript program and not a checkpoint: save the state_dict"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: is a compressed archive and not one of torch.save")


def _refused_type(message: str) -> str | None:
    """Return the full name of what torch's reader has refused; None: it is another fault."""
    found = _REFUSED.search(message)
    return next(filter(None, found.groups())) if found else None
