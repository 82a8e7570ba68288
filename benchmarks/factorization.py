"""How long do conversion and update of real networks' layers take, shared over the processes?

  mpirun -n 2 python -m benchmarks.factorization --networks vit    # minutes on two cores
  mpirun -n 2 python -m benchmarks.factorization --quick           # ten seconds

Measured: all layers of a network's shapes are converted (and updated at a quarter of their rank) as
in a training, but for the training. "alone" is process 0 by itself while the others wait,
"replicated" every process doing everything, "round-robin" layers dealt out in their order.

Simulated, and named so: the seconds that the plan predicts for 1 to 1,024 processes.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from app import OIALR
from app.runtime.calibration import measure_costs, read_costs
from app.runtime.processes import start_runtime
from oialr.compatibility import import_torchvision
from oialr.events import Event
from oialr.layer_survey import survey
from oialr.placement.assignment import Plan, make_plan
from oialr.placement.costs import Costs, split_limit
from oialr.placement.processes import Processes

NETWORKS = ("resnetrs101", "vit_base_patch16_224", "vgg16")
MODES = ("alone", "replicated", "round-robin", "owner", "auto")
PROCESS_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FRACTION = 0.25
LOOKS: dict[str, dict[str, Any]] = {
    "round_robin": {"color": "#D55E00", "linestyle": "--", "marker": "s", "markersize": 5},
    "owner": {"color": "#56B4E9", "linestyle": "-", "marker": "o", "markersize": 8, "linewidth": 4},
    "auto": {"color": "#000000", "linestyle": "-", "marker": ".", "markersize": 5, "linewidth": 1},
    "balanced": {"color": "#555555", "linestyle": ":"},
}
"""Of the lines of a plot: told apart with any colour vision (Okabe and Ito, 2008) and without
colour, by dashes, markers and widths, also where they lie on each other."""


def shapes_of(network: str, *, quick: bool) -> list[tuple[int, int]]:
    """Return the matrices that the method factorizes in a network of timm.

    Args:
        network: a name of timm.
        quick: each shape once, its sides an eighth.
    """
    import_torchvision()
    import timm

    with torch.device("meta"):
        model = timm.create_model(network)
    shapes = [report.matrix_shape for report in survey(model) if report.stays_dense is None]
    if quick:
        shapes = [(max(8, m // 8), max(8, n // 8)) for m, n in dict.fromkeys(shapes)]
    return shapes


def round_robin(shapes: Sequence[Sequence[int]], count: int, costs: Costs) -> Plan:
    """Deal the layers out in their order."""
    finish, loads = [], [0.0] * count
    for i, shape in enumerate(shapes):
        loads[i % count] += costs.seconds(shape)
        finish.append(loads[i % count])
    groups: list[tuple[int, ...]] = [(i % count,) for i in range(len(shapes))]
    return Plan(groups=groups, order=list(range(len(shapes))), finish=finish, loads=loads)


class Case:
    """A network of linear layers of given shapes, ready for events."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], processes: Processes, mode: str, costs: Costs
    ) -> None:
        """Build it with the same random weights on all processes."""
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(n, m, bias=False) for m, n in shapes]
        model = nn.Sequential(*layers, nn.Linear(2, 2))  # the last layer stays full-rank
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self.method = OIALR(
            model,
            self._optimizer,
            delay=1,
            update_interval=1,
            layer_fraction=1.0,
            cutoff=1e-9,
            minimum_rank_fraction=0.0,
            factorization="owner" if mode in ("alone", "round-robin") else mode,  # type: ignore[arg-type]
            processes=processes,
            costs=costs,
        )
        if mode == "round-robin":
            self.method.factorizer.plan = lambda infos: round_robin(  # type: ignore[method-assign]
                [info.shape for info in infos], processes.count, costs
            )

    def event(self) -> Event:
        """Convert or update all layers."""
        self._optimizer.step()
        event = self.method.step()
        assert event
        return event

    def at_rank_fraction(self, fraction: float) -> "Case":
        """Make all layers low-rank with some factors or other."""
        state = self.method.state_dict()
        full = {report.name: report.full_rank for report in self.method.layers}
        state["ranks"] = {name: max(1, round(fraction * k)) for name, k in full.items()}
        state["step_count"] = state["handled"] = 1
        del state["turns"]  # then the steps tell that the conversion is over
        self.method.load_state_dict(state)
        for parameter in self.method.model.parameters():
            torch.nn.init.normal_(parameter)
        return self


