"""The search as a user starts it: workers of several processes, faults, resume, mistakes."""

import json
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from support.evaluations import evaluation
from support.launching import ROOT, launch, train

from app.config import to_yaml
from app.config.search_section import SearchSection
from app.config.settings import Configuration
from app.errors import UserError
from app.recording.store import read_rows
from app.search.__main__ import _read_definition
from app.search.conclusion import trains_alike
from app.search.definition import load
from app.search.evaluation import Hopeless, _Watch, evaluate
from app.search.objective import FAILED, HOPELESS
from app.search.session import _Session
from app.search.store import Store, read_evaluations

FLAT = ROOT / "tests" / "support" / "workers" / "flat_search.py"
DISTURBED = ROOT / "tests" / "support" / "workers" / "search_disturbed.py"
TINY = f"""
extends: {ROOT}/configs/paper/digits_vit.yaml
training: {{epochs: 3, warmup_epochs: 1}}
data: {{train_samples: 300}}
model:
  arguments: {{patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}}
stability: {{enabled: false}}
oialr: {{delay: 6, update_interval: 2}}
search: {{evaluations: 5, processes_per_worker: 2, trainable_price: 0.1, train_best: false}}
space:
  training.learning_rate: {{range: [1.0e-3, 1.0e-2], scale: log}}
  oialr.delay: [3, 10]
  training.gradient_clip: {{choices: [null, 1.0]}}
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def search(processes, *arguments, **options):
    return launch(processes, "-m", "app.search", *arguments, **options)


def disturbed(processes, plan, *arguments, **options):
    return launch(processes, DISTURBED, json.dumps(plan), *arguments, **options)


def stored(folder):
    return read_evaluations(folder / "store")


@pytest.mark.slow
def test_a_search_from_its_start_to_the_winner(tmp_path, tiny):
    folder = tmp_path / "run"
    result = search(4, "--config", tiny, f"run.dir={folder}", "search.train_best=true")
    ones = stored(folder)
    assert [one.number for one in ones] == list(range(5))
    assert {one.worker for one in ones} == {0, 1}
    assert [one.seed for one in ones] == list(range(5))
    for one in ones:
        assert one.status == "finished"
        assert one.epochs == len(one.curve) == 3
        assert one.loss == pytest.approx(one.error + 0.1 * one.trainable_percent / 100)
        assert one.loss == one.curve[-1]
        place = folder / one.folder
        assert not (place / "checkpoints").exists()
        steps = read_rows(place / "metrics.h5", "train")["step_seconds"]
        assert one.step_seconds == pytest.approx(steps.mean(), rel=1e-12)
        rows = read_rows(place / "metrics.h5", "eval")
        assert set(rows["split"]) == {"validation"}
        assert one.error == 1 - rows["accuracy"][-1]
        configuration = yaml.safe_load((place / "config.yaml").read_text())
        assert configuration["oialr"]["delay"] == one.parameters["oialr.delay"]
        assert (
            configuration["training"]["gradient_clip"] == one.parameters["training.gradient_clip"]
        )

    best = min(ones, key=lambda one: one.loss)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_number"] == best.number
    assert summary["evaluations"] == 5
    assert 0 < summary["test_accuracy"] < 1
    assert "\nevaluations: 5\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"draw it: python -m app.report {folder}"
    assert result.stdout.count(" per hour ") == 5
    assert "5/5" in result.stdout

    # The winner was trained again as it had been evaluated, this time with its test part.
    rows = read_rows(folder / "best" / "metrics.h5", "eval")
    assert rows["accuracy"][rows["split"] == "validation"][-1] == pytest.approx(1 - best.error)
    assert list(rows["split"]).count("test") == 1
    # And best.yaml gives the same network to anyone.
    again = tmp_path / "again"
    train(2, "--config", folder / "best.yaml", f"run.dir={again}")
    weights = [
        torch.load(sorted((place / "checkpoints").iterdir())[-1] / "state.pt")["model"]
        for place in (again, folder / "best")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    # A search that goes on with nothing left to do keeps the run, however its folder is spelled.
    written = (folder / "best" / "metrics.h5").stat().st_mtime_ns
    search(4, "--resume", tmp_path / ".." / tmp_path.name / "run", "search.median_stop_epoch=3")
    assert (folder / "best" / "metrics.h5").stat().st_mtime_ns == written
    again = json.loads((folder / "summary.json").read_text())
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["overhead_percent"] == 0


@pytest.mark.slow
def test_a_search_makes_its_own_folder(tmp_path, tiny):
    """Without run.dir, as it is typed first."""
    early = "training.early_stopping=1"  # whose best weights nobody tests in an evaluation
    search(2, "--config", tiny, "search.evaluations=1", early, cwd=tmp_path)
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert folder.name.startswith("tiny-")
    (one,) = stored(folder)
    assert one.status == "finished"
    assert not list(folder.rglob("state.pt"))
    # Hours are those of all sessions, and these were over before the second one.
    hours = one.seconds / 3600 / 2
    search(2, "--resume", folder, "search.evaluations=null", f"search.hours={hours}", cwd=tmp_path)
    assert stored(folder) == [one]


@pytest.mark.slow
def test_faults_are_results_and_the_search_goes_on(tmp_path, tiny):
    folder = tmp_path / "run"
    plan = {"0": "raise", "1": "memory", "2": "diverge", "4": "slow", "5": "hopeless"}
    arguments = ["search.evaluations=7", "search.evaluation_timeout=1000"]
    result = disturbed(4, plan, "--config", tiny, f"run.dir={folder}", *arguments)
    ones = stored(folder)
    assert [one.status for one in ones] == [
        "failed",
        "out of memory",
        "diverged",
        "finished",
        "timeout",
        "hopeless",
        "finished",
    ]
    assert len(ones[5].curve) == 2
    assert ones[5].loss == HOPELESS + ones[5].curve[-1]
    messages = {0: "a bad day", 1: "no room", 2: "DivergedError", 4: "stopped"}
    for number, message in messages.items():
        assert ones[number].loss == FAILED
        assert message in ones[number].traceback
    assert "ValueError: a bad day" in result.stdout
    assert re.search(r"number 5, .* s: error 0\.\d+ .*\(stopped: hopeless\)", result.stdout)
    assert "worker 0" in result.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["failed"] == 4
    assert summary["best_number"] in (3, 6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_leaves_an_individual_and_nothing_else(tmp_path, tiny, processes):
    arguments = [f"search.processes_per_worker={processes}", "search.evaluations=14"]
    arguments += ["training.epochs=1", "training.warmup_epochs=0", "training.batch_size=25"]
    arguments += [f"run.dir={tmp_path / 'run'}"]
    result = launch(processes, FLAT, 4, 13, "--config", tiny, *arguments)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert lines == processes * [{"more": {}}]
    assert stored(tmp_path / "run")[5].status == "hopeless"


@pytest.mark.slow
def test_a_killed_search_is_resumed_by_other_workers(tmp_path, tiny):
    folder = tmp_path / "run"
    disturbed(4, {"3": "kill"}, "--config", tiny, f"run.dir={folder}", code=9)
    before = stored(folder)
    assert 2 <= len(before) <= 4
    assert 3 not in [one.number for one in before]
    arguments = ["search.processes_per_worker=1", "search.evaluations=8"]
    result = search(3, "--resume", folder, *arguments)
    assert result.stdout.count(" per hour ") == 8 - len(before)  # nothing is done twice
    after = stored(folder)
    assert [one.number for one in after] == list(range(8))
    assert [one for one in after if one.processes == 2] == before
    assert all(one.status == "finished" for one in after)


def test_what_earlier_sessions_found_is_known_to_the_next(tiny):
    session = object.__new__(_Session)
    session._definition = load(tiny)
    values = {
        "training.learning_rate": 2e-3,
        "oialr.delay": 7,
        "training.gradient_clip": 1.0,
    }
    session._earlier = [evaluation(3, parameters=values, loss=0.25, worker=2, island=1)]
    (known,) = session._known()
    assert session._definition.space.decode(known.position) == pytest.approx(values)
    assert (known.loss, known.worker, known.island) == (0.25, 2, 1)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_workers(tmp_path, tiny):
    folder = tmp_path / "run"
    arguments = ["--config", tiny, f"run.dir={folder}", "search.evaluations=30"]
    result = disturbed(4, {"2": "signal"}, *arguments, code=75)
    assert result.stderr.count(f"stopped by a signal: go on with --resume {folder}\n") == 1
    assert result.stderr.splitlines()[-1] == f"draw it: python -m app.report {folder}"
    before = [one.number for one in stored(folder)]
    assert 2 not in before
    assert len(before) < 15  # the other worker has not gone on to the end
    total = len(before) + 3
    search(2, "--resume", folder, f"search.evaluations={total}")
    assert [one.number for one in stored(folder)] == list(range(total))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "each", "message"),
    [
        ("taken", 1, "was taken over by another program"),
        ("gone", 2, "was removed, moved or replaced"),
    ],
)
def test_a_folder_that_is_not_the_searchs_any_more_is_one_line(tmp_path, tiny, what, each, message):
    """It was a traceback, or a search that went on over another's best.yaml."""
    folder = tmp_path / "run"
    arguments = [f"run.dir={folder}", f"search.processes_per_worker={each}"]
    result = disturbed(2, {"2": what}, "--config", tiny, *arguments, code=1)
    # Every worker that meets it before all are ended says so.
    (line,) = {line for line in result.stderr.splitlines() if line.startswith("error")}
    assert message in line
    assert "Traceback" not in result.stderr
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_damaged_store_is_set_aside_and_what_is_lost_is_done_again(tmp_path, tiny):
    folder = tmp_path / "run"
    one = "search.processes_per_worker=1"
    search(1, "--config", tiny, f"run.dir={folder}", "search.evaluations=2", one)
    (path,) = (folder / "store").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    result = search(1, "--resume", folder, "search.evaluations=3", one)
    assert f"WARNING: {path}: not a readable HDF5 file (truncated)" in result.stderr
    assert "0 evaluations of it are left: what is lost is done again" in result.stderr
    assert [one.number for one in stored(folder)] == [0, 1, 2]
    assert len(path.with_name(f"{path.stem}-damaged.h5").read_bytes()) == 100


