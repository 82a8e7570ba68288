"""Every benchmark tells its question and its options, and gives an answer within a minute."""

import ast
import json
import re

import pytest
from support.launching import ROOT, launch

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