def measure(
    shapes: Sequence[tuple[int, int]],
    processes: Processes,
    modes: Sequence[str],
    costs: Costs,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Measure conversion and update in every mode, in turn. A collective call.

    Returns:
        Figures by mode; seconds are those of the slowest process, medians over rounds.
    """
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            processes.barrier()
            row: dict[str, Any] = {}
            if mode != "alone" or processes.index == 0:
                group = Processes() if mode == "alone" else processes
                conversion = Case(shapes, group, mode, costs).event()
                update = Case(shapes, group, mode, costs).at_rank_fraction(FRACTION).event()
                row = {
                    "conversion_seconds": conversion.seconds,
                    "update_seconds": update.seconds,
                    "factorization_seconds": max(conversion.factorization_seconds),
                    "predicted_seconds": max(conversion.predicted_seconds),
                    "imbalance": conversion.imbalance,
                    "conversion_bytes": conversion.broadcast_bytes,
                    "update_bytes": update.broadcast_bytes,
                }
            rows = [row for row in processes.gather(row) if row]
            found[mode].append({key: max(row[key] for row in rows) for key in rows[0]})
    return {
        mode: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for mode, rows in found.items()
    }


def simulate(shapes: Sequence[tuple[int, int]], costs: Costs) -> list[dict[str, Any]]:
    """Predict the seconds of a conversion for many process counts, eight to a node."""
    whole = [costs.seconds(shape) for shape in shapes]
    rows = []
    for count in PROCESS_COUNTS:
        nodes = [process // 8 for process in range(count)]
        plans = {
            mode: make_plan(shapes, nodes, mode=mode, costs=costs, can_split=True)
            for mode in ("owner", "auto")
        }
        largest = max(
            min(costs.seconds(shape, g) for g in range(1, min(count, split_limit(shape)) + 1))
            for shape in shapes
        )
        rows.append(
            {
                "processes": count,
                "balanced": sum(whole) / count,
                "largest_piece": largest,
                "round_robin": round_robin(shapes, count, costs).makespan,
                "owner": plans["owner"].makespan,
                "auto": plans["auto"].makespan,
                "split_layers": len(plans["auto"].split),
            }
        )
    return rows


def plot(simulations: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draw the predicted seconds over the number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(simulations), figsize=(4 * len(simulations), 3.7))
    for ax, (network, rows) in zip(
        [axes] if len(simulations) == 1 else axes, simulations.items(), strict=True
    ):
        x = [row["processes"] for row in rows]
        for key, look in LOOKS.items():
            ax.loglog(x, [row[key] for row in rows], label=key, **look)
        ax.set(title=f"{network} (simulated)", xlabel="processes", ylabel="seconds")
        ax.grid(color="#dddddd")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=120)


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, simulate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", help="parts of names", default=NETWORKS)
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "heat"], default=MODES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--calibration",
        metavar="PATH",
        help="costs; default: measured first, or the library's with --simulate",
    )
    parser.add_argument("--simulate", action="store_true", help="nothing but the simulation")
    parser.add_argument("--plot", metavar="PATH", help="draw the simulation")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="few small layers, one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in NETWORKS if any(part in name for part in options.networks)]
    measured, simulated = {}, {}
    with start_runtime(device="cpu") as runtime:
        processes = runtime.processes
        if options.calibration:
            costs = read_costs(options.calibration)
        elif options.simulate:
            costs = Costs()
        else:
            costs = measure_costs(processes, runtime.device, quick=options.quick)
        for name in names:
            shapes = shapes_of(name, quick=options.quick)
            simulated[name] = simulate(shapes, costs)
            if not options.simulate:
                rounds = 1 if options.quick else options.rounds
                measured[name] = measure(shapes, processes, options.modes, costs, rounds)
        if not runtime.is_first:
            return
    if options.plot:
        plot(simulated, options.plot)
    if options.json:
        document = {"processes": runtime.process_count, "costs": vars(costs)}
        print(json.dumps({**document, "measured": measured, "simulated": simulated}))
        return
    for name, modes in measured.items():
        rows = [{"mode": mode, **figures} for mode, figures in modes.items()]
        print_table(f"{name}, measured with {runtime.process_count} processes", rows)
    for name, rows in simulated.items():
        print_table(f"{name}, simulated: predicted seconds of a conversion", rows)


if __name__ == "__main__":
    main()
