"""Networks that take stored weights of whatever ranks, by torch's own load_state_dict."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from oialr.forms import (
    Form,
    adopt_dtypes,
    check_can_take,
    form_of,
    stored_forms,
    take_form,
)
from oialr.sharding import check_can_take_forms, split_by
from oialr.wrappers import unwrapped

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Let a network take stored weights of whatever ranks from now on.

    Its load_state_dict gives each layer the form that it finds in the state, dense, low-rank or
    released, before torch looks at names and shapes; also below wrappers, such as
    DistributedDataParallel, and in copies of the network. :class:`oialr.OIALR` prepares its network
    itself, and lets the optimizer follow; an optimizer without it must be made after the weights
    are loaded.

    Args:
        model: the network, whichever wrappers are around it; a second call does nothing.

    Returns:
        The model.
    """
    _preparation(model)
    return model


def follow_stored_forms(model: nn.Module, take: Callable[[Mapping[str, Form]], None]) -> None:
    """Prepare a network, and let somebody give its layers the stored forms.

    Args:
        model: the network.
        take: a bound method, whose object is not kept alive: is called at every load_state_dict
            with the forms by dense parameter name, and raises ValueError before it changes
            anything.
    """
    _preparation(model).take = weakref.WeakMethod(take)


class _Preparation:
    """A hook of load_state_dict. It has a type of its own so that a copy of it has no owner."""

    def __init__(self) -> None:
        self.take: Callable[[], Callable[[Mapping[str, Form]], None] | None] | None = None

    def __call__(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        forms = stored_forms(model, state, prefix)
        if not self.owner:  # a part with an owner takes its own, when torch comes to it
            held = tuple(_held_parts(model))
            forms = {name: form for name, form in forms.items() if not name.startswith(held)}
        present = {name: form_of(model, name) for name in forms}
        if changed := [name for name, form in forms.items() if form != present[name]]:
            name = changed[0]
            check_can_take_forms(model, f"{name} is stored {forms[name]} and is {present[name]}")
        if take := self.owner:
            take(forms)
        else:
            check_can_take(model, forms, to_train=False)
            for name in changed:
                take_form(model, name, forms[name])
        if not split_by(model):
            adopt_dtypes(model, state, prefix)

    @property
    def owner(self) -> Callable[[Mapping[str, Form]], None] | None:
        """What gives the network the stored forms, if somebody holds it."""
        return self.take() if self.take else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Preparation, ()


def _preparation(model: nn.Module) -> _Preparation:
    """Return the hook of a network, which it may get now."""
    network = unwrapped(model)
    if preparation := _present_preparation(network):
        return preparation
    preparation = _Preparation()
    network.register_load_state_dict_pre_hook(preparation)
    return preparation


def _present_preparation(module: nn.Module) -> _Preparation | None:
    """Return the hook of a module, if it has one."""
    hooks = (getattr(each, "hook", None) for each in module._load_state_dict_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, _Preparation)), None)


def _held_parts(model: nn.Module) -> Iterator[str]:
    """Yield what the names begin with of parts of a network that somebody holds by themselves."""
    for path, module in model.named_modules():
        if path and (preparation := _present_preparation(module)) and preparation.owner:
            yield f"{path}."
