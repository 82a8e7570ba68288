"""The callbacks for Lightning: what they do is what a loop of one's own does, bit for bit."""

import pytest
import torch
from support.examples import added_lines, check_output, described, need_framework
from support.low_rank import equal
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import oialr
from oialr import OIALR, StabilityTracker
from oialr.errors import UserError

need_framework("lightning")

import lightning.pytorch as pl

from oialr.integrations.lightning import OIALRCallback, StabilityCallback

OPTIONS = {"delay": 5, "update_interval": 3, "cutoff": 0.4, "layer_fraction": 0.5}
BATCHES, BATCH = 8, 16
EXAMPLE = "with_lightning"

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and the like


class Module(pl.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 5)
        )
        self.optimizer_count = optimizers

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch, number):
        self.log("test_loss", self.training_step(batch, number))

    def configure_optimizers(self):
        made = [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self.optimizer_count)]
        return made, [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in made]


def data():
    x = torch.randn(BATCHES * BATCH, 20, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x[:, :5].argmax(1)), batch_size=BATCH)


def module(seed=0, **settings):
    torch.manual_seed(seed)
    return Module(**settings)


def trainer(callbacks, epochs, **settings):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{"enable_checkpointing": False, **settings},
    )


ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}


def fitted(epochs, seed=0, checkpoint=None, **options):
    model, callback = module(seed), OIALRCallback(**{**OPTIONS, **options})
    training = trainer([callback], epochs, **ACCUMULATED)
    training.fit(model, data(), ckpt_path=checkpoint)
    return model, callback, training


def by_a_loop(epochs, **options):
    """Train as :func:`fitted` does, in a loop of one's own; return the module and its method."""
    other = module()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    method = OIALR(other, optimizer, **{**OPTIONS, **options})
    for _ in range(epochs):
        for number, batch in enumerate(data()):
            (other.training_step(batch, number) / 2).backward()
            if number % 2:
                nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                optimizer.step()
                method.step()
                optimizer.zero_grad()
        schedule.step()
    return other, method


@pytest.mark.slow
def test_it_is_what_a_loop_of_ones_own_does():
    model, callback, _ = fitted(6)
    other, method = by_a_loop(6)
    assert method.step_count == callback.method.step_count == 6 * BATCHES // 2
    assert callback.method.ranks() == method.ranks() != {name: 20 for name in method.ranks()}
    assert equal(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_resumed_training_ends_with_the_same_bits(epochs, tmp_path):
    """Stopped before the conversion (step 5), after it, and after updates."""
    whole, method = fitted(6)[0], fitted(epochs)[2]
    method.save_checkpoint(tmp_path / "last.ckpt")
    model, callback, training = fitted(6, seed=9, checkpoint=tmp_path / "last.ckpt")
    assert equal(model, whole)
    assert callback.method.step_count == 24
    assert 0 < training.callback_metrics["trainable_percent"] < 100


FACTORS = {
    "core_learning_rate_factor": 3.0,
    "release": 14,
    "release_warmup": 6,
    "factor_learning_rate_factor": 0.5,
}


class Rates(pl.Callback):
    """Notes at each optimizer step the rates of all groups that hold something."""

    def on_fit_start(self, trainer, pl_module):
        self.rates = []
        trainer.optimizers[0].register_step_pre_hook(self.look)

    def look(self, optimizer, *_):
        self.rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})


def with_factors(epochs, seed=0, checkpoint=None):
    model, callback, rates = module(seed), OIALRCallback(**{**OPTIONS, **FACTORS}), Rates()
    training = trainer([callback, rates], epochs, **ACCUMULATED)
    training.fit(model, data(), ckpt_path=checkpoint)
    return model, callback, rates.rates, training


@pytest.mark.slow
def test_rates_follow_the_schedule_of_the_module_times_their_factors(tmp_path):
    """Four steps an epoch, a conversion after step 5, a release after 14 with a warm-up of six."""
    model, callback, rates, training = with_factors(6)
    assert callback.method.steps_since_release == 10
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(other, 6)
    for step, found in enumerate(rates):
        rate = other.param_groups[0]["lr"]
        trained = [rate, 3 * rate] if 5 <= step < 14 else [rate]
        if step >= 14:
            trained.append(0.5 * rate * min(1, (step - 13) / 7))
        assert sorted(found) == pytest.approx(sorted(trained)), step
        if step % 4 == 3:
            other.step()
            schedule.step()
    assert training.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert len(training.optimizers[0].param_groups) == 1

    for epochs in (2, 4):
        with_factors(epochs)[3].save_checkpoint(tmp_path / "last.ckpt")
        resumed, _, later, _ = with_factors(6, seed=9, checkpoint=tmp_path / "last.ckpt")
        assert later == rates[4 * epochs :]
        assert equal(resumed, model)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, number))
        optimizer.step()

    def configure_optimizers(self):
        return super().configure_optimizers()[0]


@pytest.mark.slow
def test_manual_optimization_is_counted_alike():
    torch.manual_seed(0)
    model, callback = Manual(), OIALRCallback(**OPTIONS)
    trainer([callback], 2).fit(model, data())
    assert callback.method.step_count == 2 * BATCHES
    assert callback.method.converted


class Prepared(Module):
    def __init__(self):
        super().__init__()
        oialr.prepare(self)


@pytest.mark.slow
def test_a_module_that_prepares_itself_loads_checkpoints(tmp_path):
    model, _, training = fitted(4)
    training.save_checkpoint(tmp_path / "last.ckpt")
    assert equal(Prepared.load_from_checkpoint(tmp_path / "last.ckpt"), model)


