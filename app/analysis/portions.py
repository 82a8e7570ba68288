"""Which weights are measured together, what that takes, and how it is spread over the processes.

Checkpoints of large networks do not fit into memory, and bases of earlier ones lie there too. So a
portion of the weights is measured over all checkpoints before the next one is looked at.
"""

from collections.abc import Sequence

from oialr.layer_survey import LayerReport
from oialr.placement.assignment import svd_cost

LARGEST = 2**24
"""Values of the weights that are measured together, unless a single one has more."""
_PORTIONS = 4  # for each process at least, so that little is lost by a kill, and all have work


def operations(layer: LayerReport) -> float:
    """Return l k^2 of a weight, summed over its matrices: to it a decomposition's time is due."""
    return svd_cost(layer.stack_shape)


def divide(layers: Sequence[LayerReport], process_count: int) -> list[list[LayerReport]]:
    """Put weights that follow each other together. A pure function.

    Returns:
        The portions, the one that takes longest first. What is measured at the same time, one by
        each process, is so about equal.
    """
    share = sum(map(operations, layers)) / (_PORTIONS * process_count)
    portions: list[list[LayerReport]] = []
    values = work = 0.0
    for layer in layers:
        m, n = layer.matrix_shape
        values += layer.groups * m * n
        work += operations(layer)
        if not portions or values > LARGEST or work > share:
            portions.append([])
            values, work = layer.groups * m * n, operations(layer)
        portions[-1].append(layer)
    return sorted(portions, key=lambda portion: -sum(map(operations, portion)))


def rounds(portions: Sequence[list[LayerReport]], count: int) -> list[list[list[LayerReport]]]:
    """Return what is measured at the same time: a portion for each of ``count`` processes."""
    return [list(portions[start : start + count]) for start in range(0, len(portions), count)]


def peak_bytes(portion: Sequence[LayerReport], references: int) -> int:
    """Return the memory that a portion takes at most, beside what the program takes itself.

    Of each weight a copy in float32, and of each earlier checkpoint that later ones are compared
    with a basis (m, n) and a mixing factor (k, k); and for one matrix at a time its decomposition:
    float64 copies, factors and workspace, 20 m n + 8 k^2 bytes (seen, with the copy: 1.08 GiB of
    1.13 for 11008 x 4096, 0.49 of 0.50 for 4096 x 4096).

    Args:
        portion: weights that are measured together.
        references: earlier checkpoints that are remembered.
    """
    shapes = [(layer.groups, *layer.matrix_shape) for layer in portion]
    copies = sum(4 * g * m * n for g, m, n in shapes)
    remembered = sum(4 * g * (m * n + min(m, n) ** 2) for g, m, n in shapes)
    work = max(20 * m * n + 8 * min(m, n) ** 2 for _, m, n in shapes)
    return copies + references * remembered + work