@pytest.mark.slow
def test_a_search_without_a_result_says_so(tmp_path, tiny):
    folder = tmp_path / "run"
    plan = {"0": "diverge", "1": "diverge"}
    result = disturbed(0, plan, "--config", tiny, f"run.dir={folder}", *ALONE, code=1)
    assert "no evaluation in" in result.stderr
    assert "Traceback" not in result.stderr
    assert [one.status for one in stored(folder)] == ["diverged", "diverged"]


@pytest.mark.slow
def test_what_the_best_cannot_be_trained_with_ends_all_workers(tmp_path, tiny):
    """The others waited for ever."""
    arguments = [f"run.dir={tmp_path / 'run'}", "search.train_best=true", *ALONE]
    result = disturbed(2, {"best": "refuse"}, "--config", tiny, *arguments, code=2)
    told = f"the best of {tmp_path / 'run'} cannot be trained: data.root: an image is damaged"
    assert [line for line in result.stderr.splitlines() if "error" in line] == [f"error: {told}"]


def test_a_candidate_that_is_no_configuration_is_a_failed_evaluation(tmp_path, tiny):
    """Three keys contradict each other, where no two ends of the space do."""
    definition = yaml.safe_load(tiny.read_text())
    definition["oialr"] = {"delay": "stability", "update_interval": 2, "latest_delay": 12}
    definition["oialr"] |= {"stability_window": 2}
    ends = {"stability_start": [0, 4], "stability_window": [2, 6], "latest_delay": [7, 12]}
    definition["space"] = {f"oialr.{name}": range_ for name, range_ in ends.items()}
    tiny.write_text(yaml.safe_dump(definition))
    values = {"stability_start": 4, "stability_window": 6, "latest_delay": 7}
    values = {f"oialr.{name}": value for name, value in values.items()}
    one = evaluate(
        load(tiny),
        number=3,
        values=values,
        island=0,
        folder=tmp_path,
        workers=SimpleNamespace(own=SimpleNamespace(Get_size=lambda: 2), index=1),
        medians=[],
        stop_signal=None,
        stopped_elsewhere=lambda: False,
    )
    assert (one.status, one.loss, one.parameters) == ("failed", FAILED, values)
    assert (one.number, one.worker, one.processes) == (3, 1, 2)
    assert "oialr.latest_delay: must be at least 10" in one.traceback
    types = load(tiny).space.column_types()
    store = Store.create(tmp_path, session=0, worker=0, parameters=types)
    store.append(one)
    (read,) = read_evaluations(tmp_path)
    assert (read.status, read.traceback) == (one.status, one.traceback)


