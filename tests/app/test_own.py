"""Networks and data by import path: from outside the packages, and what can go wrong with them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.documentation import blocks
from support.launching import train
from torch import Tensor, nn

from app import config, models
from app.config.settings import Configuration, ModelSection
from app.data import TensorTask, build_task
from app.data.building import _MEMBERS, _OWN_COLUMNS
from app.errors import AgreedUserError, UserError
from app.recording.schema import run_groups
from app.recording.store import read_rows
from app.training.evaluation import evaluate
from app.training.same_data import describe_data
from oialr.placement.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "language_model.yaml"
TINY = (
    "data.arguments={length: 12, characters: 3000}",
    "model.arguments={width: 16, depth: 1, heads: 2}",
    *("training.epochs=2", "training.batch_size=32", "training.warmup_epochs=0"),
    *("oialr.delay=3", "oialr.release=3", "oialr.target_size=0.8", "oialr.update_interval=4"),
)


class Ramp(TensorTask):
    """Numbers whose sign is to be told."""

    figures = ("distance",)

    def __init__(
        self,
        configuration: Configuration,
        *,
        size: int = 11,
        targets: int | None = None,
        left_out: str = "",
        **place: Any,
    ) -> None:
        parts = {}
        for name, start in (("train", 0), ("validation", 100), ("test", 200)):
            inputs = torch.arange(start, start + size, dtype=torch.float64)[:, None]
            if name != left_out:
                parts[name] = (inputs, inputs[:targets, 0] * 2)
        super().__init__(configuration, parts, outputs=1, **place)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"distance": (outputs[:, 0] - targets).abs()}


class OnePart(Ramp):
    splits = ("held out",)


class Named(Ramp):
    """Its figures of merit are called as one likes."""

    def __init__(self, configuration: Configuration, *, names: Any, **place: Any) -> None:
        super().__init__(configuration, **place)
        self.figures = names


class NoTask:
    def __init__(self, configuration: Configuration, **place: Any) -> None:
        self.train_size = 3


class NoLoss(TensorTask):
    """A task that has not said what outputs are worth."""


def no_network(**arguments: Any) -> int:
    return 3


def line(*, input_shape: tuple[int, ...], outputs: int, bias: bool = True) -> nn.Module:
    return nn.Linear(input_shape[0], outputs, bias=bias)


number = 3


def configured(name: str, **settings: Any) -> Configuration:
    data = {"name": f"{__name__}:{name}", **settings.pop("data", {})}
    return config.build({"data": data, "training": {"batch_size": 4}, **settings})


def tasks(processes: int, **data: Any) -> list[Any]:
    place = {"process_count": processes, "device": torch.device("cpu")}
    configuration = configured("Ramp", data=data)
    return [build_task(configuration, process_index=i, **place) for i in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_task_of_tensors_counts_every_sample_once(processes: int) -> None:
    """Sums of losses and measures over the processes are those of the whole, in float64."""
    shares = tasks(processes, arguments={"size": 10}, train_samples=9)
    model = nn.Linear(1, 1).double()
    nn.init.constant_(model.weight, 1.5)
    nn.init.constant_(model.bias, 0.25)
    for epoch in (0, 1):
        seen, losses = [], []
        for batches in zip(*(task.train_batches(epoch) for task in shares), strict=True):
            true = [batch.inputs[: batch.count, 0] for batch in batches]
            assert {batch.global_count for batch in batches} == {sum(map(len, true))}
            values = torch.cat(true)
            seen += values.tolist()
            total = sum(task.loss(model, b).item() for task, b in zip(shares, batches, strict=True))
            assert total == pytest.approx((0.5 * values - 0.25).square().mean().item(), rel=1e-12)
            losses.append(total)
        assert sorted(seen) == list(range(9))
        assert len(losses) == shares[0].steps_per_epoch == 3
    sums = [task.evaluate(model, b) for task in shares for b in task.evaluation_batches("test")]
    whole = torch.arange(200, 210).double() * 0.5 - 0.25
    assert sum(float(s["count"]) for s in sums) == 10
    assert sum(float(s["loss"]) for s in sums) == pytest.approx(whole.square().sum().item())
    assert sum(float(s["distance"]) for s in sums) == pytest.approx(whole.abs().sum().item())
    example = shares[0].example_batch()
    assert example.inputs.dtype == torch.float64
    assert example.inputs.shape == (2, 1)
    assert example.targets.shape == (2,)


def test_a_part_without_a_sample_is_told_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks(1)
    monkeypatch.setattr(task, "evaluation_batches", lambda split: iter(()))
    with pytest.raises(AgreedUserError, match="no sample in their part 'test'"):
        evaluate(line(input_shape=(1,), outputs=1), task, "test", Processes(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "Nothing",
            {},
            r"^data\.name: .*:Nothing cannot be imported \(AttributeErr",
        ),
        ("number", {}, r"^data\.name: .*:number is a int, expected what can be called$"),
        ("NoTask", {}, r"^data\.name: .*:NoTask is no task: it lacks steps_per_epoch, inp"),
        ("NoLoss", {}, r"^data\.name: .*:NoLoss is no task: it lacks losses \(docs/"),
        (
            "Ramp",
            {"arguments": {"sise": 3}},
            r"^data\.arguments: .*:Ramp cannot be built w.*sise",
        ),
        (
            "Ramp",
            {"train_samples": 12},
            r"^data\.train_samples: 12 exceeds the 11 train",
        ),
        (
            "Ramp",
            {"arguments": {"left_out": "test"}},
            r"^data\.name: Ramp has no part 'test': train, validation$",
        ),
        ("Ramp", {"arguments": {"size": 0}}, r"Ramp has 0 inputs and 0 targets in its part 'train"),
        ("Ramp", {"arguments": {"targets": 9}}, r"has 11 inputs and 9 targets in its part 'train'"),
        (
            "OnePart",
            {},
            r"^data\.name: .*:OnePart has no part test, validation among its splits, and a run",
        ),
        (
            "Named",
            {"arguments": {"names": ["f1", "f1/macro"]}},
            r"^data\.name: .*:Named has a figure 'f1/macro': it is to be .* without a slash$",
        ),
        ("Named", {"arguments": {"names": ["a", "b", "a"]}}, r"a figure 'a': it is there twice$"),
        ("Named", {"arguments": {"names": ["split"]}}, r"has a figure 'split': every evaluation"),
        ("Named", {"arguments": {"names": "f1"}}, r"are a text, and are to be a tuple: \('f1',\)$"),
    ],
)
def test_what_is_wrong_with_data_is_told(name: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task(
            configured(name, data=data),
            process_index=0,
            process_count=1,
            device=torch.device("cpu"),
        )


def test_the_protocol_is_what_is_asked_for() -> None:
    from app.data.task import Task

    own = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    assert own == set(_MEMBERS)
    columns = {column.name for column in run_groups(())["eval"]}
    assert columns | {"count"} == _OWN_COLUMNS


def test_other_data_of_ones_own_are_known() -> None:
    (whole,), (again, *_) = tasks(1), tasks(2)
    assert whole.digest == again.digest == describe_data(whole)["samples"] != ""
    (changed,) = tasks(1)
    inputs, targets = changed._parts["test"]
    changed._parts["test"] = inputs, targets.flip(0)
    assert changed.digest != whole.digest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"augmentation": "crop"}, "data.augmentation: is not for data.name=.*:Ramp"),
        ({"name": "digits", "arguments": {"a": 1}}, "data.arguments: is not for data.name=digits"),
        ({"name": "digit"}, "data.name: 'digit' is not one of .*digits.*; did you mean digits"),
        ({"name": "a b:C"}, "data.name: 'a b:C' is not one of .*, nor a package.module:Class"),
        ({"name": "digits", "horizon": 5}, "data.horizon: is not for data.name=digits"),
    ],
)
def test_keys_are_held_against_the_data(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured("Ramp", data=data)


def test_labels_that_are_none_cannot_be_smoothed() -> None:
    with pytest.raises(UserError, match=r"training\.label_smoothing: is not for data.name="):
        configured("Ramp", training={"label_smoothing": 0.1})


def test_a_network_of_ones_own_gets_what_the_data_decide() -> None:
    model = models.build(f"{__name__}:line", {"bias": False}, input_shape=(5,), outputs=3)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 5)
    assert model.bias is None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "nowhere.at_all:f",
            {},
            r"^model\.name: nowhere\.at_all:f cannot be imported \(ModuleNotFo",
        ),
        (
            f"{__name__}:no_network",
            {},
            r"^model\.name: .*:no_network gives a int, expected a tor",
        ),
        (
            f"{__name__}:line",
            {"bies": 1},
            r"^model\.arguments: .*:line cannot be built with .*bie",
        ),
        (
            "lenet5",
            {},
            r"^model\.name: lenet5 is for images, and data\.name gives samples of",
        ),
        (
            "resnet18",
            {"pretrained": True},
            r"^model\.arguments: pretrained is not .* model\.initial$",
        ),
    ],
)
def test_what_is_wrong_with_a_network_is_told(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        models.build(name, arguments, input_shape=(5,), outputs=3)


TABLE = torch.full((5,), 2.0)


class Headed(nn.Module):
    """What networks have in common that look at numbers, which tensors on meta have not."""

    def __init__(self, *, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(input_shape[0], outputs)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(x)
        return outputs


class LooksAtRates(Headed):
    """As Swin Transformers do."""

    def __init__(self, **place: Any) -> None:
        super().__init__(**place)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]


class HasATable(Headed):
    def __init__(self, **place: Any) -> None:
        super().__init__(**place)
        self.register_buffer("table", torch.from_numpy(np.arange(5, dtype=np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table)


class HasAConstant(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * TABLE)


class Decides(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Counts(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(x.nonzero())


@pytest.mark.parametrize("kind", [LooksAtRates, HasATable, HasAConstant, Decides, Counts])
def test_a_network_may_look_at_numbers(kind: type[Headed]) -> None:
    """They were refused, in words of the device meta, and the arguments got the blame."""

    def check(**arguments: Any) -> None:
        section = ModelSection(name=f"{__name__}:{kind.__name__}", arguments=arguments)
        models.check(section, input_shape=(5,), outputs=3)

    before = torch.get_rng_state()
    check()
    for arguments, message in (
        ({"outputs": 4}, r"gives outputs of shape \(2, 4\) for 2 samples, expected \(2, 3\)$"),
        ({"input_shape": [4]}, r"cannot take samples of shape \(5,\): RuntimeError: (mat1|a) and "),
        ({"depth": 4}, "cannot be built with .* unexpected keyword argument 'depth'$"),
    ):
        with pytest.raises(UserError, match=message):
            check(**arguments)
    assert torch.equal(torch.get_rng_state(), before)


def too_large(**place: Any) -> nn.Module:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def test_memory_that_runs_out_is_no_wrong_argument() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        models.build(f"{__name__}:too_large", {}, input_shape=(5,), outputs=3)


def test_the_page_says_what_works() -> None:
    pages = (b for b in blocks() if b.page == "docs/own_networks_and_data.md")
    network, data = (block.text for block in pages if block.language == "python")

    def read(folder: str, name: str) -> tuple[Tensor, Tensor]:
        assert folder == "here"
        return torch.rand(12, 3, 2), torch.arange(12) % 10

    names: dict[str, Any] = {"torch": torch, "math": math, "read": read, "TensorTask": TensorTask}
    exec(network, names)
    exec(data, names)
    place = {"process_index": 0, "process_count": 1, "device": torch.device("cpu")}
    task = names["Recordings"](configured("Ramp"), folder="here", **place)
    model = names["build"](input_shape=task.input_shape, outputs=task.outputs)
    (batch, *_) = task.train_batches(0)
    assert task.loss(model, batch).item() > 0
    assert task.evaluate(model, batch)["count"] == 4
    assert 0 <= float(task.evaluate(model, batch)["accuracy"]) <= 4


@pytest.mark.slow
def test_the_files_of_the_page_train(tmp_path: Path) -> None:
    """Typed as they stand there, with the imports and the reader that are left to the reader."""
    page = [b for b in blocks() if b.page == "docs/own_networks_and_data.md"]
    network, data = (block.text for block in page if block.language == "python")
    (file,) = (block.text for block in page if block.language == "yaml")
    reader = """
