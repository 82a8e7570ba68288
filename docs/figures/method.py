"""Draw docs/figures/method.png: a weight of a small network on its way through algorithm 1.

    python -m docs.figures.method [--output docs/figures/method.png]

It trains a network by oialr/reference.py for 300 steps and takes a second or two. Every cell of the
figure is a number of that training.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from oialr.reference import OIALR

M, N, D, NU, BETA = 24, 16, 200, 100, 0.12
TRAINED, FROZEN, CUT = "#d95f02", "#555555", "#bbbbbb"
GAP = 5


def train() -> list[tuple[str, list[tuple[str, Tensor, str]]]]:
    """Train a network and return four stages of its first weight: title, matrices, colours."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    method = OIALR(model, optimizer, d=D, nu=NU, beta=BETA)
    x = torch.randn(512, N, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(N, 3, dtype=torch.float64) / 2)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            method.step()

    def factors() -> list[tuple[str, Tensor, str]]:
        weight, sigma = method.low_rank["0"], method.trained["0"]
        return [
            ("$U$", weight.U.detach().clone(), FROZEN),
            (r"$\Sigma$", sigma.detach().clone(), TRAINED),
            ("$V^T$", weight.Vh.detach().clone(), FROZEN),
        ]

    steps(D - 1)
    full_rank = [("$W$", method.trained["0"].detach().clone(), TRAINED)]
    steps(1)
    converted = factors()
    steps(NU - 1)
    trained = factors()
    steps(1)
    updated = factors()
    return [
        (r"1. Steps $1 \ldots d$: $W$ is trained", full_rank),
        (r"2. After step $d$: $W = U\,\Sigma\,V^T$, $\Sigma$ is diagonal", converted),
        (r"3. Steps $d + 1 \ldots d + \nu$: $\Sigma$ is trained, and fills", trained),
        (r"4. After $d + \nu$: $U \leftarrow UU'$, $V^T \leftarrow V'^T V^T$, cut to $r$", updated),
    ]


def draw_stage(axes: Axes, title: str, matrices: list[tuple[str, Tensor, str]]) -> None:
    """Draw matrices side by side, all cells of one size, and what was cut of them."""
    left = 0.0 if len(matrices) > 1 else N + GAP
    for label, matrix, colour in matrices:
        rows, columns = matrix.shape
        full_rows, full_columns = (M if label in {"$U$", "$W$"} else N), N
        shown = (matrix.sign() * (matrix.abs() / matrix.abs().max()).sqrt()).numpy()
        for height, width, edge, style in (
            (full_rows, full_columns, CUT, ":"),
            (rows, columns, colour, "-"),
        ):
            axes.add_patch(
                Rectangle(
                    (left, -height), width, height, fill=False, edgecolor=edge, linestyle=style
                )
            )
        axes.imshow(shown, extent=(left, left + columns, -rows, 0), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.text(left, 0.8, rf"{label}  {rows} $\times$ {columns}", color=colour, fontsize=9)
        left += full_columns + GAP
    axes.set_xlim(-1, 3 * N + 2 * GAP + 1)
    axes.set_ylim(-M - 1, 3)
    axes.set_title(title, fontsize=10, loc="left")
    axes.axis("off")


def main() -> None:
    """Train, draw and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=Path(__file__).with_suffix(".png"), type=Path)
    output = parser.parse_args().output
    figure, grid = plt.subplots(
        2, 2, figsize=(9.5, 6.2), layout="constrained", gridspec_kw={"wspace": 0.1}
    )
    for axes, (title, matrices) in zip(grid.flat, train(), strict=True):
        draw_stage(axes, title, matrices)
    key = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linestyle=style, label=label)
        for label, colour, style in (
            ("trained", TRAINED, "-"),
            ("frozen", FROZEN, "-"),
            ("cut", CUT, ":"),
        )
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
