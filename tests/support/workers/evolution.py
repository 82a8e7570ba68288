"""Run under mpirun: Propulate's part of a search on a function instead of trainings.

One argument: a JSON list of cases, each a mapping of section, evaluations and known evaluations.
"""

import json
import math
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np

from app.config.search_section import SearchSection
from app.runtime.launch import Launch
from app.runtime.rendezvous import make_store
from app.runtime.workers import start_workers, wait
from app.search.budget import Budget
from app.search.evolution import Known, evolve

TARGET = np.array([0.8, 0.3, 1.0])


def loss(position):
    return float(((position - TARGET) ** 2).sum())


def run(workers, *, section, evaluations, known, seed):
    world = workers.world
    launch = Launch(launcher="mpi", process_index=world.Get_rank(), process_count=world.Get_size())
    store = make_store(launch, world, timeout=timedelta(seconds=100))
    budget = Budget(store, finished=range(known), limit=evaluations, deadline=math.inf)
    taken = []
    number = budget.claim()

    def judge(position):
        nonlocal number
        taken.append((number, position.tolist(), loss(position)))
        number = budget.claim()
        return taken[-1][2], number is None

    # Of islands and workers that may be gone.
    points = enumerate(np.random.default_rng(0).random((known, 3)))
    earlier = [Known(position=p, loss=loss(p), worker=i % 5, island=i % 3) for i, p in points]
    with tempfile.TemporaryDirectory() as folder:
        evolve(
            judge,
            section=SearchSection(**section),
            keys=("a.x", "a.y", "b.z"),
            workers=workers,
            seed=[seed, known],
            known=earlier,
            begin=number is not None,
            folder=Path(folder),
        )
        wait(world)
        files = [path.name for path in Path(folder).iterdir()]
    everything = [one for part in world.allgather(taken) for one in part]
    return {"taken": sorted(everything), "files": files}


def main(cases):
    workers = start_workers(processes_per_worker=1, device="cpu")
    results = [run(workers, **case) for case in cases]
    if workers.world.Get_rank() == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
