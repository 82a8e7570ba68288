"""Every benchmark tells its question and its options, and gives an answer within a minute."""

import ast
import json
import re

import pytest
import torch
from support.launching import ROOT, launch

from benchmarks import compression, inference, release_state
from benchmarks.step_time import rank_at

NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
QUICK = [name for name in NAMES if name != "faults"]
"""Those whose short form takes under a minute; test_faults.py runs that of the other one."""


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_its_question_its_command_and_its_time(name):
    text = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text()))
    question, _, rest = text.partition("\n\n")
    assert re.fullmatch(r"[A-Z].*\?", question)
    assert re.search(rf"^ +(mpirun -n \d )?python -m benchmarks\.{name}\b", rest, re.MULTILINE)
    assert re.search(r"\b(seconds|minutes?|hours?)\b", rest)


def test_the_table_of_inference_is_that_of_its_page():
    def figures(ratio):
        return {
            "seconds_per_sample": 0.002,
            "time_ratio": ratio,
            "time_ratio_spread": ratio / 10,
            "peak_bytes": 1,
            "peak_bytes_ratio": ratio / 2,
        }

    names = {"dense": 1.0, "0.1 trained": 0.4, "0.1 plain": 0.3, "0.25 trained": 0.8}
    names |= {"0.25 plain": 0.6, "0.4 trained": 1.2, "0.4 plain": 0.9}
    measured = [("MLP", 8, {name: figures(ratio) for name, ratio in names.items()})]
    lines = list(inference.report(iter(measured), inference.FRACTIONS))
    assert lines[1] == "| MLP | 8 | 2.000 | 0.30 | 0.60 | 0.90 | 0.15 | 0.30 | 0.45 |"
    assert lines[3] == "| MLP | 8 | 2.000 | 0.40 | 0.80 | 1.20 | 0.20 | 0.40 | 0.60 |"
    assert lines[4].endswith("0.03 to 0.12 apart")
    page = (ROOT / "docs" / "export.md").read_text()
    assert inference.heading(inference.FRACTIONS) in page
    for case in inference.CASES:
        for batch in inference.BATCHES[:2]:
            assert f"| {case.name} | {batch} | " in page


def test_a_standard_error_of_one_seed_is_refused_before_the_trainings(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["release_state", "--seeds", "1"])
    with pytest.raises(SystemExit, match="2"):
        release_state.main()
    assert "--seeds must be at least 2, not 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_tells_its_options(name, tmp_path):
    said = launch(0, "-m", f"benchmarks.{name}", "--help", cwd=tmp_path).stdout
    assert "--quick" in said
    assert "--json" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_short_form_prints_one_document(name, tmp_path):
    arguments = ("-m", f"benchmarks.{name}", "--quick", "--json")
    document = json.loads(launch(0, *arguments, cwd=tmp_path, timeout=600).stdout)
    assert document


def test_an_assignment_in_place_of_the_run_is_no_run(monkeypatch, capsys):
    taken = []

    def opened(run, overrides, _):
        taken.append((run, overrides))
        raise ValueError("seen")

    monkeypatch.setattr(compression, "opened", opened)
    monkeypatch.setattr("sys.argv", ["compression", "--quick", "data.root=DATA", "run.seed=1"])
    with pytest.raises(SystemExit, match="2"):
        compression.main()
    assert taken == [(None, ["data.root=DATA", "run.seed=1"])]
    monkeypatch.setattr("sys.argv", ["compression", "data.root=DATA"])
    with pytest.raises(SystemExit, match="2"):
        compression.main()
    assert "no run; see --help" in capsys.readouterr().err


def test_ranks_that_are_measured_are_those_that_the_method_keeps_on_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [rank_at(0.4, k, device) for k in (64, 128, 256) for device in (cpu, gpu)] == [
        *(25, 32),
        *(51, 56),
        *(112, 112),
    ]
