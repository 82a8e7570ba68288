"""Time, FLOPs and memory of a training step: full-rank, low-rank, and with two trained factors.

A step is forward and backward under autocast in bfloat16 and AdamW (fused) on float32 weights. All
variants of a network take their steps in turn. Low-rank at a fraction of the full rank is the core
between frozen bases; "two" is A B with both trained. The prediction is that of the FLOP model:
floor + (1 - floor) * FLOP ratio, where floor is the time over full-rank's at rank fraction 0.01, of
the same mode. Where a variant takes more than 1.15 of it, the kernels of its step are listed beside
those of full-rank.
"""

import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from app.models.cifar_resnet import CifarResNet
from benchmarks.gpu.measuring import (
    Results,
    choose_device,
    command_line,
    interleaved,
    median_ratio,
    synchronize,
)
from benchmarks.gpu.networks import of_timm, perceptron, with_two_factors
from benchmarks.step_time import at_rank_fraction

FLOOR, MISSED = 0.01, 1.15
ROUNDS, REPEAT, WARM_UP = 7, 4, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, a batch for it, and the variants that are measured."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int | None
    eager: tuple[str, ...] = ("full-rank", "0.01", "0.1", "0.25", "0.4", "two 0.25")
    compiled: tuple[str, ...] = ()
    channels_last: bool = False


def cases(*, dry_run: bool) -> dict[str, Case]:
    """Return the networks by name; small ones of the same kinds for a dry run."""
    if dry_run:
        vit = partial(
            of_timm, "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3
        )
        return {
            "vit": Case(
                build=vit,
                shape=(2, 3, 32, 32),
                classes=1000,
                compiled=("full-rank", "0.01", "0.25", "two 0.25"),
            ),
            "resnet": Case(
                build=partial(CifarResNet, depth=8, width=4),
                shape=(2, 3, 32, 32),
                classes=10,
                compiled=("full-rank", "0.01", "0.25"),
                channels_last=True,
            ),
            "mlp": Case(build=partial(perceptron, 64), shape=(8, 64), classes=None),
        }
    ways = ("0.25 factored", "0.25 folded")
    return {
        "vit": Case(
            build=partial(of_timm, "vit_base_patch16_224"),
            shape=(256, 3, 224, 224),
            classes=1000,
            eager=("full-rank", "0.01", "0.1", "0.25", *ways, "0.4", "two 0.25"),
            compiled=("full-rank", "0.01", "0.25", "two 0.25", *ways),
        ),
        "resnet": Case(
            build=partial(of_timm, "resnet50"),
            shape=(256, 3, 224, 224),
            classes=1000,
            compiled=("full-rank", "0.01", "0.25"),
            channels_last=True,
        ),
        "mlp": Case(build=partial(perceptron, 4096), shape=(16384, 4096), classes=None),
    }


