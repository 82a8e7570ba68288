"""What there is among the files: each is looked into, without reading its values."""

from collections import Counter
from collections.abc import Sequence

from app.analysis.checkpoint import fingerprint, read_checkpoint
from app.analysis.choice import Found
from app.analysis.files import Source
from app.analysis.selection import shapes_of, signature
from app.training.foreign_files import CheckpointError
from oialr.placement.processes import Processes


def look_into(sources: Sequence[Source], processes: Processes) -> tuple[list[Found], list[str]]:
    """Look into all files, each process into its share. A collective call.

    Returns:
        What was found, in the order of the sources, and a line for each that cannot be read.
    """
    mine: list[tuple[int, Found | str]] = []
    for index in range(processes.index, len(sources), processes.count):
        try:
            stored = read_checkpoint(*sources[index].files, index=sources[index].index)
        except CheckpointError as error:
            mine.append((index, str(error)))
            continue
        entry = Found(
            source=sources[index],
            shapes=shapes_of(stored.weights),
            step=stored.step,
            epoch=stored.epoch,
            within_epoch=stored.within_epoch,
            fingerprint=fingerprint(stored.weights),
            integers=tuple(stored.integers),
        )
        mine.append((index, entry))
    gathered = [entry for part in processes.gather(mine) for entry in part]
    entries = [entry for _, entry in sorted(gathered, key=lambda pair: pair[0])]
    return (
        [entry for entry in entries if isinstance(entry, Found)],
        [entry for entry in entries if isinstance(entry, str)],
    )


def of_one_network(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Keep the checkpoints of the network that most of them are of.

    Returns:
        Those, and a line for each other one.
    """
    signatures = [signature(checkpoint.shapes) for checkpoint in found]
    if not found:
        return [], []
    common, _ = Counter(signatures).most_common(1)[0]
    kept, problems = [], []
    for checkpoint, own in zip(found, signatures, strict=True):
        if own == common:
            kept.append(checkpoint)
            continue
        name, m, n = next(iter(sorted(set(own) ^ set(common))))
        problems.append(
            f"{checkpoint.path}: of another network than the others: {name} ({m}, {n}) is "
            f"{'only here' if (name, m, n) in own else 'missing'}"
        )
    return kept, problems
