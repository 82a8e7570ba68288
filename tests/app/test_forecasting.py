"""The ETT series: split, standardization, calendar, windows, errors, and who counts what."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.series import write_ett
from torch import Tensor, nn

from app import config
from app.config.settings import Configuration
from app.data import Task, build_task, download
from app.data.sets import ett
from app.errors import UserError
from app.training.evaluation import evaluate
from app.training.same_data import describe_data
from oialr.placement.processes import Processes

CPU = torch.device("cpu")
HOURS = 20 * 30 * 24
"""Steps of an hourly series that are used."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ett")


@pytest.fixture(scope="module")
def values(root: Path) -> np.ndarray:
    return write_ett(root, "ETTh1", HOURS + 100)


@pytest.fixture
def configured(root: Path, values: np.ndarray) -> Callable[..., Configuration]:
    def build(data: dict[str, Any] | None = None, **training: Any) -> Configuration:
        sizes = {"input_length": 24, "horizon": 12, **(data or {})}
        return config.build(
            {
                "data": {"name": "etth1", "root": str(root), **sizes},
                "training": {"batch_size": 32, **training},
            }
        )

    return build


@pytest.fixture
def task(configured: Callable[..., Configuration]) -> Callable[..., Task]:
    def build(index: int = 0, count: int = 1, **options: Any) -> Task:
        configuration = configured(**options)
        return build_task(configuration, process_index=index, process_count=count, device=CPU)

    return build


def values_of(series: ett.Series) -> np.ndarray:
    """Return what a series is standardized to by its training part."""
    return ett.standardized(series.stored, series.mean, series.deviation)


def test_constant_variable_is_not_divided_by_its_deviation(
    values: np.ndarray, tmp_path: Path
) -> None:
    """0.1 has no exact mean: the deviation that numpy finds is 1e-17 and not 0."""
    write_ett(tmp_path, "ETTh1", HOURS)
    path = tmp_path / "ETT-small" / "ETTh1.csv"
    header, *rows = path.read_text().splitlines()
    changed = [",".join([*row.split(",")[:-2], "0.1", "1.5"]) for row in rows]
    path.write_text("\n".join([header, *changed]) + "\n")
    series = ett.load(config.build({"data": {"name": "etth1", "root": str(tmp_path)}}).data)
    assert np.abs(values_of(series)[:, -2:]).max() < 1e-12
    assert values_of(series)[:, 0].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("minutes", "month"), [(60, 720), (15, 2880)])
def test_published_split(minutes: int, month: int) -> None:
    assert ett.split(minutes, 96) == {
        "train": slice(0, 12 * month),
        "validation": slice(12 * month - 96, 16 * month),
        "test": slice(16 * month - 96, 20 * month),
    }


@pytest.mark.parametrize(
    ("name", "horizon", "sizes"),
    [
        ("ettm2", 96, (34369, 11425, 11425)),
        ("ettm2", 720, (33745, 10801, 10801)),
        ("etth1", 96, (8449, 2785, 2785)),
        ("etth1", 720, (7825, 2161, 2161)),
    ],
)
def test_published_numbers_of_samples(name: str, horizon: int, sizes: tuple[int, int, int]) -> None:
    parts = ett.split(ett.STEP_MINUTES[name], 96)
    windows = [part.stop - part.start - 96 - horizon + 1 for part in parts.values()]
    assert tuple(windows) == sizes


def test_values_are_standardized_by_the_training_part(
    configured: Callable[..., Configuration], values: np.ndarray
) -> None:
    series = ett.load(configured().data)
    train = values[: 12 * 720]
    expected = (values[:HOURS] - train.mean(axis=0)) / train.std(axis=0)
    assert values_of(series).dtype == np.float32
    np.testing.assert_allclose(values_of(series), expected, atol=1e-6)


