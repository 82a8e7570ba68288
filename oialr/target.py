"""The size that a training shall end with, and the ranks for it. Ours and not the paper's."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch

from oialr.allocation import Choice, allocate, layer_choices
from oialr.layer_survey import LayerReport
from oialr.options import RankRule

TENSOR_CORE_ALIGNMENT = 8
"""Numbers of half precision in 16 bytes."""


def alignment_on(device: torch.device) -> int:
    """Return what ranks should be multiples of on a device; 1: they may be any."""
    return TENSOR_CORE_ALIGNMENT if device.type == "cuda" else 1


class TargetSize:
    """Finds, whenever spectra are known, the ranks with which a network has the target's size."""

    def __init__(
        self,
        rule: RankRule,
        layers: Sequence[LayerReport],
        *,
        stored: int,
        is_released: bool,
        is_trained: bool = True,
        alignment: int = 1,
    ) -> None:
        """Look at what there is to be saved.

        Args:
            rule: target size, minimum rank and multiple of ranks count.
            layers: those that the method factorizes.
            stored: parameters of the full-rank network.
            is_released: whether the run ends with two factors of each layer, not three.
            is_trained: whether two factors that take more time in a step than the dense weight are
                out of the question.
            alignment: with which the smallest ranks shall fit; see
                :func:`oialr.schedule.rounded_up`.

        Raises:
            ValueError: the smallest ranks exceed the size.
        """
        assert rule.target_size is not None
        self._rule = rule
        self.layers = layers
        self.is_released = is_released
        self._must_pay = is_released and is_trained
        others = stored - sum(math.prod(layer.shape) for layer in layers)
        self._budget = math.floor(rule.target_size * stored * (1 + 1e-12)) - others
        flat = (
            self._choices(layer, [1.0] * layer.full_rank, alignment=alignment) for layer in layers
        )
        smallest = sum(choices[0].parameters for choices in flat)
        if smallest > self._budget:
            hint = "; rank_multiple=1 rounds none of them up" if rule.rank_multiple > 1 else ""
            raise ValueError(
                f"target_size {rule.target_size} cannot be reached: what stays full-rank takes "
                f"{others / stored:.3f} of the network's parameters and the smallest ranks of the "
                f"other layers take {smallest / stored:.3f}{hint}"
            )

    @classmethod
    def of(cls, rule: RankRule, *args: Any, **options: Any) -> Self | None:
        """Return what the constructor makes; None without a target."""
        return None if rule.target_size is None else cls(rule, *args, **options)

    def ranks(
        self,
        energies: Mapping[str, Sequence[float] | None],
        *,
        fixed: Mapping[str, Choice],
        may_stay_dense: Collection[str] = (),
        alignment: int = 1,
    ) -> dict[str, int | None]:
        """Return the rank that each layer shall end with; None: dense.

        Args:
            energies: squared singular values of each layer's weight by name, descending; None: of a
                layer that is fixed.
            fixed: the sizes of layers that cannot change, by name.
            may_stay_dense: names of layers that wait for their conversion, and so may be dense
                where no release will bring them back.
            alignment: see :func:`oialr.schedule.rounded_up`.
        """
        choices = [
            [fixed[layer.name]]
            if layer.name in fixed
            else self._choices(
                layer,
                energies[layer.name] or [],
                may_stay_dense=layer.name in may_stay_dense,
                alignment=alignment,
            )
            for layer in self.layers
        ]
        allocated = allocate(choices, self._budget)
        return {
            layer.name: choice.rank for layer, choice in zip(self.layers, allocated, strict=True)
        }

    def _choices(
        self,
        layer: LayerReport,
        energies: Sequence[float],
        *,
        may_stay_dense: bool = False,
        alignment: int = 1,
    ) -> list[Choice]:
        return layer_choices(
            energies,
            layer.stack_shape,
            minimum_rank_fraction=self._rule.minimum_rank_fraction,
            multiple=self._rule.rank_multiple,
            alignment=alignment,
            has_core=not self.is_released,
            can_be_dense=self.is_released or may_stay_dense,
            pays=lambda r: not self._must_pay or layer.released_pays(r),
        )
