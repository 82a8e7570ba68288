"""What does a low-rank training step cost at several ranks, in time, memory and FLOPs?

  python -m benchmarks.step_time            # half an hour on one core
  python -m benchmarks.step_time --quick    # half a minute

All variants of a model, the full-rank one among them, live in one process and take their steps in
turn, so that a disturbance of the machine meets all alike; the figures are medians over rounds and
ratios to full-rank. The prediction is that of the FLOP model: floor + (1 - floor) * FLOP ratio,
where floor is the step's time at rank fraction 0.01, that is of everything which does not scale
with the rank.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oialr.compatibility import import_torchvision
from oialr.convert import factorize_layer, get_layer
from oialr.layer_survey import survey
from oialr.layers.conv import FactoredConv
from oialr.layers.cost import rank_pays
from oialr.memory import TensorMemory, tensors_of
from oialr.options import Execution
from oialr.schedule import rounded_up
from oialr.target import alignment_on

FLOOR = 0.01
MULTIPLE = 16  # of ranks, OIALR's default
FRACTIONS = (FLOOR, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0)
OPTIONS = {
    "auto": "the cheapest way by the cost model",
    "factored": "x Vh^T core^T U^T, forced",
    "folded": "core folded into the smaller factor, forced",
    "dense": "the weight rebuilt, forced",
    "deferred": "as auto, but layers whose rank does not pay stay full-rank",
    "recompute": "as auto, but convolutions form the product with Vh again in backward",
}


@dataclass(frozen=True)
class Case:
    """A network and a batch for it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels_last: bool = False


def vision_transformer(width: int, patch: int, heads: int) -> nn.Module:
    """Build timm's VisionTransformer for 32x32 images, 6 blocks deep."""
    import_torchvision()
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=width, depth=6, num_heads=heads, num_classes=10
    )


def perceptron() -> nn.Module:
    """Build four linear layers of 1024 x 1024 with GELU between them, as in a transformer."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1024, 1024), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def resnet() -> nn.Module:
    """Build the CIFAR ResNet-20 of double width."""
    from app.models.cifar_resnet import CifarResNet

    return CifarResNet(depth=20, width=32)


CASES = (
    Case("MLP 4 x 1024", perceptron, (512, 1024)),
    Case("ViT-192, patch 4", lambda: vision_transformer(192, 4, 3), (64, 3, 32, 32)),
    Case("ViT-384, patch 8", lambda: vision_transformer(384, 8, 6), (64, 3, 32, 32)),
    Case("ResNet-20 x 2", resnet, (32, 3, 32, 32), channels_last=True),
)


class Variant:
    """One network with its optimizer, and what was measured of it."""

    def __init__(self, name: str, model: nn.Module, batch: Tensor) -> None:
        """Take a network that is ready to be trained."""
        self.name = name
        self.model = model
        self.batch = batch
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self) -> None:
        """Take a training step and note its times in seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self.optimizer.step()
        if self.batch.is_cuda:
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def _loss(self) -> Tensor:
        result: Tensor = self.model(self.batch).square().mean()
        return result

    def figures(self) -> dict[str, float]:
        """Return FLOPs, and bytes of activations, of what is trained, and of all parameters."""
        with FlopCounterMode(display=False) as counter:
            self._loss().backward()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        stored = sum(p.numel() for p in self.model.parameters())
        return {
            "flops": counter.get_total_flops(),
            "activation_bytes": self._activation_bytes(),
            "trained_bytes": 4 * 4 * trained,  # parameter, gradient, two moments
            "trained_and_frozen_bytes": 4 * (4 * trained + stored - trained),
        }

    def _activation_bytes(self) -> int:
        """Bytes of all tensors that the forward pass leaves alive for backward."""
        with TensorMemory([*tensors_of(self.model, self.optimizer), self.batch]) as memory:
            before = memory.bytes
            loss = self._loss()
            after = memory.bytes
        del loss
        return after - before


def rank_at(fraction: float, full_rank: int, device: torch.device) -> int:
    """Return a share of a layer's full rank: a whole number, rounded up as OIALR does there."""
    rank = max(1, int(fraction * full_rank))
    return rounded_up(rank, full_rank=full_rank, multiple=MULTIPLE, alignment=alignment_on(device))