def test_how_it_is_searched_makes_no_difference_to_the_run_of_the_best(tmp_path, tiny):
    """A resumed search of the same winner trained it again, and lost the run that had finished."""
    values = {"training.learning_rate": 2e-3, "oialr.delay": 7, "training.gradient_clip": 1.0}

    def best(place, *overrides):
        configuration = load(tiny, overrides).best(3, values)
        run = configuration.run.model_copy(update={"dir": str(place)})
        return configuration.model_copy(update={"run": run})

    assert not trains_alike(best(tmp_path), tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(best(tmp_path)))
    assert trains_alike(best(tmp_path, "search.evaluations=80"), tmp_path)
    assert trains_alike(best(tmp_path / ".." / tmp_path.name), tmp_path)
    assert not trains_alike(best(tmp_path, "training.weight_decay=0.5"), tmp_path)
    assert not trains_alike(best(tmp_path, "run.seed=1"), tmp_path)
    (tmp_path / "config.yaml").write_text("run: [")
    assert not trains_alike(best(tmp_path), tmp_path)


ALONE = ["search.processes_per_worker=1", "search.evaluations=2"]


MISTAKES = [
    ([], "error: --config: name a search"),
    (["--config", "gone.yaml"], "error: --config: cannot read gone.yaml"),
    (["--config", "TINY", "search.evaluation=3"], "error: search.evaluation: unknown key"),
    (
        ["--config", "TINY", "--resume", "x"],
        "error: --config: a search that is resumed has its own",
    ),
    (["--resume", "gone"], "error: --resume: gone holds no search"),
    (["--config", "TINY", "data.name=mnist", "data.root=gone", *ALONE], "error: "),
    (
        ["--config", "TINY", "training.epochs=2", *ALONE],
        "error: space: oialr.delay: 10 is not less",
    ),
    (["--config", "TINY", "search.islands=2", *ALONE], "error: search.islands: 2 islands need 2"),
    (["--config", "TINY", "run.stop_after=3", *ALONE], "error: run.stop_after: would stop every"),
    (["--config", "TINY"], "error: search.processes_per_worker: 2 does not divide the 1"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: str(v)[-40:])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, tiny, arguments, message):
    arguments = [tiny if argument == "TINY" else argument for argument in arguments]
    place = [] if "--resume" in arguments else [f"run.dir={tmp_path / 'run'}"]
    result = search(0, *arguments, *place, code=2)
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()  # made when everything fits together


