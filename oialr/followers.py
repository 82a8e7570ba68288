"""Averaged copies of a network, whose layers change their form with the network's.

An averaged weight is carried over as :class:`oialr.WeightAverage` carries its own: by what
:mod:`oialr.transport` says of averages. Frozen factors are those of the network.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from oialr.convert import get_layer
from oialr.forms import DENSE, form_of, take_form
from oialr.layers.base import FactoredLayer
from oialr.preparation import prepare
from oialr.transport import Transport
from oialr.wrappers import unwrapped


class Followers:
    """The averaged copies of a network."""

    def __init__(self, model: nn.Module) -> None:
        """Begin without any."""
        self._model = model
        self._copies: list[weakref.ref[nn.Module]] = []

    def add(self, averaged: nn.Module, names: Sequence[str]) -> None:
        """Let a copy follow, as long as somebody keeps it.

        Args:
            averaged: a copy of the network, or what holds one as its ``module``.
            names: of the weights that change their form.

        Raises:
            ValueError: there is no copy of this network in it, or its layers have other forms.
        """
        copy = unwrapped(averaged)
        while not _has(copy, names) and isinstance(getattr(copy, "module", None), nn.Module):
            copy = unwrapped(copy.get_submodule("module"))
        if copy is self._model or not _has(copy, names):
            raise ValueError(
                f"{type(averaged).__name__} holds no copy of the network that OIALR has: make it "
                "from this network, and give it to follow as it is"
            )
        self._check(copy, names)
        self._copies.append(weakref.ref(prepare(copy)))

    def check(self, names: Sequence[str]) -> None:
        """Find, before an event, an average that could not follow.

        Raises:
            ValueError: its layers have other forms, since one of both has been loaded meanwhile.
        """
        for reference in self._copies:
            if (copy := reference()) is not None:
                self._check(copy, names)

    def _check(self, copy: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            present, averaged = form_of(self._model, name), form_of(copy, name)
            if present != averaged:
                raise ValueError(
                    f"{name} is {present} in the network and {averaged} in its average: let the "
                    "average follow from before the conversion, or load its own state too"
                )

    @torch.no_grad()
    def follow(self, name: str, transports: Sequence[Transport]) -> None:
        """Give the copies' layer the form that the network's has now.

        Args:
            name: dense parameter name.
            transports: from what was trained of it to each of what is trained now.
        """
        self._copies = [copy for copy in self._copies if copy() is not None]
        layer, form = get_layer(self._model, name), form_of(self._model, name)
        for reference in self._copies:
            copy = reference()
            assert copy is not None
            old = _trained(copy, name)
            value = old.detach().to(_trained(self._model, name))
            averages = [transport.average(value).to(old) for transport in transports]
            if not isinstance(layer, FactoredLayer):
                take_form(copy, name, DENSE)
                copy.get_parameter(name).copy_(averages[0])
                continue
            factors = averages
            if not layer.released:
                U, Vh = layer.U.detach(), layer.Vh.detach()
                factors = [U.to(old.device), *averages, Vh.to(old.device)]
            present = get_layer(copy, name)
            if isinstance(present, FactoredLayer) and form_of(copy, name) == form:
                if not layer.released:
                    present.store_frozen(layer.U.dtype)
                for mine, factor in zip(present.factors, factors, strict=True):
                    mine.copy_(factor)
            else:
                take_form(copy, name, form, [factor.clone() for factor in factors])
                present = get_layer(copy, name)
            for option in ("execution", "recompute"):
                if option in layer.__dict__:
                    setattr(present, option, getattr(layer, option))


def _trained(model: nn.Module, name: str) -> nn.Parameter:
    layer = get_layer(model, name)
    if isinstance(layer, FactoredLayer):
        return layer.trained
    return model.get_parameter(name)


def _has(model: nn.Module, names: Sequence[str]) -> bool:
    try:
        return all(_trained(model, name) is not None for name in names)
    except AttributeError:
        return False
