"""The groups and columns of metrics.h5. docs/metrics.md describes them for readers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """A dataset of a group: one value per row, or one row of values."""

    name: str
    dtype: str
    """In numpy's notation; text is UTF-8 of fixed length."""
    unit: str
    description: str
    width: int = 0
    """Values per row; 0: a single one."""


STEP = Column("step", "i8", "optimizer steps", "Steps taken")
EPOCH = Column("epoch", "i8", "epochs", "Epoch, from 1; 0 before training")
LOSS = Column("loss", "f8", "1", "Mean loss over the global batch or the split")

SESSIONS = (
    Column("started", "S25", "", "Start of the program, ISO 8601, UTC"),
    Column("process_count", "i8", "1", "Processes"),
    Column("first_step", "i8", "optimizer steps", "Steps taken before this session"),
    Column("versions", "S256", "", "Versions of Python and packages"),
    Column("command", "S1024", "", "Command line of process 0"),
)
TRAIN = (
    STEP,
    EPOCH,
    LOSS,
    Column("learning_rate", "f8", "1", "Learning rate of the first parameter group"),
    Column("samples_per_second", "f8", "1/s", "Samples of the global batch over step_seconds"),
    Column("step_seconds", "f8", "s", "Wall time of the step, with its waits for data and device"),
)
LOWRANK = (
    STEP,
    Column("event", "S8", "", "convert, update (no rank changed), cut or release"),
    Column("trainable_parameters", "i8", "1", "Numbers in all trained parameters"),
    Column("trainable_percent", "f8", "%", "Trained parameters over all of the full-rank network"),
    Column("compression_percent", "f8", "%", "Stored parameters over all of the full-rank network"),
    Column("seconds", "f8", "s", "Wall time of the event"),
    Column("gradient_bytes", "i8", "B", "Gradients that a process contributes per step; 0 alone"),
    Column("broadcast_bytes", "i8", "B", "Factors broadcast during the event"),
    Column("factorization_seconds", "f8", "s", "Factorizations, of the process that took longest"),
    Column("predicted_seconds", "f8", "s", "What the plan predicted of that"),
    Column("imbalance", "f8", "1", "factorization_seconds over their mean over the processes"),
    Column("peak_bytes", "i8", "B", "Most that tensors of process 0 took during the event"),
)
RANK = (
    STEP,
    Column("rank", "i8", "1", "Rank after the event"),
    Column("owner", "i8", "1", "Index of the process that factorized the layer"),
)
MEAN_STABILITY = (
    EPOCH,
    STEP,
    Column("mean_stability", "f8", "1", "Mean of the stability over the averaged weights"),
    Column("mean_mixing_similarity", "f8", "1", "Mean of the mixing similarity over the same"),
    Column("layers", "i8", "1", "Averaged weights: of linear, convolution, attention modules"),
    Column("seconds", "f8", "s", "Time for which training waited"),
)
STABILITY = (
    EPOCH,
    STEP,
    Column("stability", "f8", "1", "Basis stability against the reference, in [-1, 1]"),
    Column("mixing_similarity", "f8", "1", "Similarity of R to the reference's, in [0, 1]"),
    Column("rank", "i8", "1", "Rank of the factorization; min(m, n) at full rank"),
    Column("reference_rank", "i8", "1", "Numerical rank of the reference; 0: none yet"),
    Column("numerical_rank", "i8", "1", "Singular values above max(m, n) eps s[0]"),
    Column("effective_rank", "f8", "1", "Exponential of the spectrum's entropy"),
    Column("stable_rank", "f8", "1", "Squared Frobenius norm over squared spectral norm"),
    Column("orthonormality_error", "f8", "1", "Of U or Vh; NaN of a layer without frozen factors"),
)


def run_groups(figures: Sequence[str]) -> dict[str, tuple[Column, ...]]:
    """Return the groups of a run, for a task with these figures of merit."""
    split = Column("split", "S10", "", "validation or test")
    merits = (Column(name, "f8", "1", f"Mean {name} over the split") for name in figures)
    evaluation = (STEP, EPOCH, split, LOSS, *merits)
    return {
        "sessions": SESSIONS,
        "train": TRAIN,
        "eval": evaluation,
        "lowrank": LOWRANK,
        "stability": MEAN_STABILITY,
    }


def full_rank_of(shape: tuple[int, ...], groups: int) -> int:
    """Return the rank that a weight can have which is read by the rule, as a stack of matrices."""
    return min(shape[0] // groups, math.prod(shape[1:]))


def layer_groups(
    shape: tuple[int, ...], full_rank: int | None = None
) -> dict[str, tuple[Column, ...]]:
    """Return the groups of a layer.

    Args:
        shape: of its dense weight.
        full_rank: number of its singular values; None: those of the weight that is read by the
            rule, the leading dimension makes the rows.
    """
    text = "Singular values before a cut, descending, padded with NaN"
    k = full_rank_of(shape, groups=1) if full_rank is None else full_rank
    spectrum = (STEP, Column("singular_values", "f4", "1", text, width=k))
    return {"rank": RANK, "stability": STABILITY, "spectrum": spectrum}