@pytest.mark.slow
def test_a_mistake_is_reported_by_one_process(tmp_path, tiny):
    result = search(3, "--config", tiny, f"run.dir={tmp_path / 'run'}", code=2)
    assert result.stderr.count("error: search.processes_per_worker: 2 does not divide the 3") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_folder_that_holds_a_search_is_kept(tmp_path, tiny):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("search.yaml", "metrics.h5"):  # a search, or a run
        (folder / name).write_text(TINY)
        result = search(0, "--config", tiny, f"run.dir={folder}", *ALONE, code=2)
        assert f"--resume {folder}" in result.stderr
        assert [path.name for path in folder.iterdir()] == [name]
        (folder / name).unlink()
    (folder / "search.yaml").write_text(TINY)
    result = search(0, "--resume", folder, "training.epochs=4", code=2)
    assert "training.epochs: only search.* can change" in result.stderr


def definition_of(folder, *overrides):
    """As the command line resolves it: of a file, or of a folder that is resumed."""
    place = {"config": None, "resume": folder} if folder.is_dir() else {"config": folder}
    return _read_definition(Namespace(**{"resume": None, **place}, overrides=overrides))


@pytest.mark.parametrize("key", ["trainable_bound=30", "trainable_price=0.2", "step_price=1"])
def test_losses_mean_the_same_in_all_sessions(tmp_path, tiny, key):
    """Those of another objective would compete with the ones in the store."""
    (tmp_path / "search.yaml").write_text(load(tiny, ["search.step_price=2"]).to_yaml())
    name = key.partition("=")[0]
    with pytest.raises(UserError, match=f"^search.{name}: .* begin a new search$") as refused:
        definition_of(tmp_path, "search.evaluations=9", f"search.{key}")
    assert "\n" not in str(refused.value)
    same = ["search.trainable_bound=null", "search.trainable_price=0.1", "search.step_price=2.0"]
    assert definition_of(tmp_path, "search.evaluations=9", *same).base.search.evaluations == 9
    with pytest.raises(UserError, match=r"^search\.generations: .* set search\.evaluations$"):
        definition_of(tmp_path, "search.generations=9")
    assert definition_of(tmp_path, "search.generations=null")


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from app.search.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'h5py', 'mpi4py', 'propulate'} & set(sys.modules)"
    )
    assert "mpirun -n 8 python -m app.search" in launch(0, "-c", program).stdout


