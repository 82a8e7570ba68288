"""Train as app.train does, with the rank that each layer is converted to given by name.

  python -m benchmarks.study.given_ranks RANKS.json [arguments of app.train]

For rivals that find their ranks in another way than by a cutoff, such as Cuttlefish by stable
ranks. A conversion cuts at once where ``oialr.cut_at_conversion`` is set.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from oialr.layer_survey import LayerReport
    from oialr.rank_choice import RankChoice


def give_ranks(ranks: Mapping[str, int]) -> None:
    """Let every factorization from here on leave these ranks.

    Args:
        ranks: of every layer that is factorized, by its dense parameter name.
    """
    from oialr.rank_choice import RankChoice

    def rank_after(
        _: "RankChoice", report: "LayerReport", s: "Tensor", *, release: bool
    ) -> int | None:
        r, (m, n) = min(s.shape[-1], ranks[report.name]), report.matrix_shape
        return None if release and r * (m + n) >= m * n else r  # then dense is the smaller form

    RankChoice.after = rank_after  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    from app.command import run_command
    from app.train import main

    give_ranks(json.loads(Path(sys.argv[1]).read_text()))
    run_command(lambda: main(sys.argv[2:]))
