"""Networks that take stored weights of whatever ranks, by torch's own load_state_dict."""

import weakref
from collections.abc import Callable, Mapping
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
        present = {name: form_of(model, name) for name in forms}
        if changed := [name for name, form in forms.items() if form != present[name]]:
            name = changed[0]
            check_can_take_forms(model, f"{name} is stored {forms[name]} and is {present[name]}")
        take = self.take() if self.take else None
        if take:
            take(forms)
        else:
            check_can_take(model, forms, to_train=False)
            for name in changed:
                take_form(model, name, forms[name])
        if not split_by(model):
            adopt_dtypes(model, state, prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Preparation, ()


def _preparation(model: nn.Module) -> _Preparation:
    """Return the hook of a network, which it may get now."""
    network = unwrapped(model)
    for wrapped in network._load_state_dict_pre_hooks.values():
        if isinstance(hook := getattr(wrapped, "hook", None), _Preparation):
            return hook
    preparation = _Preparation()
    network.register_load_state_dict_pre_hook(preparation)
    return preparation
