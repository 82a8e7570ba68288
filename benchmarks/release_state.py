"""What should a weight know of its squared gradients when a release makes it dense again?

  python -m benchmarks.release_state            # two minutes on one core
  python -m benchmarks.release_state --quick    # seconds

The core that it comes from saw a part of the gradient only. A small network on the handwritten
digits of scikit-learn is trained low-rank and released where all of its layers return to dense;
then the mean training loss of the 50 steps after the release is compared between what its
optimizer goes on with:

- means: the method's own, U M Vh and weighted means of the core's second moments, counts kept;
- nothing: no state at all, which begins anew with its count at 0;
- no squares: U M Vh with a second moment of 0, counts kept;
- no squares or counts: the same with the count at 0.

Cores of full rank, and of ranks that were cut to 0.61 of it. Differences to "means" are paired by
seed, with their standard error.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from oialr import OIALR

VARIANTS = ("means", "nothing", "no squares", "no squares or counts")
RELEASE, STEPS_AFTER, BATCH = 150, 50, 32
WEIGHTS = (0, 2, 4)
"""Places of the factorized layers in the network."""
NEVER_CUT, ALWAYS_CUT = 1e-9, 0.9
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, "exp_avg_sq"),
    "AdamW": (torch.optim.AdamW, "exp_avg_sq"),
    "RMSprop": (torch.optim.RMSprop, "square_avg"),
}
"""Classes, and the key of their second moments."""


def change_state(state: dict[str, Any], squares: str, variant: str) -> None:
    """Let a dense weight's state be that of a variant; empty is what an optimizer fills anew."""
    if variant == "nothing":
        state.clear()
    elif variant.startswith("no squares"):
        state[squares].zero_()
        if variant == "no squares or counts":
            state["step"].zero_()


def loss_after_release(
    name: str, variant: str, data: tuple[Tensor, Tensor], *, cutoff: float, seed: int
) -> float:
    """Return the mean training loss of the steps after a release."""
    images, digits = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU()),
        *(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10)),
    )
    kind, squares = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=3e-3)
    method = OIALR(
        model,
        optimizer,
        delay=60,
        update_interval=30,
        release=RELEASE,
        layer_fraction=1.0,
        cutoff=cutoff,
        largest_cut=0.15,
        rank_multiple=1,
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, RELEASE + STEPS_AFTER + 1):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen]), digits[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        method.step()
        if step == RELEASE:
            assert not method.converted  # all layers are dense again
            for place in WEIGHTS:
                weight = model.get_parameter(f"{place}.weight")
                change_state(optimizer.state[weight], squares, variant)
    return statistics.mean(losses[RELEASE:])


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="at least 2, for the standard errors")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="two seeds of Adam alone")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, not {options.seeds}: a standard error needs two")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 16
    data = images, torch.tensor(bunch.target)
    seeds = range(2 if options.quick else options.seeds)
    rows = []
    for name in ["Adam"] if options.quick else OPTIMIZERS:
        for cut, cutoff in (("full rank", NEVER_CUT), ("cut", ALWAYS_CUT)):
            losses = {
                variant: [
                    loss_after_release(name, variant, data, cutoff=cutoff, seed=seed)
                    for seed in seeds
                ]
                for variant in VARIANTS
            }
            for variant, found in losses.items():
                pairs = zip(found, losses["means"], strict=True)
                differences = [mine - means for mine, means in pairs]
                error = statistics.stdev(differences) / len(differences) ** 0.5
                rows.append(
                    {
                        "optimizer": name,
                        "ranks": cut,
                        "state": variant,
                        "loss": statistics.mean(found),
                        "difference": statistics.mean(differences),
                        "standard_error": error,
                    }
                )
                if not options.json:
                    print(
                        "  ".join(
                            f"{v:.4f}" if isinstance(v, float) else v for v in rows[-1].values()
                        )
                    )
    if options.json:
        print(json.dumps({"seeds": len(seeds), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
