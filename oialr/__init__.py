"""OIALR: orthogonality-informed adaptive low-rank training of neural networks (arXiv 2401.08505).

The library: torch and the standard library. Everything that is meant for others is named here::

    from oialr import OIALR

    method = OIALR(model, optimizer, delay=1000, update_interval=500, cutoff=0.1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        event = method.step()

- :class:`OIALR` decides when layers are factorized, updated and cut, as its :class:`Options` say;
  :class:`Event` and :class:`LayerEvent` tell what happened.
- :func:`survey` lists a network's weights, and :class:`LayerReport` why one stays full-rank.
- :func:`prepare` lets a network take stored weights of whatever ranks by its load_state_dict;
  :func:`save` and :func:`load` store a network with its ranks, without an optimizer.
- :class:`WeightAverage` is a moving average of the weights that follows their ranks.
- :func:`compress` makes a trained network low-rank at once, to a stored size;
  :class:`CompressedLayer` tells what became of a weight.
- :func:`to_dense` puts dense layers in the place of factorized ones.
- :func:`register_layer` adds a kind of layers by its :class:`LayerAdapter`, with a
  :class:`FactoredTwin` and a :class:`MatrixReading` of its weight.
- :func:`for_inference` makes a network of plain layers; :func:`export_dense`,
  :func:`export_factors`, :func:`export_onnx` and :func:`export_torch` write files that others read,
  :func:`read_exported` reads them again. :func:`dense_state` is the state_dict alone, and
  :func:`two_factors` the network with the core merged.
- :class:`StabilityTracker` measures basis stability, :class:`LayerStability` is a row of it.
- :class:`Processes` are those that share the work, :class:`Costs` what it costs.
- :func:`register_optimizer` tells by an :class:`OptimizerRule` how an optimizer's state follows.
- :class:`DivergedError`, :class:`DifferingReplicasError` and :class:`UserError` are what ends it.

The names are handed out lazily, so that a program which needs an error or an option alone does not
pay for importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oialr.compression import CompressedLayer as CompressedLayer
    from oialr.compression import compress as compress
    from oialr.convert import to_dense as to_dense
    from oialr.errors import DifferingReplicasError as DifferingReplicasError
    from oialr.errors import DivergedError as DivergedError
    from oialr.errors import ExportError as ExportError
    from oialr.errors import UserError as UserError
    from oialr.events import Event as Event
    from oialr.events import LayerEvent as LayerEvent
    from oialr.export.files import Exported as Exported
    from oialr.export.files import export_dense as export_dense
    from oialr.export.files import export_factors as export_factors
    from oialr.export.files import export_onnx as export_onnx
    from oialr.export.files import export_torch as export_torch
    from oialr.export.formats import read_exported as read_exported
    from oialr.export.state import dense_state as dense_state
    from oialr.export.state import two_factors as two_factors
    from oialr.files import load as load
    from oialr.files import save as save
    from oialr.inference import for_inference as for_inference
    from oialr.layer_survey import LayerReport as LayerReport
    from oialr.layer_survey import survey as survey
    from oialr.layers.adapter import LayerAdapter as LayerAdapter
    from oialr.layers.reading import MatrixReading as MatrixReading
    from oialr.layers.registry import register_layer as register_layer
    from oialr.layers.twin import FactoredTwin as FactoredTwin
    from oialr.method import OIALR as OIALR
    from oialr.optimizers import OptimizerRule as OptimizerRule
    from oialr.optimizers import register_optimizer as register_optimizer
    from oialr.options import Options as Options
    from oialr.placement.costs import Costs as Costs
    from oialr.placement.processes import Processes as Processes
    from oialr.preparation import prepare as prepare
    from oialr.stability.alone import StabilityTracker as StabilityTracker
    from oialr.stability.measurement import LayerStability as LayerStability
    from oialr.weight_average import WeightAverage as WeightAverage
    from oialr.wrappers import renew_wrappers as renew_wrappers

_HOMES = {
    "OIALR": "oialr.method",
    "CompressedLayer": "oialr.compression",
    "Costs": "oialr.placement.costs",
    "DifferingReplicasError": "oialr.errors",
    "DivergedError": "oialr.errors",
    "Event": "oialr.events",
    "FactoredTwin": "oialr.layers.twin",
    "LayerAdapter": "oialr.layers.adapter",
    "LayerEvent": "oialr.events",
    "LayerReport": "oialr.layer_survey",
    "LayerStability": "oialr.stability.measurement",
    "MatrixReading": "oialr.layers.reading",
    "OptimizerRule": "oialr.optimizers",
    "Options": "oialr.options",
    "Processes": "oialr.placement.processes",
    "StabilityTracker": "oialr.stability.alone",
    "WeightAverage": "oialr.weight_average",
    "UserError": "oialr.errors",
    "ExportError": "oialr.errors",
    "Exported": "oialr.export.files",
    "compress": "oialr.compression",
    "dense_state": "oialr.export.state",
    "export_dense": "oialr.export.files",
    "export_factors": "oialr.export.files",
    "export_onnx": "oialr.export.files",
    "export_torch": "oialr.export.files",
    "for_inference": "oialr.inference",
    "read_exported": "oialr.export.formats",
    "register_layer": "oialr.layers.registry",
    "load": "oialr.files",
    "prepare": "oialr.preparation",
    "renew_wrappers": "oialr.wrappers",
    "save": "oialr.files",
    "register_optimizer": "oialr.optimizers",
    "survey": "oialr.layer_survey",
    "two_factors": "oialr.export.state",
    "to_dense": "oialr.convert",
}
"""The module of each public name."""

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
