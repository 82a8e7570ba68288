"""A disk that is full at a random write: one line, and the run can be gone on with."""

import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.trials.comparison import difference, read_outcome
from benchmarks.trials.runs import VARIANTS, References, start

PLACES = {"/": 2_500_000, "/checkpoints/": 1_800_000, "/metrics.h5": 900_000, "/best/": 400_000}
"""Where there is little room, within the run's folder, and the bytes that a run writes there."""


def full_disk_run(folder: Path, chance: Random, references: References) -> dict[str, Any]:
    """Train with room for a random number of bytes, then go on with enough; see kill_run."""
    count = chance.choice((1, 2))
    place = chance.choice(list(PLACES))
    variant = VARIANTS[1] if place == "/best/" else chance.choice(VARIANTS)
    room = chance.randrange(PLACES[place])
    within = f"{folder}/checkpoints{place}" if place == "/best/" else f"{folder}{place}"
    variables = {"ROOM": str(room), "ROOM_IN": within}
    found = Counter(runs=1)
    problems = []
    end = start(folder, variant, count, variables=variables).wait()
    full = any(end.codes)
    found[f"full in {place.strip('/') or 'the whole folder'}"] += full
    found["enough room"] += not full
    if end.hung or end.orphans:
        problems.append("hangs, or leaves processes behind")
    if full:
        if len(end.errors) != 1 or "No space left on device" not in end.errors[0]:
            problems.append(f"not one line that names the cause: {end.output[-1500:]}")
        if "Traceback" in end.output:
            problems.append(f"a traceback: {end.output[-2500:]}")
        if 1 not in end.codes:
            problems.append(f"exit codes {end.codes}")
        end = start(folder, variant, count).wait()
    if any(end.codes) or end.hung:
        problems.append(f"cannot go on: {end.codes} {end.output[-1500:]}")
    else:
        other = difference(read_outcome(folder), references.get(variant, count).outcome)
        problems += [f"differs from the undisturbed run: {other}"] if other else []
    if not problems:
        shutil.rmtree(folder)
    described = f"{folder.name} ({', '.join(variant)}; {count} processes, {room} B in {place}): "
    return {"counts": dict(found), "problems": [described + problem for problem in problems]}
