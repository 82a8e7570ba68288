"""How does a training step scale over processes, full-rank against OIALR?

  python -m benchmarks.scaling            # some minutes on two cores
  python -m benchmarks.scaling --quick    # half a minute

Started alone, it starts itself under mpirun for each process count and puts the figures together,
of strong scaling and of weak: time of a step with and without the exchange of gradients, bytes of
gradients that DistributedDataParallel hands to its all-reduce, and time of the method's events.
Both variants take their steps in turn in one run, so that a disturbance of the machine meets both
alike.

To the all-reduces of several sizes that are timed beside them it fits a ring's latency and
bandwidth (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009):

    seconds = 2 (p - 1) latency + 2 (p - 1) / p * bytes / bandwidth

and with figures that are stated for another network it predicts what 16 to 1,024 GPUs would do.
"""

import argparse
import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from app.runtime.launch import read_launch
from app.runtime.processes import Runtime, start_runtime
from benchmarks._mpirun import mpirun
from benchmarks.step_time import at_rank_fraction, vision_transformer
from oialr.layer_survey import parameter_counts
from oialr.method import OIALR
from oialr.placement.processes import Processes

TRAINABLE = 0.16
"""Share of parameters that OIALR trains here, as the paper's networks do in the end."""
BATCH = {"strong": 64, "weak": 16}
"""Samples of all processes together, and of each process."""
VARIANTS = ("full-rank", "OIALR")
MEASURED = 3  # steps before are not measured: DistributedDataParallel orders its buckets in them
PREDICTED = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Network:
    """Stated figures of a network between GPUs, and of the steps on them."""

    latency: float
    bandwidth: float
    compute: float
    gradient_bytes: float


