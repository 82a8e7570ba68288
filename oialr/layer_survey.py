"""Which layers of a network can be factorized, and why each of the others cannot."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from oialr.allocation import stored_parameters
from oialr.layers.adapter import LayerAdapter
from oialr.layers.base import FactoredLayer
from oialr.layers.cost import MANY_ROWS
from oialr.layers.reading import MatrixReading
from oialr.layers.registry import OTHER, adapter_of, is_layer, kind_of
from oialr.naming import full_name
from oialr.obstacles import Obstacles
from oialr.options import RankRule, Selection
from oialr.outputs import output_layers
from oialr.schedule import minimum_rank


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What becomes of one layer of the network."""

    name: str
    """Dense parameter name, such as blocks.0.attn.qkv.weight; kept after a conversion."""
    reading: MatrixReading
    """How the dense weight is read as a matrix, or as a stack of matrices."""
    is_linear_map: bool
    """Whether it is the weight of a linear map, which means over the weights take in."""
    stays_dense: str | None
    """Why the layer is not factorized; None if it is."""
    is_left_out: bool = False
    """Whether it is full-rank because the patterns of include and exclude leave it out."""
    adapter: LayerAdapter = OTHER
    """Of the kind of layers that the weight belongs to."""
    inner_positions: int = 1
    """Rows of the product between two factors for each row of the layer's output."""
    is_complex: bool = False
    """Whether its numbers are complex: such a weight stays dense, and its basis is not measured."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.reading.shape

    @property
    def groups(self) -> int:
        """Number g of matrices that the weight is read as."""
        return self.reading.groups

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight read as a matrix, or of each of a stack."""
        return self.reading.matrix_shape

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is factorized: (m, n), or (g, m, n) if g > 1."""
        return self.reading.stack_shape

    @property
    def full_rank(self) -> int:
        """Rank that the weight can have at most: the smaller side of its matrix."""
        return min(self.matrix_shape)

    def released_multiply_adds(self, rows: int, r: int) -> float:
        """Multiply-adds of a training step with A B of rank r, both trained, for rows of output."""
        m, n = self.matrix_shape
        return self.adapter.released_multiply_adds(rows=rows, m=m, n=n * self.inner_positions, r=r)

    def released_pays(self, r: int) -> bool:
        """Whether such a step counts as no longer than with the dense weight, by its margin."""
        m, n = self.matrix_shape
        dense = self.adapter.full_rank_multiply_adds(rows=MANY_ROWS, m=m, n=n)
        most = self.adapter.released_margin(self.reading) * dense
        return self.released_multiply_adds(MANY_ROWS, r) <= most


def survey(
    model: nn.Module,
    selection: Selection | None = None,
    *,
    minimum_rank_fraction: float = RankRule.minimum_rank_fraction,
    **keywords: Any,
) -> list[LayerReport]:
    """List every multidimensional weight of a dense network, in the order of its modules.

    The first and the last layer are those of the network, not of the layers that can be factorized:
    nothing else stays full-rank for the sake of a head that is not eligible anyway.

    Args:
        model: a dense network.
        selection: which layers are factorized, perhaps as a part of all options; None: all of it is
            keywords.
        minimum_rank_fraction: share of min(m, n) below which no rank falls.
        **keywords: options by name, as :class:`oialr.options.Selection` describes each.

    Returns:
        Of each weight how it is read as a matrix, and why it stays dense if it does.

    Raises:
        ValueError: a pattern matches no module that holds a multidimensional weight.
    """
    selection = Selection(**keywords) if selection is None else replace(selection, **keywords)
    found = [
        (path, module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    _check_patterns([path for path, *_ in found], selection)
    layers = [module for _, module, _, _ in found if is_layer(module)]
    kept_first = layers[:1] if selection.keep_first_layer else []
    kept_last = output_layers(model) if selection.keep_last_layer else []
    obstacles = Obstacles(model)
    reports = []
    for path, module, key, parameter in found:
        adapter = kind_of(module)
        reading = adapter.reading(module, key, selection)
        report = LayerReport(
            name=f"{path}.{key}" if path else key,
            reading=reading,
            is_linear_map=adapter.maps_linearly(key)
            and not (isinstance(module, FactoredLayer) or parameter.is_complex()),
            stays_dense=None,
            is_complex=parameter.is_complex(),
            adapter=adapter,
            inner_positions=adapter.inner_positions(module, reading),
        )
        reason = _not_asked_for(module, report, selection)
        reason = reason or _why_not(obstacles, report, minimum_rank_fraction)
        left_out = None if reason else _left_out(path, selection)
        reason = reason or left_out
        if reason is None:
            if module in kept_first:
                reason = "the network's first layer (keep_first_layer)"
            elif module in kept_last:
                reason = "the network's last layer (keep_last_layer)"
        reports.append(replace(report, stays_dense=reason, is_left_out=left_out is not None))
    return reports


def factorizable(reports: Iterable[LayerReport]) -> list[LayerReport]:
    """Return the weights that can be factorized, in their order.

    Raises:
        ValueError: there is none; says why of all.
    """
    reports = list(reports)
    layers = [report for report in reports if report.stays_dense is None]
    if not layers:
        reasons = {report.stays_dense or "" for report in reports}
        raise ValueError(f"no layer can be factorized: {'; '.join(sorted(reasons))}")
    return layers


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count the numbers in the trained parameters, and in all parameters.

    Frozen factors are not trained, even where somebody lets all parameters take a gradient.
    """
    frozen: set[nn.Parameter] = set()
    for layer in model.modules():
        if isinstance(layer, FactoredLayer) and not layer.released:
            frozen |= {layer.U, layer.Vh}
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad and p not in frozen)
    return trained, sum(p.numel() for p in parameters)


def _not_asked_for(module: nn.Module, report: LayerReport, selection: Selection) -> str | None:
    """Say that an option is off without which a kind of layers stays full-rank, if it is."""
    option, key = report.adapter.option, report.name.rpartition(".")[-1]
    if option is None or getattr(selection, option) or adapter_of(type(module)) is None:
        return None
    return f"{key} of {full_name(type(module))} is never factorized without {option}"


def _why_not(obstacles: Obstacles, report: LayerReport, minimum_rank_fraction: float) -> str | None:
    """Say why a weight cannot be factorized, whatever the method's patterns are."""
    if reason := obstacles.of(report.name):
        return reason
    m, n = report.matrix_shape
    r = minimum_rank(report.full_rank, minimum_rank_fraction)
    if stored_parameters((m, n), r, has_core=True) >= m * n:
        return "too small to save anything at any rank"
    return None


def _left_out(path: str, selection: Selection) -> str | None:
    """Say by which patterns a module is left out, if it is."""
    if not _first_match(path, selection.include):
        return "matches no pattern of oialr.include"
    pattern = _first_match(path, selection.exclude)
    return pattern and f"excluded by oialr.exclude pattern {pattern!r}"


def _first_match(path: str, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)


def _check_patterns(paths: Sequence[str], selection: Selection) -> None:
    """Reject a pattern that matches nothing: most likely it is misspelt."""
    for option in ("include", "exclude"):
        for pattern in getattr(selection, option):
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"{option}: the pattern {pattern!r} matches no module that holds a weight"
                )
