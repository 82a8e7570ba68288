"""A trained network made low-rank at once, to a stored size, without an optimizer. Ours.

The paper (arXiv 2401.08505) compresses while it trains. Where a network is trained already, its
weights are truncated (Eckart and Young, 1936) to ranks that :mod:`oialr.allocation` finds, and what
that costs in accuracy is won back by some training of the factors.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from oialr.compatibility import without_fused_attention
from oialr.convert import factorize_layer
from oialr.errors import DivergedError
from oialr.input_moments import InputMoments, scarce, unseen
from oialr.layer_survey import LayerReport, factorizable, parameter_counts, survey
from oialr.layers.base import FactoredLayer
from oialr.linalg.precision import full_precision
from oialr.linalg.svd import Factors, balanced, economy_svd, truncated
from oialr.linalg.weighting import taken_back, weighted
from oialr.options import Options, Selection
from oialr.sharding import whole
from oialr.target import TargetSize, alignment_on
from oialr.wrappers import Wrappers

logger = logging.getLogger(__name__)

_TAKEN = ("minimum_rank_fraction", "rank_multiple", "execution", "recompute_convolutions")
"""Options that count here, beside those that select layers."""


@dataclass(frozen=True, kw_only=True)
class CompressedLayer:
    """What became of a weight."""

    name: str
    """Dense parameter name."""
    shape: tuple[int, ...]
    rank: int | None
    """None: it stays dense, since no rank that stores less is worth its loss."""
    lost: float
    """Share that is discarded of its spectral energy, the sum of the squared singular values; with
    inputs about that of the mean square of what it computes of them, its bias apart."""


@torch.no_grad()
def compress(
    model: nn.Module,
    *,
    target_size: float,
    inputs: Iterable[Any] = (),
    release: bool = True,
    **options: Any,
) -> list[CompressedLayer]:
    """Factorize a trained network in place, to a stored size.

    The ranks are those that discard least of the layers' energies, each layer's energy counted as
    1, for the size: within the largest gain of a single step of the best ones
    (:func:`oialr.allocation.allocate`). Every weight becomes its best approximation of its rank:
    by its entries, or where inputs are given by what the layer computes of them, which was more
    accurate at all but the smallest sizes (docs/compress.md, with 512 samples).
    The network has new Parameter objects afterwards: an optimizer is made after it. Weights with
    requires_grad=False stay dense. Every process that calls it does all the work by itself.

    Args:
        model: the network, full-rank; on any device, in float32 or float64. What is around it
            (torch.compile, DistributedDataParallel) is made anew afterwards.
        target_size: stored parameters over those of the network as it is, in (0, 1].
        inputs: batches that the network is called with, in evaluation mode: a tensor, a tuple or
            list of positional arguments, or a mapping of named ones each; the same batches on
            every process that calls it.
        release: two factors of each weight, both trained, W = A B, balanced; False: U core Vh,
            with orthonormal U and Vh that are frozen.
        **options: minimum_rank_fraction, rank_multiple, execution, recompute_convolutions and what
            selects layers (include, exclude, keep_first_layer, keep_last_layer, ...), as
            :class:`oialr.Options` describes them.

    Returns:
        Of each weight that could be factorized what became of it, in the order of the modules.

    Raises:
        TypeError: another option.
        ValueError: an option out of range, a size that the smallest ranks exceed, no layer that
            could be factorized, or a network that is low-rank already. Nothing has been changed
            then.
        DivergedError: a weight holds NaN or infinity. Nothing has been changed then.
    """
    selection = set(Selection.__dataclass_fields__)
    if others := sorted(set(options) - selection - set(_TAKEN)):
        raise TypeError(f"compress takes no option {others[0]}")
    model = whole(model)
    chosen = Options(
        delay=1,
        update_interval=1,
        release=1 if release else None,
        target_size=target_size,
        **options,
    )
    layers = _layers(model, chosen)
    alignment = alignment_on(model.get_parameter(layers[0].name).device)
    target = TargetSize(
        chosen,
        layers,
        stored=parameter_counts(model)[1],
        is_released=chosen.release is not None,
        is_trained=False,
        alignment=alignment,
    )
    roots = _roots(model, layers, inputs)
    with full_precision():
        factors = {layer.name: _factorize(model, layer, roots.get(layer.name)) for layer in layers}
        energies = {name: _energies(s) for name, (_, s, _) in factors.items()}
        ranks = target.ranks(energies, fixed={}, may_stay_dense=energies, alignment=alignment)
        # What can fail comes before the first layer is replaced.
        for layer in layers:
            r, S = ranks[layer.name], roots.pop(layer.name, None)
            if r is not None and S is not None:
                kept = taken_back(factors[layer.name], r, S, layer.adapter.inputs_meet)
                factors[layer.name] = kept
        for layer in layers:
            if (r := ranks[layer.name]) is not None:
                _replace(model, layer, factors.pop(layer.name), r, chosen)
    Wrappers(model).tell()
    return [
        CompressedLayer(
            name=layer.name,
            shape=layer.shape,
            rank=ranks[layer.name],
            lost=_lost(energies[layer.name], ranks[layer.name]),
        )
        for layer in layers
    ]


def _layers(model: nn.Module, options: Options) -> list[LayerReport]:
    if any(isinstance(module, FactoredLayer) for module in model.modules()):
        raise ValueError("the network is low-rank already: oialr.to_dense(model) makes it dense")
    return factorizable(survey(model, options, minimum_rank_fraction=options.minimum_rank_fraction))


def _roots(
    model: nn.Module, layers: Sequence[LayerReport], inputs: Iterable[Any]
) -> dict[str, Tensor]:
    """Call the network, and return S of what each layer meets; nothing without inputs."""
    if isinstance(inputs, Tensor | Mapping):
        raise TypeError("inputs are a list of batches, each what the network is called with")
    moments, batches = InputMoments(model), iter(inputs)
    if (first := next(batches, None)) is None:
        return {}
    moments.watch(layers, without_gradients=True)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with without_fused_attention():
            for batch in chain([first], batches):
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                else:
                    model(batch)
    finally:
        moments.end()
        for module, mode in modes.items():
            module.training = mode
    roots, few = moments.roots(layers)
    if few:
        logger.warning("compress: %s; give more of them", scarce(few))
    if names := [layer.name for layer in layers if layer.name not in roots]:
        logger.warning("compress: %s", unseen(names))
    return roots


def _factorize(model: nn.Module, layer: LayerReport, S: Tensor | None) -> Factors:
    weight = model.get_parameter(layer.name).detach()
    if not weight.isfinite().all():
        raise DivergedError(f"{layer.name} holds NaN or infinity")
    matrix = layer.reading.to_matrix(weight)
    return economy_svd(matrix if S is None else weighted(matrix, S, layer.adapter.inputs_meet))


def _energies(s: Tensor) -> list[float]:
    """Return squared singular values (k,), of a stack (g, k) their sums over the matrices."""
    squared = s.double().square()
    energies: list[float] = (squared.sum(0) if squared.dim() == 2 else squared).tolist()
    return energies


def _lost(energies: list[float], rank: int | None) -> float:
    return 0.0 if rank is None else sum(energies[rank:]) / (sum(energies) or 1.0)


def _replace(
    model: nn.Module, layer: LayerReport, factors: Factors, r: int, options: Options
) -> None:
    weight = model.get_parameter(layer.name)
    kept = truncated(factors, r, weight.dtype)
    if options.release is not None:
        parts: tuple[Tensor, ...] = balanced(kept)
    else:
        parts = (kept.U, torch.diag_embed(kept.s), kept.Vh)
    twin = factorize_layer(model, layer.name, *parts)
    twin.configure(
        execution=options.execution, recompute_convolutions=options.recompute_convolutions
    )