def test_calendar() -> None:
    times = np.array(["2016-07-01T00:00:00", "2016-12-31T23:45:00", "2018-01-07T12:30:00"])
    features = ett.calendar_features(times.astype("datetime64[s]"), 15)
    minutes, hours, days = [0, 45, 30], [0, 23, 12], [4, 5, 6]  # Friday, Saturday, Sunday
    months, years = [0, 30, 6], [182, 365, 6]  # 2016 has 366 days
    expected = [minutes, hours, days, months, years] / np.array([[59], [23], [6], [30], [365]])
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected.T - 0.5, atol=1e-7)
    hourly = ett.calendar_features(times.astype("datetime64[s]"), 60)
    np.testing.assert_array_equal(hourly, features[:, 1:])


def test_windows(task: Callable[..., Task], configured: Callable[..., Configuration]) -> None:
    series = ett.load(configured().data)
    values = values_of(series)
    batches = list(task().evaluation_batches("test"))
    inputs = torch.cat([batch.inputs for batch in batches]).numpy()
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    first = 16 * 720  # the first step that is forecast; the last is HOURS - 1
    assert len(inputs) == len(targets) == 4 * 720 - 12 + 1
    assert len(batches[-1].inputs) == len(inputs) % 32 > 0
    for number in (0, 1, len(inputs) - 1):
        past = slice(first + number - 24, first + number)
        future = slice(first + number, first + number + 12)
        np.testing.assert_array_equal(inputs[number, :24, :7], values[past])
        np.testing.assert_array_equal(inputs[number, 24:, :7], 0)
        whole = slice(past.start, future.stop)
        np.testing.assert_array_equal(inputs[number, :, 7:], series.calendar[whole])
        np.testing.assert_array_equal(targets[number], values[future])
    assert future.stop == HOURS


@pytest.mark.parametrize("count", [2, 3])
def test_process_count_changes_no_batch(task: Callable[..., Task], count: int) -> None:
    data = {"train_samples": 65}
    whole = list(task(data=data).train_batches(epoch=1))
    assert [batch.global_count for batch in whole] == [32, 32, 1]
    tasks = [task(index, count, data=data) for index in range(count)]
    shares = list(zip(*(t.train_batches(epoch=1) for t in tasks), strict=True))
    for batch, parts in zip(whole, shares, strict=True):
        for field in ("inputs", "targets"):
            joined = torch.cat([getattr(part, field)[: part.count] for part in parts])
            assert torch.equal(joined, getattr(batch, field))
    resumed = list(task(data=data).train_batches(epoch=1, first_batch=2))
    assert len(resumed) == 1
    assert torch.equal(resumed[0].inputs, whole[2].inputs)


def test_an_epoch_shows_every_sample_once(task: Callable[..., Task]) -> None:
    small = task(data={"train_samples": 65})
    orders = []
    for epoch in range(2):
        shown = torch.cat([batch.inputs for batch in small.train_batches(epoch)])
        orders.append(shown[:, 0, 0].tolist())
    expected = small._table[:65, 0].tolist()
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(expected)
    assert orders[0] != orders[1] != expected


