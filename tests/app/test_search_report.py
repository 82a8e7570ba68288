"""The report of a search."""

import itertools

import numpy as np
import pytest
from support.evaluations import create, evaluation
from support.launching import launch

from app import config, report
from app.errors import UserError
from app.reporting.drawing import style
from app.search.definition import train_again
from app.search.figures import parallel_coordinates
from app.search.importance import importance
from app.search.objective import FAILED
from app.search.space import Parameter, Space

SPACE = """
space:
  oialr.cutoff: {range: [0.01, 0.9], scale: log}
  oialr.delay: [1, 300]
  training.gradient_clip: {choices: [null, 1.5]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "search.yaml").write_text(config.to_yaml(config.load()) + SPACE)
    (tmp_path / "store").mkdir()
    return tmp_path


def ones(count):
    random = np.random.default_rng(0)
    for number in range(count):
        cutoff, error = random.uniform(0.01, 0.9), random.uniform(0.05, 0.5)
        yield evaluation(
            number,
            parameters={
                "oialr.cutoff": cutoff,
                "oialr.delay": 1 + number,
                "training.gradient_clip": None,
            },
            error=error,
            loss=FAILED if number == 1 else error,
            status="failed" if number == 1 else "finished",
            trainable_percent=random.uniform(5, 50),
        )


def test_a_search_can_be_followed(folder, capsys):
    store = create(folder / "store")
    for one in ones(12):
        store.append(one)
    (folder / "summary.json").write_text("{}")
    assert report.main([str(folder), "--follow"]) == 0
    said = capsys.readouterr().out
    assert "a search, finished; evaluations: 11 finished, 1 failed" in " ".join(said.split())
    numbers = [one.number for one in sorted(ones(12), key=lambda one: one.loss)[:10]]
    rows = [line.split()[0] for line in said.splitlines() if line.strip()[:2] == "00"]
    assert rows == [f"{number:05d}" for number in numbers]
    assert "loss over evaluations: of each  least so far" in said


def test_a_search_is_reported(folder):
    store = create(folder / "store")
    for one in ones(14):
        store.append(one)
    result = launch(0, "-m", "app.report", folder, "--formats", "png")
    assert "note:" not in result.stderr
    page = (folder / "report" / "report.html").read_text()
    assert page.count("<img") == 4
    assert "13 finished, 1 failed" in page
    assert f"{folder}/evaluations/NUMBER/config.yaml" in page
    best = min(ones(14), key=lambda one: one.loss)
    assert page.index(f"{best.number:05d}") < page.index("NUMBER")
    names = {path.stem for path in (folder / "report" / "figures").iterdir()}
    assert names == {
        "search-losses",
        "search-pareto",
        "search-parameters",
        "search-importance",
    }


def test_a_page_that_cannot_be_written_is_named(folder):
    store = create(folder / "store")
    for one in ones(2):
        store.append(one)
    (folder / "report" / "report.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--output: cannot write .*report\.html: Is a directory$"):
        report.main([str(folder), "--formats", "svg"])


@pytest.mark.slow
def test_a_search_that_has_just_begun_is_reported_with_what_is_there(folder):
    result = launch(0, "-m", "app.report", folder, code=2)
    assert "no evaluation of this search has finished yet" in result.stderr
    store = create(folder / "store")
    (failed,) = [one for one in ones(2) if one.number == 1]
    store.append(failed)
    result = launch(0, "-m", "app.report", folder, "--formats", "png")
    assert "needs 10 evaluations; 1 have finished" in result.stderr
    assert not (folder / "report" / "figures" / "search-pareto.png").exists()
    result = launch(0, "-m", "app.report", folder, folder, code=2)
    assert "a search is reported alone" in result.stderr


def test_the_axes_of_many_parameters_are_legible():
    """Keys and ranges neither overlap nor leave the figure, and are drawn as they stand."""
    keys = (
        "oialr.cutoff", "oialr.largest_cut", "oialr.minimum_rank_fraction", "oialr.update_interval",
        "training.learning_rate", "training.weight_decay", "training.warmup_epochs",
        "model.arguments.attention_dropout_rate", "data.augmentation.random_erasing_$x$",
    )  # fmt: skip
    parameters = [Parameter(key=key, low=1e-5, high=0.9, log=True) for key in keys]
    names = ("vit_tiny_patch16_224", "deit3_small_patch16_224.fb_in22k_ft_in1k", "resnet18")
    parameters.append(Parameter(key="model.name", choices=names))
    space = Space(parameters)
    some = [
        evaluation(number, parameters={**dict.fromkeys(keys, 0.1 * number), "model.name": name})
        for number, name in enumerate(names, start=1)
    ]
    with style():
        figure = parallel_coordinates(some, space).figure
        figure.draw_without_rendering()
    [axes] = figure.axes
    texts = [*axes.get_yticklabels(), *axes.texts]
    assert len(texts) == 10 + 9 * 2 + 3
    boxes = [text.get_window_extent() for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert "0.9" in [text.get_text() for text in axes.texts]


def test_importance_finds_what_matters():
    positions = np.random.default_rng(1).random((60, 3))
    losses = (positions[:, 1] - 0.3) ** 2
    found = importance(positions, losses.tolist())
    assert found.mean.argmax() == 1
    assert found.mean[1] > 0.5
    assert abs(found.mean[[0, 2]]).max() < 0.1
    assert found.score > 0.5
    again = importance(positions, (1e6 * losses).tolist())  # ranks alone count
    np.testing.assert_array_equal(again.mean, found.mean)
    assert importance(positions[:9], losses[:9].tolist()) is None


def test_the_command_starts_as_many_processes_as_the_evaluation_had(tmp_path):
    place = f"--config {tmp_path}/evaluations/00007/config.yaml"
    assert train_again(tmp_path, 2, 7).startswith(f"mpirun -n 2 python -m app.train {place}")
    assert train_again(tmp_path, 1, 7).startswith(f"python -m app.train {place}")