@dataclass
class Variant:
    """A network with its optimizer."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor | None
    optimizer: torch.optim.Optimizer = field(init=False)
    run: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.run = self.model

    def loss(self) -> Tensor:
        """Run forward."""
        with torch.autocast(self.inputs.device.type, dtype=torch.bfloat16):
            outputs = self.run(self.inputs)
        if self.targets is None:
            return outputs.float().square().mean()
        return functional.cross_entropy(outputs.float(), self.targets)

    def step(self) -> None:
        """Take a training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def flops(self) -> int:
        """Return FLOPs of forward and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def memory(self) -> dict[str, float]:
        """Return GiB that the step takes beyond what lies there, and of what lies there."""
        if not self.inputs.is_cuda:
            return {}
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        extra = torch.cuda.max_memory_allocated() - before
        stored = [*self.model.parameters(), *self.model.buffers()]
        stored += [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        static = sum(tensor.nbytes for tensor in stored)
        return {"step_gib": extra / 2**30, "stored_gib": static / 2**30}


def make_variant(name: str, dense: nn.Module, inputs: Tensor, targets: Tensor | None) -> Variant:
    """Return what a name such as "full-rank", "0.25", "0.25 folded" or "two 0.25" stands for."""
    if name == "full-rank":
        return Variant(name, dense, inputs, targets)
    if name.startswith("two "):
        return Variant(name, with_two_factors(dense, float(name[4:])), inputs, targets)
    fraction, _, option = name.partition(" ")
    return Variant(
        name, at_rank_fraction(dense, float(fraction), option or "auto"), inputs, targets
    )


def measure(name: str, case: Case, device: torch.device, results: Results, limit: float) -> None:
    """Measure a network's variants, run as they are and then compiled."""
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    dense = case.build().to(device)
    inputs = torch.randn(case.shape, device=device)
    if case.channels_last:
        dense = dense.to(memory_format=layout)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=layout)
    targets = None
    if case.classes:
        targets = torch.randint(case.classes, (case.shape[0],), device=device)
    made = {
        key: make_variant(key, dense, inputs, targets)
        for key in dict.fromkeys((*case.eager, *case.compiled))
    }
    flops = {key: variant.flops() for key, variant in made.items()}
    failed = []
    for mode in ("eager", "compiled"):
        keys = case.eager if mode == "eager" else case.compiled
        variants = []
        for key in keys:
            if mode == "compiled":
                if results.seconds > limit:
                    print(f"{name} {key}: no time is left to compile it")
                    continue
                made[key].run = torch.compile(made[key].model)
            start = results.seconds
            try:
                for _ in range(WARM_UP):
                    made[key].step()
                synchronize(device)
            except Exception as error:  # of the compiler: the others are measured all the same
                row = {"failed": repr(error)[:200], "traceback": traceback.format_exc()}
                results.add(network=name, mode=mode, variant=key, **row)
                failed.append(f"{name} {key} {mode}")
                continue
            print(f"{name} {key} {mode}: first steps took {results.seconds - start:.1f} s")
            variants.append(made[key])
        if "full-rank" not in [variant.name for variant in variants]:
            continue  # which the others are compared with
        rounds, repeat = (2, 1) if device.type == "cpu" else (ROUNDS, REPEAT)
        seconds = dict(
            zip(
                [variant.name for variant in variants],
                interleaved(
                    [variant.step for variant in variants], device, rounds=rounds, repeat=repeat
                ),
                strict=True,
            )
        )
        report((name, mode), variants, seconds, flops, results)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def report(
    case: tuple[str, str],
    variants: list[Variant],
    seconds: dict[str, list[float]],
    flops: dict[str, int],
    results: Results,
) -> None:
    """Keep a row for each variant, with its kernels where the prediction was missed.

    Args:
        case: network and mode.
        variants, seconds, flops: what was measured, by name.
        results: takes the rows.
    """
    name, mode = case
    full = seconds["full-rank"]
    floor = median_ratio(seconds[str(FLOOR)], full) if str(FLOOR) in seconds else None
    listed = {"full-rank"} if mode == "compiled" else set()
    for variant in variants:
        key = variant.name
        ratio = median_ratio(seconds[key], full)
        flop_ratio = flops[key] / flops["full-rank"]
        predicted = None if floor is None else floor + (1 - floor) * flop_ratio
        row: dict[str, Any] = {
            "network": name,
            "mode": mode,
            "variant": key,
            "milliseconds": 1e3 * statistics.median(seconds[key]),
            "time_ratio": ratio,
            "flop_ratio": flop_ratio,
            "tflop_per_second": flops[key] / statistics.median(seconds[key]) / 1e12,
            "predicted_ratio": predicted,
            **variant.memory(),
        }
        if predicted is not None and ratio > MISSED * predicted:
            listed.add(key)
        if key in listed:
            row["profile"] = kernels(variant)
        results.add(**row)


def kernels(variant: Variant, steps: int = 2, most: int = 25) -> dict[str, Any]:
    """List the kernels of a step: where its time goes, and how much of it the device waits.

    Returns:
        Milliseconds on the device per step, number of launches, and the longest kernels.
    """
    on_gpu = variant.inputs.is_cuda
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            variant.step()
        synchronize(variant.inputs.device)
    rows = []
    for event in profiler.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time:
            rows.append((time / steps / 1e3, event.count / steps, event.key[:120]))
    rows.sort(reverse=True)
    return {
        "device_milliseconds": sum(time for time, *_ in rows),
        "launches": sum(count for _, count, _ in rows),
        "kernels": [
            {"milliseconds": round(time, 3), "launches": count, "name": name}
            for time, count, name in rows[:most]
        ],
    }


def main() -> None:
    """Measure the networks that were asked for."""
    parser = command_line(__doc__)
    parser.add_argument("networks", nargs="+", choices=cases(dry_run=True))
    options = parser.parse_args()
    device = choose_device(dry_run=options.dry_run)
    torch.set_float32_matmul_precision("high")
    for name in options.networks:
        results = Results(f"steps-{name}", options.output, device)
        case = cases(dry_run=options.dry_run)[name]
        measure(name, case, device, results, 0.7 * options.seconds)


if __name__ == "__main__":
    main()
