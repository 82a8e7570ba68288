"""The store of a search, and evaluations for it."""

from app.search.store import Evaluation, Store

PARAMETERS = {"oialr.cutoff": "f8", "oialr.delay": "i8", "training.gradient_clip": "S4"}


def evaluation(number, **changes):
    values = {
        "number": number,
        "parameters": {
            "oialr.cutoff": 0.1 + number / 7,
            "oialr.delay": 10 * number,
            "training.gradient_clip": None if number % 2 else 1.5,
        },
        "loss": 0.5 - number / 100,
        "status": "finished",
        "error": 0.4,
        "trainable_percent": 12.5,
        "step_seconds": 0.01,
        "epochs": 3,
        "seconds": 4.5,
        "started": "2026-11-24T12:00:00.000+00:00",
        "seed": 7 + number,
        "processes": 2,
        "worker": 0,
        "island": 0,
        "folder": f"evaluations/{number:05d}",
        "traceback": "",
        "curve": (0.9, 0.6, 0.5 + number),
    }
    return Evaluation(**{**values, **changes})


def create(folder, session=0, worker=0):
    return Store.create(folder, session=session, worker=worker, parameters=PARAMETERS)
