"""A dense weight that was formed of factors: it can be read, and writing to it raises."""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

_WRITE = re.compile(r"[a-z]\w*_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)__")
"""Names of the methods of a tensor that write to it."""
_VIEWS = ("detach", "__getitem__", "view", "reshape", "flatten", "t", "transpose", "permute")
"""Methods of a tensor that return another look at it, if they can."""


class FormedWeight(Tensor):
    """A tensor of which nobody reads what is written to it.

    A factorized layer forms its dense weight anew at every access, so an initialization, a clamp or
    an assignment of that weight would be lost. Whoever tries is told. What is computed from it is
    an ordinary tensor, and what nn.Parameter makes of it an ordinary parameter.

    Guarded are the methods of the tensor and of what :data:`_VIEWS` return; operators see nothing
    but an ordinary tensor, since torch's fused ones do without weights that have functions of their
    own.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The same weight without a history, guarded too."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data.as_subclass(FormedWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse()

    @property
    def _is_param(self) -> bool:
        """Whether somebody has made a parameter of it: then it is that, and not this any more."""
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        # nn.Parameter keeps the type of what it is made of, and marks it by this attribute. What it
        # has marked is held by whoever asked for it, to be written to.
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be stored as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Be copied to an ordinary tensor."""
        return self.as_subclass(Tensor).__deepcopy__(memo)


def guarded_weight(weight: Tensor) -> Tensor:
    """Return a formed weight so that writing to it raises.

    As it is while torch.compile traces, and of a network that fully_shard has split, a DTensor.
    """
    if torch.compiler.is_compiling() or type(weight) is not Tensor:
        return weight
    return weight.as_subclass(FormedWeight)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "the weight of a factorized layer is formed anew at every access, and what is written to "
        "it is lost: write to its factors U, core and Vh"
    )


def _guarded_view(name: str) -> Callable[..., Tensor]:
    method = getattr(Tensor, name)

    def view(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = method(self, *args, **kwargs)
        is_view = result.untyped_storage()._cdata == self.untyped_storage()._cdata
        return result.as_subclass(FormedWeight) if is_view else result

    return view


for _name in dir(Tensor):
    if _WRITE.fullmatch(_name) and _name != "requires_grad_":
        setattr(FormedWeight, _name, _refuse)
for _name in _VIEWS:
    setattr(FormedWeight, _name, _guarded_view(_name))