def read(folder, name):
    assert folder == "recordings"
    y = torch.arange(200) % 10
    return torch.nn.functional.one_hot(y, 40).float(), y
"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "networks.py").write_text(f"import math\n\nimport torch\n\n{network}")
    imports = "import torch\n\nfrom app.data import TensorTask\n"
    (tmp_path / "mine" / "data.py").write_text(f"{imports}{reader}\n{data}")
    (tmp_path / "mine.yaml").write_text(file)
    training = ["training.epochs=8", "training.warmup_epochs=1", "training.learning_rate=0.03"]
    train(0, "--config", "mine.yaml", *training, "run.dir=run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9
    assert list(read_rows(tmp_path / "run" / "metrics.h5", "lowrank")["event"]) == ["release"]


@pytest.mark.slow
def test_the_example_trains_from_outside_the_packages(tmp_path: Path) -> None:
    """As a user does: a configuration beside the file, and the folder where the program starts."""
    train(0, "--config", EXAMPLE, *TINY, f"run.dir={tmp_path}")
    evaluations = read_rows(tmp_path / "metrics.h5", "eval")
    bits, loss = evaluations["bits_per_character"], evaluations["loss"]
    assert bits == pytest.approx(loss / 0.6931471805599453)
    validation = [x for x, part in zip(loss, evaluations["split"], strict=True) if part != "test"]
    assert validation[-1] < validation[0]
    assert list(read_rows(tmp_path / "metrics.h5", "lowrank")["event"]) == ["release"]


@pytest.mark.slow
def test_a_run_has_one_table_of_figures(tmp_path: Path) -> None:
    """Others after a stop are refused before a step, and not after an epoch."""
    source = """
import torch

from app.data import TensorTask


class Pairs(TensorTask):
    figures = ("accuracy",)

    def __init__(self, configuration, **place):
        y = torch.arange(60) % 4
        part = torch.nn.functional.one_hot(y, 16).float(), y
        parts = dict.fromkeys(("train", "validation", "test"), part)
        super().__init__(configuration, parts, outputs=4, **place)

    def losses(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def measures(self, outputs, targets):
        right = (outputs.argmax(1) == targets).float()
        return dict.fromkeys(self.figures, right)


def build(*, input_shape, outputs):
    return torch.nn.Sequential(torch.nn.Linear(*input_shape, 8), torch.nn.Linear(8, outputs))
"""
    mine = tmp_path / "mine.py"
    mine.write_text(source)
    (tmp_path / "mine.yaml").write_text(
        "data: {name: mine:Pairs}\nmodel: {name: mine:build}\noialr: {enabled: false}\n"
        "training: {epochs: 2, batch_size: 20}\n"
    )
    train(0, "--config", "mine.yaml", "run.dir=run", "run.stop_after=1", cwd=tmp_path, code=75)
    mine.write_text(source.replace('("accuracy",)', '("accuracy", "right")'))
    refused = train(0, "--resume", "run", "run.stop_after=null", cwd=tmp_path, code=2)
    assert "figures of merit are accuracy, right now and were accuracy when the" in refused.stderr
    mine.write_text(source)
    train(0, "--resume", "run", "run.stop_after=null", cwd=tmp_path)
