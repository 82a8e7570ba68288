"""Steps between two records: what is fetched of them."""

import torch

from app.training.steps import Step, fetch
from oialr.placement.processes import Processes


def test_the_wait_for_a_device_belongs_to_the_steps_alike():
    """A step on a GPU only asks for its work, and nobody waits for that before the losses."""
    steps = [
        Step(step=n, loss=torch.tensor(float(n)), learning_rate=0.1, seconds=0.25, samples=7)
        for n in (1, 2)
    ]
    times = iter([10.0, 13.0])
    fetched = fetch(steps, Processes(), problem=False, clock=lambda: next(times))
    assert fetched.losses == [1, 2]
    assert fetched.seconds == [1.75, 1.75]
    assert fetched.samples_per_second == 4
    assert not fetched.problem
