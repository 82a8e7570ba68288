"""The callbacks for transformers' Trainer, the method in accelerate's loop, and their files."""

import pytest
import torch
from support.examples import added_lines, check_output, described, need_framework
from support.launching import ROOT, launch
from support.low_rank import equal
from torch import nn

from oialr import OIALR, StabilityTracker
from oialr.errors import UserError

need_framework("transformers")
need_framework("accelerate")

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oialr.integrations.huggingface import (
    OIALRCallback,
    StabilityCallback,
    from_pretrained,
    save_pretrained,
)

OPTIONS = {"delay": 4, "update_interval": 4, "cutoff": 0.4, "layer_fraction": 0.5}
STEPS = 12
EXAMPLE = "with_transformers"


def network(seed=0, tied=False):
    torch.manual_seed(seed)
    configuration = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,  # random numbers, which a checkpoint restores
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(configuration)


def sequences():
    first = torch.arange(32)[:, None]
    rows = (first + (1 + first % 3) * torch.arange(8)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, callbacks, *, seed=0, steps=STEPS, model=None, **settings):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    model = model or {"model": network(seed)}
    return Trainer(args=arguments, train_dataset=sequences(), callbacks=callbacks, **model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after an undisturbed training, its callback, and the folder of its checkpoints."""
    folder, callback = tmp_path_factory.mktemp("trained"), OIALRCallback(**OPTIONS)
    training = trainer(folder, [callback])
    training.train()
    return training.model, callback, folder


@pytest.mark.slow
def test_a_training_turns_low_rank(trained):
    _, callback, _ = trained
    assert callback.method.step_count == STEPS
    assert min(callback.method.ranks().values()) < 16
    assert callback.method.trainable_percent() < 100


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_training_ends_with_the_same_bits(trained, step, tmp_path):
    """Stopped before the conversion (step 4), after it, and after an update."""
    model, first, folder = trained
    callback = OIALRCallback(**OPTIONS)
    training = trainer(tmp_path, [callback], seed=9)
    training.train(resume_from_checkpoint=folder / f"checkpoint-{step}")
    assert equal(training.model, model)
    assert callback.method.ranks() == first.method.ranks()


FACTORS = {
    "core_learning_rate_factor": 3.0,
    "release": 8,
    "release_warmup": 2,
    "factor_learning_rate_factor": 0.5,
}


class Rates(TrainerCallback):
    """Notes at each optimizer step the rates of all groups that hold something."""

    def __init__(self):
        self.rates = []

    def on_train_begin(self, args, state, control, optimizer, **objects):
        optimizer.optimizer.register_step_pre_hook(self.look)

    def look(self, optimizer, *_):
        self.rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})


@pytest.mark.slow
def test_rates_follow_the_schedule_of_the_trainer_times_their_factors(tmp_path):
    """It falls linearly; a conversion is after step 4, a release after 8 with a warm-up of two."""
    callback, rates = OIALRCallback(**{**OPTIONS, **FACTORS}), Rates()
    training = trainer(tmp_path, [callback, rates])
    training.train()
    assert callback.method.steps_since_release == 4
    for step, found in enumerate(rates.rates):
        rate = 1e-2 * (1 - step / STEPS)
        trained = [rate, 3 * rate] if 4 <= step < 8 else [rate]
        if step >= 8:  # some weights are dense again, and warm up as the factors do
            share = min(1, (step - 7) / 3)
            trained += [0.5 * rate * share, *([rate * share] if share < 1 else [])]
        assert sorted(found) == pytest.approx(sorted(trained)), step
    assert {*callback.method.state_dict()["released"].values()} == {"factors", "dense"}

    for step in (6, 9):
        callback, later = OIALRCallback(**{**OPTIONS, **FACTORS}), Rates()
        resumed = trainer(tmp_path / "resumed", [callback, later], seed=9)
        resumed.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
        assert later.rates == rates.rates[step:]
        assert equal(resumed.model, training.model)


@pytest.mark.slow
def test_a_second_training_goes_on_with_what_the_first_has_left(tmp_path):
    """Two methods on one optimizer took it its parameters, step by step."""
    callback = OIALRCallback(**{**OPTIONS, "core_learning_rate_factor": 3.0})
    training = trainer(tmp_path, [callback], steps=6)
    training.train()
    before = {name: x.detach().clone() for name, x in training.model.named_parameters()}
    training.train()
    assert callback.method.step_count == 12
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    trained = {n: x for n, x in training.model.named_parameters() if x.requires_grad}
    assert any(name.endswith(".core") for name in trained)
    for name, parameter in trained.items():
        assert id(parameter) in held, name
        assert parameter.shape != before[name].shape or not torch.equal(parameter, before[name])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"release": 5}])
def test_a_second_trainer_goes_on_with_network_and_callback_of_the_first(options, tmp_path):
    """Its optimizer is another one; after a release nobody else knows what the weights are."""
    callback = OIALRCallback(**{**OPTIONS, **options})
    training = trainer(tmp_path / "first", [callback], steps=6)
    training.train()
    ranks = callback.method.ranks()
    again = trainer(tmp_path / "second", [callback], steps=3, model={"model": training.model})
    again.train()
    assert callback.method.step_count == 9
    assert callback.method.steps_since_release == (4 if options else None)
    assert all(rank <= ranks[name] for name, rank in callback.method.ranks().items())


@pytest.mark.slow
def test_a_network_that_is_made_anew_begins_anew(tmp_path):
    """As for every trial of a search: what the callback remembers is the last one's."""
    callback = OIALRCallback(**OPTIONS)
    training = trainer(tmp_path, [callback], steps=6, model={"model_init": lambda: network(3)})
    for _ in range(2):
        training.train()
        assert callback.method.step_count == 6
        assert callback.method.model is training.model
        assert callback.method.converted


@pytest.mark.slow
def test_a_full_rank_training_may_be_resumed_with_the_method(tmp_path):
    trainer(tmp_path, [], steps=3).train()
    callback = OIALRCallback(**OPTIONS)
    training = trainer(tmp_path, [callback], steps=9)
    training.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert callback.method.step_count == 6
    again = trainer(tmp_path / "again", [OIALRCallback(**OPTIONS)], seed=9, steps=9)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-6")
    assert equal(again.model, training.model)


def test_a_delay_by_stability_is_refused_before_a_checkpoint_needs_it():
    with pytest.raises(UserError, match=r"delay: stability .* give OIALRCallback a number"):
        OIALRCallback(delay="stability", update_interval=2, latest_delay=20)


@pytest.mark.slow
def test_callbacks_may_be_restored_from_the_checkpoint(trained, tmp_path):
    model, _, folder = trained
    training = trainer(
        tmp_path,
        [OIALRCallback(delay=7, update_interval=1)],
        seed=9,
        restore_callback_states_from_checkpoint=True,
    )
    training.train(resume_from_checkpoint=folder / "checkpoint-6")
    assert equal(training.model, model)


@pytest.mark.slow
def test_a_network_that_was_made_anew_is_told(trained, tmp_path):
    def anew():
        return network()

    training = trainer(tmp_path, [OIALRCallback(**OPTIONS)], model={"model_init": anew})
    with pytest.raises(UserError, match=r"let model_init return oialr\.prepare\(model\)"):
        training.train(resume_from_checkpoint=trained[2] / "checkpoint-6")


@pytest.mark.parametrize("kind", [LlamaForCausalLM, AutoModelForCausalLM])
def test_checkpoints_and_dense_weights_load(trained, kind, tmp_path):
    model, _, folder = trained
    tokens = sequences()[0]["input_ids"][None]
    expected = model.eval()(tokens).logits
    loaded = from_pretrained(kind, folder / f"checkpoint-{STEPS}")
    assert torch.equal(loaded(tokens).logits, expected)
    save_pretrained(model, tmp_path)
    for dense in (kind.from_pretrained(tmp_path), from_pretrained(kind, tmp_path)):
        assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
        torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_tied_weights_load(tmp_path):
    model = network(tied=True)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(LlamaForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert equal(loaded, model)


def low_rank_and_back(model, folder, kind, **options):
    """Store a network full-rank, low-rank and as dense weights; return it, and what is read."""
    model.save_pretrained(folder / "full-rank")
    assert equal(from_pretrained(kind, folder / "full-rank"), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    method.step()
    assert method.converted
    model.save_pretrained(folder / "low-rank")
    save_pretrained(model, folder / "dense")
    low, dense = from_pretrained(kind, folder / "low-rank"), kind.from_pretrained(folder / "dense")
    assert equal(low, model)
    return low, dense


@pytest.mark.parametrize("frozen_dtype", [None, "bfloat16"])
def test_networks_load_whose_names_transformers_changes(frozen_dtype, tmp_path):
    """Swin is stored under the names of earlier versions; config.json has the dtype of one U."""
    settings = {"num_channels": 1, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    config = SwinConfig(image_size=16, patch_size=2, window_size=4, num_labels=4, **settings)
    torch.manual_seed(0)
    model = SwinForImageClassification(config).eval()
    low, dense = low_rank_and_back(
        model, tmp_path, SwinForImageClassification, frozen_dtype=frozen_dtype
    )
    dtypes = {p.dtype for name, p in low.named_parameters() if name.rpartition(".")[2] != "U"}
    assert {p.dtype for p in dense.parameters()} == dtypes - {torch.bfloat16} == {torch.float32}
    x = torch.randn(2, 1, 16, 16)
    expected = model.eval()(x).logits
    torch.testing.assert_close(low(x).logits, expected)
    torch.testing.assert_close(dense.eval()(x).logits, expected, rtol=1e-3, atol=1e-3)


class OwnConfig(PretrainedConfig):
    model_type = "of_ones_own"

    def __init__(self, width=32, **others):
        super().__init__(**others)
        self.width = width


class Own(PreTrainedModel):
    """Registered nowhere, as Own.from_pretrained asks of nobody."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(config.width, config.width)
        self.last = nn.Linear(config.width, 4)
        self.post_init()

    def _init_weights(self, module):
        pass


def test_a_network_of_ones_own_loads(tmp_path):
    low_rank_and_back(Own(OwnConfig()), tmp_path, Own)


def test_settings_of_generation_stay(tmp_path):
    model = network()
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "a")
    save_pretrained(from_pretrained(LlamaForCausalLM, tmp_path / "a"), tmp_path / "b")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "b").generation_config.max_new_tokens == 77


def test_there_is_no_partial_load(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM: model\.norm\.weight"):
        from_pretrained(LlamaForCausalLM, tmp_path)
    save_file({**state, "more": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="more are on one side"):
        from_pretrained(LlamaForCausalLM, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors"):
        from_pretrained(LlamaForCausalLM, tmp_path)


@pytest.mark.slow
def test_stability_is_measured_after_every_epoch(tmp_path):
    callback = StabilityCallback(window=2)
    training = trainer(tmp_path, [callback, OIALRCallback(**OPTIONS)])
    training.train()
    assert len(callback.tracker.history) == 3
    names = [row.name for row in StabilityTracker(training.model).measure()]
    assert [row.name for row in callback.tracker.history[-1]] == names
    logged = [row["stability"] for row in training.state.log_history if "stability" in row]
    assert len(logged) == 1
    assert 0 < logged[0] <= 1.0001


def loop(steps, folder=None, seed=0, schedule=None, **options):
    """Train with accelerate in a loop of one's own; go on from a folder if there is one."""
    accelerator = Accelerator(cpu=True)
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if schedule == "before":
        accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    method = OIALR(model, optimizer, **{**OPTIONS, **options})
    if schedule == "after":
        accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    accelerator.register_for_checkpointing(method)
    if folder:
        accelerator.load_state(folder)
    for step in range(method.step_count, steps):
        row = sequences()[step]
        loss = model(row["input_ids"][None], labels=row["labels"][None]).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    return accelerator, method.model


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, "before", "after"])
@pytest.mark.parametrize("steps", [3, 6, 9])
def test_a_loop_of_accelerate_resumes_in_every_phase(steps, schedule, tmp_path):
    """It loads network, optimizer and method in this order; some layers are dense again at 8."""
    options = {**FACTORS, "schedule": schedule}
    _, whole = loop(STEPS, **options)
    accelerator, model = loop(steps, **options)
    if steps == 9:
        forms = {layer.split(".")[-1] for layer in model.state_dict() if "proj" in layer}
        assert forms == {"weight", "A", "B"}
    accelerator.save_state(tmp_path)
    assert equal(loop(STEPS, tmp_path, seed=9, **options)[1], whole)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 6, 9])
def test_a_loop_of_accelerate_resumes_with_the_same_bits(steps, tmp_path):
    _, whole = loop(STEPS)
    loop(steps)[0].save_state(tmp_path)
    assert equal(loop(STEPS, tmp_path, seed=9)[1], whole)


@pytest.mark.slow
def test_a_loop_of_accelerate_with_two_processes_keeps_one_network(tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ROOT / "tests" / "support" / "workers" / "accelerated.py"
    assert "2 processes, " in launch(0, "-m", *command, worker, tmp_path).stdout


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    command = f"torchrun --nproc-per-node 2 -m examples.{EXAMPLE}"
    (added,), output = described(command)
    assert added == added_lines(EXAMPLE)
    assert len(added) == 2
    check_output(command, output, tmp_path)
