"""The tables of docs/results.md that tell of studies say what the records of these studies say."""

import json
import re
import statistics
from collections import defaultdict

import pytest
from support.launching import ROOT

from benchmarks.study.table import interval

COMMAND = re.compile(r"--archive\s+(benchmarks/accuracy/\w+\.jsonl)([^`]*)`")
NETWORK = re.compile(r'--networks\s+"([^"]+)"')


def tables():
    """Return record, network and rows of every such table; no network: the only one."""
    text = (ROOT / "docs" / "results.md").read_text()
    found = []
    for command in COMMAND.finditer(text):
        lines = text[command.end() :].split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith("| training |"))
        rows = []
        for line in lines[start:]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        named = NETWORK.search(command[2])
        network = re.sub(r"\s+", " ", named[1]) if named else None
        found.append((command[1], network, [dict(zip(rows[0], r, strict=True)) for r in rows[2:]]))
    return found


def figures(record, network):
    """Return the summaries of a network by (method, factor of the learning rate) and seed."""
    found = defaultdict(dict)
    for line in (ROOT / record).read_text().splitlines():
        entry = json.loads(line)
        cell = entry["cell"]
        if network is None or cell["network"] == network:
            found[cell["method"], cell["learning_rate_factor"]][cell["seed"]] = entry["summary"]
    return found


@pytest.mark.parametrize(
    ("record", "network", "rows"), [pytest.param(*each, id=str(each[1])) for each in tables()]
)
def test_a_table_says_what_the_record_says(record, network, rows):
    recorded = figures(record, network)

    def values(row):
        by_seed = recorded[row["training"], float(row["rate x"])]
        if "test MSE" in row:
            return {seed: each["test_mse"] for seed, each in by_seed.items()}, by_seed
        return {seed: 100 * each["test_accuracy"] for seed, each in by_seed.items()}, by_seed

    full, whole = values(rows[0])
    assert rows[0]["training"] == "full-rank"
    parameters = next(iter(whole.values()))["stored_parameters"]
    for row in rows:
        mine, summaries = values(row)
        key, digits = ("test MSE", 4) if "test MSE" in row else ("test accuracy, %", 2)
        mean, deviation = statistics.fmean(mine.values()), statistics.stdev(mine.values())
        assert row[key] == f"{mean:.{digits}f} ± {deviation:.{digits}f} ({len(mine)})"
        if row is not rows[0]:
            differences = [mine[seed] - full[seed] for seed in sorted(mine)]
            mean, half = statistics.fmean(differences), interval(differences)
            assert row["to full-rank"] == f"{mean:+.{digits}f} ± {half:.{digits}f}"
        for column, number in (("trained", "trained_parameters"), ("stored", "stored_parameters")):
            mean = statistics.fmean(each[number] for each in summaries.values())
            assert row[column] == f"{100 * mean / parameters:.1f} %", row["training"]
        if "stored bytes" in row:
            mean = statistics.fmean(each["stored_bytes"] for each in summaries.values())
            assert row["stored bytes"] == f"{mean:,.0f}"


def test_there_are_such_tables():
    assert len(tables()) >= 4