@pytest.mark.slow
def test_a_fit_goes_on_where_the_last_one_ended(tmp_path):
    model, callback, training = fitted(3)
    before = callback.method.step_count
    training.fit_loop.max_epochs = 4
    training.fit(model, data())
    assert callback.method.step_count == before + 4
    assert callback.method.converted
    training.save_checkpoint(tmp_path / "last.ckpt")
    training.test(model, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    training, other = trainer([callback], 1), module()
    training.fit(other, data())  # another one begins anew
    assert callback.method.step_count == BATCHES
    assert all(parameter.isfinite().all() for parameter in other.parameters())


class OneOptimizer(Module):
    """Makes its optimizer once."""

    def configure_optimizers(self):
        self.made = getattr(self, "made", None) or super().configure_optimizers()[0]
        return self.made


@pytest.mark.slow
def test_a_fit_goes_on_with_the_same_optimizer():
    torch.manual_seed(0)
    model, callback = OneOptimizer(), OIALRCallback(**{**OPTIONS, **FACTORS})
    for epochs in (1, 2):
        training = trainer([callback], epochs)
        training.fit(model, data())
    assert callback.method.step_count == 3 * BATCHES
    held = {id(p) for group in model.made[0].param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= held


@pytest.mark.slow
def test_factors_decay_as_in_a_loop_of_ones_own():
    """Lightning makes the gradients within the optimizer's step."""
    options = {"release": 5, "frobenius_decay": 0.5, "cutoff": 0.6, "largest_cut": 0.8}
    model, _, _ = fitted(4, **options)
    other, _ = by_a_loop(4, **options)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)  # where rates are the same but for rounding


@pytest.mark.slow
def test_checkpoints_and_files_load_into_a_new_module(tmp_path):
    model, _, training = fitted(4)
    training.save_checkpoint(tmp_path / "last.ckpt")
    other = module(9)
    trainer([OIALRCallback(**OPTIONS)], 1).test(
        other, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert equal(other, model)
    oialr.save(model, tmp_path / "network.safetensors")
    assert equal(oialr.load(module(9), tmp_path / "network.safetensors"), model)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_averages_of_weights_follow(first, tmp_path):
    """Without a test or a validation in between the module ends with the average, as a loop's."""

    def fit(checkpoint=None):
        model, average = module(), pl.callbacks.EMAWeightAveraging(decay=0.8)
        ours = OIALRCallback(**OPTIONS, release=20)
        kept = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        callbacks = [ours, average] if first == "ours" else [average, ours]
        training = trainer([*callbacks, kept], 4, enable_checkpointing=True)
        training.fit(model, data(), ckpt_path=checkpoint)
        return model, ours.method

    model, method = fit()
    assert method.converted
    assert method.steps_since_release is not None
    for epoch in (0, 1, 2):  # low-rank, cut and released
        resumed, _ = fit(tmp_path / f"epoch={epoch}-step={(epoch + 1) * BATCHES}.ckpt")
        assert equal(resumed, model)
    other = module()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    looped = OIALR(other, optimizer, **OPTIONS, release=20)
    copied = AveragedModel(other, avg_fn=get_ema_avg_fn(0.8))
    looped.follow(copied)
    for _ in range(4):
        for number, batch in enumerate(data()):
            other.training_step(batch, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            looped.step()
            copied.update_parameters(other)
        schedule.step()
    assert method.ranks() == looped.ranks()
    if first == "ours":
        assert equal(model, copied.module)
        return
    x = next(iter(data()))[0]  # updated before an event and not after it: alike but for that
    torch.testing.assert_close(model.network(x), copied.module.network(x), rtol=0.1, atol=0.02)


@pytest.mark.slow
def test_fabric_is_looked_through():
    from lightning.fabric import Fabric

    made = []
    for fabric in (None, Fabric(accelerator="cpu", devices=1)):
        model = module().network
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        wrapped = (model, optimizer) if fabric is None else fabric.setup(model, optimizer)
        method = OIALR(*wrapped, **OPTIONS, release=20)
        for x, y in [*data()] * 3:
            loss = nn.functional.cross_entropy(wrapped[0](x), y)
            loss.backward() if fabric is None else fabric.backward(loss)
            wrapped[1].step()
            method.step()
            wrapped[1].zero_grad()
        assert method.model is model
        made.append(method)
    assert equal(made[0].model, made[1].model)


def test_several_optimizers_are_refused():
    model, training = module(optimizers=2), trainer([OIALRCallback(**OPTIONS)], 1)
    model.automatic_optimization = False
    with pytest.raises(UserError, match=r"one optimizer, and configure_optimizers of Module .* 2"):
        training.fit(model, data())


@pytest.mark.slow
def test_stability_is_measured_after_every_epoch():
    model, callback = module(), StabilityCallback(window=2)
    training = trainer([callback, OIALRCallback(**OPTIONS)], 4)
    training.fit(model, data())
    assert len(callback.tracker.history) == 4
    last = StabilityTracker(model).measure()
    assert [row.name for row in last] == [row.name for row in callback.tracker.history[-1]]
    assert 0 < training.callback_metrics["stability"] <= 1.0001


def test_options_are_checked_at_the_start_of_the_training():
    callback = OIALRCallback(delay=5, update_interval=3, cutoff=2.0)
    model, training = module(), trainer([callback], 1)
    with pytest.raises(ValueError, match="cutoff"):
        training.fit(model, data())
    assert callback.state_dict() == {}


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    command = f"python -m examples.{EXAMPLE} 2"
    (added,), output = described(command)
    assert added == added_lines(EXAMPLE)
    assert len(added) == 2
    check_output(command, output, tmp_path)