class Asked:
    number = 0


def watch(**section):
    return _Watch(
        Configuration(search=SearchSection(**section)),
        medians=[0.5, 0.4, 0.3],
        stop_signal=Asked(),
        stopped_elsewhere=lambda: False,
    )


def follow(errors, *, tested=None, percents=None, epochs=None, **section):
    """Watch a training whose epochs have these errors."""
    one = watch(**section)
    for epoch, error in enumerate(errors, 1):
        one(
            epoch,
            {"accuracy": 1 - error},
            percents[epoch - 1] if percents else 50.0,
            tested_epoch=tested[epoch - 1] if tested else epoch,
            last=epoch == epochs,
        )
    return one


def test_what_is_worse_than_the_median_is_hopeless_from_the_epoch_given():
    assert follow([0.9, 0.9, 0.9]).curve == pytest.approx([0.9] * 3)  # not asked for
    assert len(follow([0.9, 0.4, 0.2, 0.9], median_stop_epoch=2).curve) == 4
    with pytest.raises(Hopeless, match=r"after epoch 2: median 0\.4"):
        follow([0.1, 0.41], median_stop_epoch=2)
    with pytest.raises(Hopeless, match="after epoch 3"):  # the price counts
        follow([0.1, 0.1, 0.29], median_stop_epoch=2, trainable_price=0.1)


def test_no_training_is_given_up_at_its_own_last_epoch():
    """Its result was lost, and no time was saved."""
    assert follow([0.9, 0.41], epochs=2, median_stop_epoch=2).error == pytest.approx(0.41)


def test_what_counts_is_the_epoch_whose_weights_would_be_tested():
    """With early stopping it was the last one, which is the worse by patience."""
    errors, percents = [0.6, 0.2, 0.5, 0.55], [100.0, 30.0, 40.0, 50.0]
    one = follow(errors, tested=[1, 2, 2, 2], percents=percents, trainable_price=0.1)
    assert (one.error, one.trainable_percent) == (pytest.approx(0.2), 30.0)
    assert one.curve == pytest.approx([0.7, 0.23, 0.23, 0.23])
    # Where layers change their form, none of the epochs before it counts any more.
    one = follow(errors, tested=[1, 2, 3, 3], percents=percents)
    assert (one.error, one.trainable_percent) == (0.5, 40.0)
    # Nor is what has been better than the median given up for what comes after it.
    follow([0.6, 0.2, 0.35], tested=[1, 2, 2], median_stop_epoch=2)


def test_time_and_signals_ask_for_a_stop():
    assert watch().number == 0
    assert watch(evaluation_timeout=1e-9).number != 0
    one = watch(evaluation_timeout=1e-9)
    one._signal.number = 10
    assert one.number == 10
    elsewhere = _Watch(
        Configuration(), medians=[], stop_signal=Asked(), stopped_elsewhere=lambda: True
    )
    assert elsewhere.number == 0
    elsewhere(1, {"accuracy": np.float64(0.5)}, 10.0, tested_epoch=1, last=False)
    assert elsewhere.number != 0