def at_rank_fraction(model: nn.Module, fraction: float, option: str) -> nn.Module:
    """Return a factorized copy of a network, every rank that fraction of min(m, n).

    Ranks are rounded down to a whole number, and then up to the multiple that OIALR keeps.

    Args:
        model: a dense network; the first and last layer stay as OIALR's defaults say.
        fraction: of the full rank.
        option: one of OPTIONS.
    """
    model = copy.deepcopy(model)
    kept = len([m for m in model.modules() if isinstance(m, nn.Linear)]) > 4 or None
    for report in survey(
        model, keep_first_layer=False, keep_last_layer=bool(kept), minimum_rank_fraction=0.01
    ):
        if report.stays_dense is None:
            weight = get_layer(model, report.name).weight
            assert isinstance(weight, Tensor)
            m, n = report.matrix_shape
            r = rank_at(fraction, min(m, n), weight.device)
            if option == "deferred" and not rank_pays(m, n, r):
                continue
            U = torch.linalg.qr(torch.randn(m, r, device=weight.device)).Q.contiguous()
            V = torch.linalg.qr(torch.randn(n, r, device=weight.device)).Q.T.contiguous()
            scale = weight.detach().norm() / r**0.5
            layer = factorize_layer(
                model, report.name, U, scale * torch.eye(r, device=weight.device), V
            )
            layer.execution = cast(Execution, option) if option in get_args(Execution) else "auto"
            if isinstance(layer, FactoredConv):
                layer.recompute = option == "recompute"
    return model


def measure(
    case: Case, fractions: tuple[float, ...], options: tuple[str, ...], rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Measure all variants of a case in turn.

    Args:
        case: network and batch.
        fractions: rank fractions.
        options: of OPTIONS.
        rounds: steps of each variant, after three that do not count.
        device: where.

    Returns:
        Figures by variant: seconds are medians, ratios are to full-rank.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    dense = case.build().to(device)
    if case.channels_last:
        dense = dense.to(memory_format=layout)  # type: ignore[call-overload]
    batch = torch.randn(case.shape, device=device)
    if case.channels_last:
        batch = batch.contiguous(memory_format=layout)
    variants = [Variant("full-rank", copy.deepcopy(dense), batch)]
    for fraction in fractions:
        for option in options:
            model = at_rank_fraction(dense, fraction, option)
            variants.append(Variant(f"{fraction} {option}", model, batch))
    for number in range(rounds + 3):
        for variant in variants:
            if number == 3:
                variant.wall.clear()
                variant.cpu.clear()
            variant.step()
    full = variants[0]
    full_figures = full.figures()
    result = {}
    for variant in variants:
        figures = variant.figures()
        wall, cpu = statistics.median(variant.wall), statistics.median(variant.cpu)
        # Round by round, so that a disturbance of both cancels.
        ratios = [mine / theirs for mine, theirs in zip(variant.cpu, full.cpu, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        result[variant.name] = {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "time_ratio": statistics.median(ratios),
            "time_ratio_spread": quartiles[2] - quartiles[0],
            **{f"{key}_ratio": figures[key] / full_figures[key] for key in figures},
        }
    floor = result.get(f"{FLOOR} {options[0]}", {}).get("time_ratio")
    if floor is not None:
        for figures in result.values():
            figures["predicted_ratio"] = floor + (1 - floor) * figures["flops_ratio"]
    return result


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return all results as one Markdown table; ratios are to full-rank."""
    columns = {
        "step, s": "wall_seconds",
        "CPU, s": "cpu_seconds",
        "time": "time_ratio",
        "spread": "time_ratio_spread",
        "FLOPs": "flops_ratio",
        "predicted": "predicted_ratio",
        "activations": "activation_bytes_ratio",
        "trained": "trained_bytes_ratio",
        "with frozen": "trained_and_frozen_bytes_ratio",
    }
    lines = ["| network | variant | " + " | ".join(columns) + " |", "| --- " * 11 + "|"]
    for name, result in results.items():
        for variant, figures in result.items():
            cells = [f"{figures[key]:.3f}" if key in figures else "" for key in columns.values()]
            lines.append(f"| {name} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="options: " + "; ".join(f"{name}: {text}" for name, text in OPTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--models", nargs="+", help="parts of the models' names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="few rounds, two fractions, auto only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fractions, options = tuple(arguments.fractions), tuple(arguments.options)
    rounds = arguments.rounds
    if arguments.quick:
        fractions, options, rounds = (FLOOR, 0.25), ("auto",), 4
    results = {
        case.name: measure(case, fractions, options, rounds, arguments.device)
        for case in CASES
        if not arguments.models or any(part in case.name for part in arguments.models)
    }
    print(json.dumps(results) if arguments.json else table(results))


if __name__ == "__main__":
    main()
