"""Which layers are converted now, and whose turn it is to be updated."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from oialr.layer_survey import LayerReport
from oialr.options import Options
from oialr.placement.processes import Processes
from oialr.present import PresentLayers
from oialr.schedule import layers_in_turn
from oialr.stability.standstill import Standstill


class Turns:
    """Remembers which layers have had their conversion: all at once, or each by its stability."""

    def __init__(
        self,
        layers: Sequence[LayerReport],
        present: PresentLayers,
        processes: Processes,
        options: Options,
    ) -> None:
        """Begin with all layers waiting.

        Args:
            layers: in the order of the network.
            present: tells what they are.
            processes: who shares the work.
            options: of the method.
        """
        self._layers = layers
        self._present = present
        self._options = options
        self._had: set[str] = set()
        """Names of layers that have had their conversion, be it put off or not."""
        self._first: int | None = None
        """Step of the first conversion by stability, from which updates are counted."""
        self._last: int | None = None
        """Step of the latest conversion."""
        interval = options.update_interval
        intervals = math.ceil((options.stability_window or interval) / interval)
        self._standstill = Standstill(
            processes, threshold=options.stability_threshold, window=intervals * interval
        )

    @property
    def by_stability(self) -> bool:
        """Whether each layer has a conversion of its own."""
        return self._options.delay == "stability"

    @property
    def last_conversion(self) -> int | None:
        """Step of the latest conversion, or of the only one, which may be still to come."""
        delay = self._options.delay
        return self._last if delay == "stability" or self._options.defer_conversion else delay

    @property
    def waiting(self) -> list[LayerReport]:
        """Layers that have not had their conversion."""
        return [layer for layer in self._layers if layer.name not in self._had]

    def converts_all(self, due: Sequence[int | Literal["release"]]) -> bool:
        """Whether, of what is due, all layers that wait are converted for certain."""
        if not due or not self.waiting:
            return False
        latest = self._options.latest_delay
        if "release" in due or not self.by_stability:
            return True
        return latest is not None and int(due[-1]) >= latest

    def take(self, due: Sequence[int | Literal["release"]]) -> tuple[list[LayerReport], set[str]]:
        """Return the layers whose turn it is. A collective call where the delay is by stability.

        Args:
            due: as of :meth:`oialr.timetable.Timetable.due`, without a release.

        Returns:
            Layers, in the order of the network, and names of those that are converted.
        """
        if self.by_stability:
            step = int(due[-1])
            new = self._stable(step)
            began = step if self._first is None else self._first
            update = (step - began) // self._options.update_interval
        else:
            new = {layer.name for layer in self._layers} if due[0] == 0 else set()
            update = int(due[-1])
        turn: set[str] = set()
        if self._had:
            count = layers_in_turn(
                update, len(self._layers), layer_fraction=self._options.layer_fraction
            )
            turn = {layer.name for layer in self._layers[-count:]} & self._had
        return [layer for layer in self._layers if layer.name in new | turn], new

    def had(self, new: set[str], step: int, *, turned: bool) -> None:
        """Remember that layers have had their conversion, after a step.

        Args:
            new: their names.
            step: optimizer steps taken.
            turned: whether a layer has turned low-rank, be it one whose conversion was put off.
        """
        if new:
            self._had |= new
            self._first = step if self._first is None else self._first
        if turned if self._options.defer_conversion else new:
            self._last = step

    def _stable(self, step: int) -> set[str]:
        """Return the names of waiting layers that are to be converted."""
        latest, waiting = self._options.latest_delay, self.waiting
        dense = {layer: layer.name for layer in waiting if self._present.is_dense(layer)}
        if not dense or (latest is not None and step >= latest):
            self._standstill.forget()
            return {layer.name for layer in waiting}
        matrices = {layer: self._present.matrix(layer) for layer in dense}
        still = self._standstill.look(step, matrices)
        low_rank = {layer.name for layer in waiting} - set(dense.values())  # as it was given to us
        return {*still, *low_rank}

    def end(self, step: int) -> None:
        """Let nothing wait any more: a release has made of every layer what it is."""
        waiting = {layer.name for layer in self.waiting}
        self.had(waiting, step, turned=bool(waiting))
        self._standstill.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what conversions have come to."""
        return {
            "had": sorted(self._had),
            "first": self._first,
            "last": self._last,
            "window": self._standstill.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a stored state of the method was; of one that had a delay, from its steps."""
        if (stored := state.get("turns")) is None:  # of an earlier version that had a delay
            delay = self._options.delay
            self._last = delay if delay != "stability" and state["handled"] >= delay else None
            self._had = set() if self._last is None else {layer.name for layer in self._layers}
            return
        self._had, self._first, self._last = set(stored["had"]), stored["first"], stored["last"]
        if self.by_stability:
            self._standstill.load_state_dict(stored["window"])