def main() -> None:
    """Measure, fit, predict and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15, help="steps that are measured")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    stated = parser.add_argument_group("stated figures of the prediction (defaults: assumptions)")
    stated.add_argument("--latency", type=float, default=5e-6, help="seconds per message")
    stated.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s per GPU")
    stated.add_argument("--compute", type=float, default=0.1, help="seconds of a step on one GPU")
    stated.add_argument(
        "--gradient-bytes", type=float, default=346e6, help="full-rank (ViT-B/16 in float32)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="1 and 2 processes, few rounds")
    options = parser.parse_args()
    if options.quick:
        options.processes, options.rounds = [1, 2], 4
    if read_launch().launcher != "alone":
        _measure_here(options)
        return
    results = [_measure_under_mpirun(count, options) for count in options.processes]
    model = fit([sample for result in results for sample in result["all_reduces"]])
    network = Network(options.latency, options.bandwidth, options.compute, options.gradient_bytes)
    document = {
        "measured": results,
        "model": model,
        "prediction": predict(network, trainable=results[-1]["trainable"]),
    }
    print(json.dumps(document) if options.json else report(document, network))


def _measure_under_mpirun(count: int, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--rounds", str(options.rounds), "--device", options.device]
    output = subprocess.run(
        mpirun(count, "-m", "benchmarks.scaling", *arguments),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def _measure_here(options: argparse.Namespace) -> None:
    """Measure with the processes of this launch; process 0 prints JSON."""
    torch.set_num_threads(1)
    with start_runtime(device=options.device, timeout=600) as runtime:
        result = measure(runtime, options.rounds)
        if runtime.is_first:
            print(json.dumps(result))


def measure(runtime: Runtime, rounds: int) -> dict[str, Any]:
    """Measure everything with the processes that there are. A collective call."""
    torch.manual_seed(0)
    dense = vision_transformer(192, 8, 3).to(runtime.device)
    low_rank = at_trainable_share(dense, TRAINABLE)
    share = parameter_counts(low_rank)[0] / parameter_counts(dense)[0]
    modes = {}
    for mode, batch in BATCH.items():
        samples = max(1, batch // runtime.process_count) if mode == "strong" else batch
        steps = [Step(copy.deepcopy(model), samples, runtime) for model in (dense, low_rank)]
        for _ in range(MEASURED + rounds):
            for step in steps:
                step.take()
        modes[mode] = {
            name: step.figures(samples * runtime.process_count)
            for name, step in zip(VARIANTS, steps, strict=True)
        }
        del steps
    return {
        "processes": runtime.process_count,
        "device": runtime.device.type,
        "trainable": share,
        "steps": modes,
        "events": measure_events(dense, runtime),
        "all_reduces": measure_all_reduces(runtime, rounds),
    }


def at_trainable_share(dense: nn.Module, share: float) -> nn.Module:
    """Return a factorized copy that trains at most this share of the parameters."""
    limit = share * parameter_counts(dense)[0]
    low, high = 0, 100  # hundredths of the full rank: small enough, and too large
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        model = at_rank_fraction(dense, middle / 100, "auto")
        if parameter_counts(model)[0] <= limit:
            low, best = middle, model
        else:
            high = middle
    assert best is not None, f"no rank leaves {share} of the parameters"
    return best


class Step:
    """A network that is trained, and what its steps took."""

    def __init__(self, model: nn.Module, samples: int, runtime: Runtime) -> None:
        """Wrap the network, if there are other processes."""
        self.sent = 0
        self.model = model
        if runtime.processes.group:
            self.model = DistributedDataParallel(
                model, process_group=runtime.processes.group, gradient_as_bucket_view=True
            )
            self.model.register_comm_hook(runtime.processes.group, self._count)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.batch = torch.randn(samples, 3, 32, 32, device=runtime.device)
        self.seconds: list[float] = []
        self.compute: list[float] = []

    def _count(
        self, group: dist.ProcessGroup, bucket: dist.GradBucket
    ) -> torch.futures.Future[Tensor]:
        self.sent += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(group, bucket)

    def take(self) -> None:
        """Take a step without the exchange of gradients and one with it."""
        if isinstance(self.model, DistributedDataParallel):
            with self.model.no_sync():
                self.compute.append(self._timed(self._step))
        self.sent = 0
        self.seconds.append(self._timed(self._step))

    def _timed(self, function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        if self.batch.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def figures(self, samples: int) -> dict[str, float]:
        """Return medians in seconds, bytes of the last step, and samples per second of all."""
        seconds = statistics.median(self.seconds[MEASURED:])
        compute = statistics.median(self.compute[MEASURED:]) if self.compute else seconds
        return {
            "step_seconds": seconds,
            "compute_seconds": compute,
            "gradient_bytes": self.sent,
            "samples_per_second": samples / seconds,
        }


def measure_events(dense: nn.Module, runtime: Runtime) -> dict[str, float]:
    """Return the seconds of a conversion and of an update of all layers. A collective call."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.AdamW(model.parameters())
    method = OIALR(
        model,
        optimizer,
        delay=1,
        update_interval=1,
        layer_fraction=1.0,
        processes=runtime.processes,
    )
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seconds = {}
    for kind in ("convert", "update"):
        optimizer.zero_grad()
        model(batch.to(runtime.device)).square().mean().backward()
        optimizer.step()
        runtime.processes.barrier()
        event = method.step()
        assert event
        seconds[f"{kind}_seconds"] = event.seconds
    return seconds


