"""Notices who goes on with a weight that has been replaced, by where the gradients go."""

import logging
import weakref
from collections.abc import Mapping

from torch import nn

logger = logging.getLogger(__name__)


class GradientWatch:
    """Looks at every optimizer step which weights have a gradient, and waits for nothing.

    A layer that is called after its replacement says so itself (:mod:`oialr.replaced`); a
    bare weight, held in a list or a closure, cannot. What is used of it takes a gradient, which no
    optimizer sees; and if it was used in place of the layer, the core takes none. A core is judged
    by all steps up to the next event, since layers may skip some.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Watch full-rank weights, by name."""
        self._full_rank = set(weights)
        self._unused = dict(weights)
        """Full-rank weights that have had no gradient as yet."""
        self._replaced: list[tuple[weakref.ref[nn.Parameter], str]] = []
        """Parameters that are no longer the network's, as long as somebody keeps them."""
        self._silent: dict[str, nn.Parameter] = {}
        """New cores of which no step has seen a gradient; their full-rank weights had one."""
        self._stale: str | None = None
        """Name of a layer of which a replaced parameter had a gradient, which has been cleared."""

    def replace(self, name: str, old: nn.Parameter, core: nn.Parameter) -> None:
        """Watch a weight or core, whose gradient has been cleared, and what replaces it.

        Args:
            name: dense parameter name.
            old: must take no gradient from now on.
            core: must take one before the next event if the old one was full-rank and ever did.
        """
        self._replaced.append((weakref.ref(old), name))
        if name in self._full_rank and name not in self._unused:
            self._silent[name] = core
        self._full_rank.discard(name)
        self._unused.pop(name, None)

    def exchange(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Watch other parameters of the same meaning: of each that was replaced, by its id, one."""
        for watched in self._unused, self._silent:
            watched |= {k: replaced.get(id(old), old) for k, old in watched.items()}

    def look(self) -> None:
        """Look at all gradients that are there at an optimizer step."""
        self._unused = {k: weight for k, weight in self._unused.items() if weight.grad is None}
        self._silent = {k: core for k, core in self._silent.items() if core.grad is None}
        self._replaced = [(old, name) for old, name in self._replaced if old() is not None]
        for reference, name in self._replaced:
            if (old := reference()) is not None and old.grad is not None:
                self._stale, old.grad = name, None

    def check(self) -> None:
        """Raise if a parameter that was replaced has taken part in the training since last time.

        Raises:
            RuntimeError: it does.
        """
        stale, self._stale = self._stale, None
        if stale is not None:
            raise RuntimeError(
                f"{stale} was replaced by an event, and the parameter from before takes a "
                "gradient still, which trains nothing: whoever keeps it (a list, a closure) must "
                "fetch it from the network anew where event.shapes_changed, or oialr.exclude must "
                "name the layer"
            )

    def end_interval(self) -> None:
        """Tell of the cores that no step has given a gradient, at the next event."""
        for name in self._silent:
            logger.warning(
                "no gradient has reached the core of %s since it was made, though the full-rank "
                "weight had one: does the network use the weight from before?",
                name,
            )
        self._silent = {}
