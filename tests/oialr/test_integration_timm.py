"""The method in the loop of timm's train.py: restored, stored and stepped with the optimizer."""

import argparse
import copy
import math

import pytest
import torch
from support.examples import added_lines, check_output, described, need_framework
from support.low_rank import equal
from support.method_loop import CUT, batch, network
from torch import nn

from oialr import OIALR

need_framework("timm")

from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad

from oialr.integrations.timm import StabilityMetrics, oialr_in_loop

OPTIONS = {"delay": 5, "update_interval": 3, "cutoff": 0.4}
RELEASE = {**OPTIONS, **CUT, "release": 12, "layer_fraction": 1, "core_learning_rate_factor": 2.0}
STEPS = 20
EXAMPLE = "with_timm"


class Program:
    """As train.py: what is there, in its order, and the loop."""

    def __init__(self, options, *, seed=0, resume=None, take=oialr_in_loop):
        self.model = network(seed)
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-2, weight_decay=0.1)
        self.method = take(self.model, self.optimizer, **options)
        if resume:
            resume_checkpoint(self.model, str(resume), self.optimizer, log_info=False)
        self.average = ModelEmaV3(self.model, decay=0.9)
        self.method.follow(self.average)
        if resume:
            load_checkpoint(self.average.module, str(resume), use_ema=True)
        self.schedule = CosineLRScheduler(self.optimizer, STEPS, t_in_epochs=False)
        self.schedule.step_update(self.method.step_count)

    def train(self, steps):
        for step in range(self.method.step_count, steps):
            self.optimizer.zero_grad()
            x, y = batch(step)
            for part in (slice(0, 32), slice(32, 64)):  # accumulated
                (nn.functional.cross_entropy(self.model(x[part]), y[part]) / 2).backward()
            dispatch_clip_grad(self.model.parameters(), value=0.5)
            self.optimizer.step()
            self.average.update(self.model)
            self.schedule.step_update(step + 1)
        return self

    def save(self, folder):
        saver = CheckpointSaver(
            self.model,
            self.optimizer,
            argparse.Namespace(model="network"),
            model_ema=self.average,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
        )
        saver.save_checkpoint(0, metric=1.0)
        return folder / "last.pth.tar"


@pytest.mark.slow
def test_it_is_what_a_loop_of_ones_own_does():
    program = Program(OPTIONS).train(STEPS)
    other = Program(OPTIONS, take=OIALR)
    other.average.update = lambda model: other.method.step() and None
    other.train(STEPS)
    assert equal(program.model, other.model)
    assert program.method.ranks() == other.method.ranks()
    assert program.method.step_count == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS, RELEASE])
@pytest.mark.parametrize("steps", [4, 9, 14])
def test_a_resumed_training_ends_with_the_same_bits(options, steps, tmp_path):
    whole = Program(options).train(STEPS)
    file = Program(options).train(steps).save(tmp_path)
    resumed = Program(options, seed=9, resume=file).train(STEPS)
    assert equal(whole.model, resumed.model)
    assert equal(whole.average.module, resumed.average.module)


def test_a_checkpoint_of_a_full_rank_training_is_gone_on_with(tmp_path):
    program = Program(OPTIONS).train(3)
    file = program.save(tmp_path)
    stored = torch.load(file, weights_only=False)
    del stored["optimizer"]["oialr"]
    torch.save(stored, file)
    resumed = Program(OPTIONS, seed=9, resume=file)
    assert resumed.method.step_count == 0
    assert equal(resumed.model, program.model)


@pytest.mark.slow
def test_stability_is_among_the_metrics_of_an_epoch():
    program, metrics = Program(OPTIONS), {"loss": 1.0}
    stability = StabilityMetrics(program.model, window=1)
    metrics.update(stability.measure())
    assert math.isnan(metrics["stability"])
    metrics.update(stability.measure())
    assert metrics == {"loss": 1.0, "stability": pytest.approx(1)}
    program.train(8)
    before = copy.deepcopy(metrics)
    metrics.update(stability.measure())
    assert metrics["stability"] < before["stability"]
    assert len(stability.tracker.history) == 3


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    command = f"torchrun --nproc-per-node 2 -m examples.{EXAMPLE}"
    (added,), output = described(command)
    assert added == added_lines(EXAMPLE)
    check_output(command, output, tmp_path)