class LastValue(nn.Module):
    """Forecasts what was seen last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.scale * inputs[:, 23:24, :7]).expand(-1, 12, -1)


@pytest.mark.parametrize("count", [1, 3])
def test_every_sample_counts_once_in_the_errors(
    task: Callable[..., Task], configured: Callable[..., Configuration], count: int
) -> None:
    values = values_of(ett.load(configured().data)).astype(np.float64)
    starts = np.arange(16 * 720, HOURS - 12 + 1)
    errors = np.stack([values[start - 1] - values[start : start + 12] for start in starts])
    totals: dict[str, float] = {}
    for index in range(count):
        part = task(index, count)
        for batch in part.evaluation_batches("test"):
            for key, value in part.evaluate(LastValue(), batch).items():
                totals[key] = totals.get(key, 0) + float(value)
    assert totals["count"] == len(starts)
    assert totals["mse"] / len(starts) == pytest.approx((errors**2).mean(), rel=1e-6)
    assert totals["mae"] / len(starts) == pytest.approx(abs(errors).mean(), rel=1e-6)
    assert totals["loss"] == totals["mse"]
    if count == 1:
        figures = evaluate(LastValue(), task(), "test", Processes(), CPU)
        assert list(figures) == ["loss", "mse", "mae"]
        assert figures["mae"] == pytest.approx(abs(errors).mean(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_sum_of_losses_is_the_mean_over_the_global_batch(
    task: Callable[..., Task], count: int
) -> None:
    data = {"train_samples": 34}  # the last global batch has 2 samples
    model, reference = LastValue(), LastValue()
    tasks = [task(index, count, data=data) for index in range(count)]
    whole = list(task(data=data).train_batches(0))
    shares = zip(*(t.train_batches(0) for t in tasks), strict=True)
    for batch, parts in zip(whole, shares, strict=True):
        expected = nn.functional.mse_loss(reference(batch.inputs), batch.targets)
        expected.backward()
        losses = [t.loss(model, part) for t, part in zip(tasks, parts, strict=True)]
        sum(losses).backward()
        assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-6)
        assert model.scale.grad.item() == pytest.approx(reference.scale.grad.item(), rel=1e-5)


def test_example_batch_is_like_a_real_one(task: Callable[..., Task]) -> None:
    example, real = task().example_batch(), next(task().train_batches(0))
    assert example.inputs.shape[1:] == real.inputs.shape[1:] == task().input_shape == (36, 11)
    assert example.targets.shape[1:] == real.targets.shape[1:] == task().outputs == (12, 7)
    assert example.inputs.dtype == real.inputs.dtype
    assert task().figures == ("mse", "mae")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"horizon": 2881, "input_length": 96}, "data.horizon: 96 known steps (data.input_length)"),
        ({"input_length": 9000}, "data.horizon: 9000 known steps"),
        ({"train_samples": 10**6}, "data.train_samples: 1000000 exceeds the 8605 training samples"),
        ({"name": "ettm1"}, "ETTm1.csv (No such file or directory); put the file there"),
    ],
)
def test_wrong_configuration(task: Callable[..., Task], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        task(data=data)
    assert "\n" not in str(caught.value)


def changed(lines: list[str], line: str) -> list[str]:
    """Put another line in the place of the tenth."""
    return [*lines[:9], line, *lines[10:]]


def cell(line: str, text: str) -> str:
    """Put another text in the place of the second variable."""
    fields = line.split(",")
    return ",".join([*fields[:2], text, *fields[3:]])


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("values")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:1000], "holds 999 steps, expected 14400 or more"),
        (
            lambda lines: lines[:50] + lines[60:],
            "line 51: 2016-07-03 11:00:00 follows 2016-07-03 00:00:00 of line 50, expected a row "
            "every 60 minutes",
        ),
        (lambda lines: ["a,b", *lines[1:]], "has the columns 'a,b', expected date,HUFL"),
        (
            lambda lines: [line.rpartition(",")[0] for line in lines],
            "has the columns 'date,HUFL,HULL,MUFL,MULL,LUFL,LULL', expected date,HUFL",
        ),
        (lambda lines: changed(lines, lines[9].replace(",", ",x")), "line 10: HUFL is 'x"),
        (lambda lines: changed(lines, "x" + lines[9]), "line 10: 'x2016-07-01 08:00:00' is no da"),
        (lambda lines: changed(lines, cell(lines[9], "1_0")), "line 10: HULL is '1_0', which is"),
        # A number with a comma shifts all that follow it.
        (lambda lines: changed(lines, cell(lines[9], '"1,234.5"')), "line 10: it has 9 fields and"),
        (lambda lines: changed(lines, lines[9].rpartition(",")[0]), "line 10: it has 7 fields and"),
        (lambda lines: changed(lines, cell(lines[9], "nan")), "line 10: HULL is 'nan', expected"),
        (lambda lines: changed(lines, cell(lines[9], "")), "line 10: HULL is '', which is no num"),
        (lambda lines: changed(lines, cell(lines[9], "-1e39")), "line 10: HULL is '-1e39', expec"),
        (lambda lines: changed(lines, cell(lines[9], "1e9")), "line 10: HULL is 1e+09, more than"),
        (
            lambda lines: [*lines[:10], *lines[9:]],
            "line 11: 2016-07-01 08:00:00 follows 2016-07-01 08:00:00 of line 10",
        ),
        (lambda lines: lines[:1], "holds 0 steps, expected 14400 or more"),
        (lambda lines: [*lines[:9], "\udcff"], "is damaged: it is no text"),
    ],
)
def test_damaged_file(
    root: Path,
    tmp_path: Path,
    configured: Callable[..., Configuration],
    change: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    lines = (root / "ETT-small" / "ETTh1.csv").read_text().splitlines()
    path = tmp_path / "ETT-small" / "ETTh1.csv"
    path.parent.mkdir()
    path.write_text("\n".join(change(lines)) + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ett.load(configured({"root": str(tmp_path)}).data)
    assert str(caught.value).startswith(f"data.root: {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_blank_lines_and_what_spreadsheets_write_change_nothing(
    root: Path, tmp_path: Path, configured: Callable[..., Configuration], values: np.ndarray
) -> None:
    """A mark of the encoding at the start, line ends of two characters; and no warning of numpy."""
    lines = (root / "ETT-small" / "ETTh1.csv").read_text().splitlines()
    path = tmp_path / "ETT-small" / "ETTh1.csv"
    path.parent.mkdir()
    content = "\ufeff" + "\r\n".join([*lines[:3], "", "  ", *lines[3:], "", ""])
    path.write_bytes(content.encode())
    plain, other = (ett.load(configured({"root": str(r)}).data) for r in (root, tmp_path))
    np.testing.assert_array_equal(other.stored, plain.stored)
    np.testing.assert_array_equal(other.calendar, plain.calendar)


def test_there_is_nothing_to_download(configured: Callable[..., Configuration]) -> None:
    with pytest.raises(UserError, match=r"^data\.download: etth1 .* put ETTh1\.csv into "):
        download(configured({"download": True}))


def test_other_data_are_known_and_a_network_keeps_its_standardization(
    root: Path, tmp_path: Path, task: Callable[..., Task]
) -> None:
    """A series of other numbers is told from this one, and brought into this one's units."""
    write_ett(tmp_path, "ETTh1", HOURS)
    path = tmp_path / "ETT-small" / "ETTh1.csv"
    trained, copied = task(), task(data={"root": str(tmp_path)})
    assert copied.digest == trained.digest == describe_data(trained)["samples"] != ""
    assert task(data={"train_samples": 65}).digest != trained.digest

    header, *rows = path.read_text().splitlines()
    fields = [row.split(",") for row in rows]
    doubled = [",".join([date, *(str(2 * float(x)) for x in cells)]) for date, *cells in fields]
    path.write_text("\n".join([header, *doubled]) + "\n")
    other = task(data={"root": str(tmp_path)})
    assert other.digest != trained.digest
    batches = [next(t.evaluation_batches("test")).inputs[:, :24, :7] for t in (trained, other)]
    torch.testing.assert_close(*batches, atol=1e-5, rtol=1e-5)  # each in its own units

    other.restore_preprocessing({})  # of a checkpoint that does not know them
    assert other.preprocessing != trained.preprocessing
    other.restore_preprocessing(json.loads(json.dumps(trained.preprocessing)))
    assert other.preprocessing == trained.preprocessing
    mean, deviation = (torch.tensor(trained.preprocessing[key]) for key in ("mean", "std"))
    expected = 2 * (batches[0].double() * deviation + mean)
    seen = next(other.evaluation_batches("test")).inputs[:, :24, :7].double() * deviation + mean
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-5)
