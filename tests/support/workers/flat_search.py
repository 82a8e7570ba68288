"""Run app.search and tell what each process holds more before its last evaluation than before some.

Arguments: the numbers of the two evaluations, and what app.search is to be given. Every third one
ends as hopeless. Each process prints, as a line of JSON, of which handles and threads it has more,
and of which objects one more at least for each third evaluation between the two. Fewer objects are
no leak of an evaluation: a message that is under way when the census is taken is a tuple more.
"""

import gc
import json
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from app.command import run_command
from app.runtime import workers
from app.search.__main__ import main


def census():
    """Count threads, handles by what they open, and Python's objects by type."""
    gc.collect()
    types = Counter(type(thing) for thing in gc.get_objects())
    objects = Counter()
    for kind, count in types.items():
        objects[f"{kind.__module__}.{kind.__qualname__}"] += count
    # Propulate's population is what a search has found: each with the dictionary of its attributes.
    objects["builtins.dict"] -= objects.pop("propulate.population.Individual", 0)
    process = Path("/proc/self")
    threads = Counter({"thread": len(list((process / "task").iterdir()))})
    handles = Counter()
    for path in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # of the folder that is being listed
            # Evaluations and pipes are numbered, which would make each handle one of its kind.
            handles["handle " + re.sub(r"\d+", "N", str(path.readlink()))] += 1
    return threads + handles + objects


def watch(warm, last):
    """Let a census be taken before two evaluations; the second one prints the difference."""
    from app.search import evaluation, session

    evaluate, train = session.evaluate, evaluation.train
    before = Counter()

    def watched(*arguments, number, **others):
        if number == warm:
            before.update(census())  # which leaves something itself, the first time
            before.clear()
            before.update(census())
        if number == last:
            after = census()
            change = {what: after[what] - before[what] for what in after}
            third = (last - warm) // 3
            least = {what: 1 if what.startswith(("handle", "thread")) else third for what in change}
            line = json.dumps({"more": {what: n for what, n in change.items() if n >= least[what]}})
            print(f"{line}\n", end="", flush=True)
        return evaluate(*arguments, number=number, **others)

    def trained(configuration, *arguments, **others):
        outcome = train(configuration, *arguments, **others)
        if int(configuration.run.name.rpartition("-")[2]) % 3 == 2:
            raise evaluation.Hopeless("on all processes alike")
        return outcome

    session.evaluate, evaluation.train = watched, trained


if __name__ == "__main__":
    start_workers = workers.start_workers

    def started(**options):
        """Watch from when MPI is up on."""
        result = start_workers(**options)
        watch(int(sys.argv[1]), int(sys.argv[2]))
        return result

    workers.start_workers = started
    run_command(lambda: main(sys.argv[3:]))