def measure_all_reduces(runtime: Runtime, rounds: int) -> list[tuple[int, int, float]]:
    """Return process count, bytes and median seconds of all-reduces of several sizes."""
    if runtime.process_count == 1:
        return []
    processes: Processes = runtime.processes
    samples = []
    for size in (2**12, 2**16, 2**20, 2**22, 2**24):
        tensor = torch.zeros(size // 4, device=runtime.device)
        seconds = []
        for _ in range(MEASURED + rounds):
            processes.barrier()
            start = time.perf_counter()
            processes.sum(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        samples.append((runtime.process_count, size, statistics.median(seconds[MEASURED:])))
    return samples


def all_reduce_seconds(count: int, size: float, *, latency: float, bandwidth: float) -> float:
    """Return the seconds of a ring's all-reduce of ``size`` bytes over ``count`` processes."""
    return 2 * (count - 1) * latency + 2 * (count - 1) / count * size / bandwidth


def fit(samples: Iterable[tuple[int, int, float]]) -> dict[str, float] | None:
    """Fit latency and bandwidth: least squares of relative errors, neither of them negative.

    Returns:
        latency in seconds, bandwidth in bytes per second, and the median relative error; None
        without samples.
    """
    from scipy.optimize import nnls

    rows = list(samples)
    if not rows:
        return None
    counts, sizes, seconds = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    terms = np.stack([2 * (counts - 1), 2 * (counts - 1) / counts * sizes], axis=1)
    (latency, inverse), _ = nnls(terms / seconds[:, None], np.ones(len(rows)))
    errors = np.abs(terms @ [latency, inverse] / seconds - 1)
    return {
        "latency": float(latency),
        "bandwidth": float(1 / inverse) if inverse else float("inf"),
        "median_relative_error": float(np.median(errors)),
    }


def predict(network: Network, *, trainable: float) -> list[dict[str, float]]:
    """Predict weak scaling: the compute time stays, the all-reduce comes on top or is hidden.

    Args:
        network: stated figures. The compute time is taken to be the same for both variants.
        trainable: share of the gradient that OIALR sends.

    Returns:
        For each process count and variant the seconds of the all-reduce, and the efficiency (share
        of a step that is compute) without overlap and with an overlap with two thirds of the
        compute, which is the backward pass.
    """
    rows = []
    for count in PREDICTED:
        row: dict[str, float] = {"processes": count}
        for name, share in zip(VARIANTS, (1.0, trainable), strict=True):
            seconds = all_reduce_seconds(
                count,
                share * network.gradient_bytes,
                latency=network.latency,
                bandwidth=network.bandwidth,
            )
            exposed = max(0.0, seconds - 2 / 3 * network.compute)
            row[f"{name} all-reduce"] = seconds
            row[f"{name} efficiency"] = network.compute / (network.compute + seconds)
            row[f"{name} overlapped"] = network.compute / (network.compute + exposed)
        rows.append(row)
    return rows


def report(document: dict[str, Any], network: Network) -> str:
    """Return the figures as Markdown tables."""
    lines = [
        "| scaling | processes | step, ms: full-rank | OIALR | ratio | compute only: full-rank "
        "| OIALR | gradient bytes: full-rank | OIALR | ratio |",
        "| --- " * 10 + "|",
    ]
    for mode in BATCH:
        for result in document["measured"]:
            full, low = (result["steps"][mode][name] for name in VARIANTS)
            sent = [figures["gradient_bytes"] for figures in (full, low)]
            cells = [mode, str(result["processes"])]
            cells += [f"{1e3 * f['step_seconds']:.1f}" for f in (full, low)]
            cells.append(f"{low['step_seconds'] / full['step_seconds']:.2f}")
            cells += [f"{1e3 * f['compute_seconds']:.1f}" for f in (full, low)]
            cells += [f"{size:,}" for size in sent]
            cells.append(f"{sent[1] / sent[0]:.3f}" if sent[0] else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| processes | conversion, s | update of all layers, s |", "| --- | --- | --- |"]
    for result in document["measured"]:
        seconds = [f"{value:.3f}" for value in result["events"].values()]
        lines.append(f"| {result['processes']} | " + " | ".join(seconds) + " |")
    if model := document["model"]:
        lines += [
            "",
            f"Fitted: latency {1e6 * model['latency']:.0f} us, bandwidth "
            f"{model['bandwidth'] / 1e9:.2f} GB/s, median error "
            f"{100 * model['median_relative_error']:.0f} %.",
        ]
    lines += [
        "",
        f"Prediction for {1e6 * network.latency:g} us, {network.bandwidth / 1e9:g} GB/s, "
        f"{network.compute:g} s of compute, {network.gradient_bytes / 1e6:g} MB full-rank:",
        "",
        "| " + " | ".join(document["prediction"][0]) + " |",
        "| --- " * len(document["prediction"][0]) + "|",
    ]
    for row in document["prediction"]:
        values = [f"{v:.4f}" if name != "processes" else f"{v:.0f}" for name, v in row.items()]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
