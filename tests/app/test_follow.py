"""What --follow shows beside tables: curves, and the time left."""

import io
from datetime import timedelta

import numpy as np
from rich.console import Console
from support.evaluations import evaluation

from app.reporting.terminal import Curves, rasterize
from app.search import follow as search


def test_a_curve_is_the_mean_of_each_column_joined():
    dots = rasterize(
        np.array([0.0, 0.1, 2.0, 3.0]),
        np.array([4.0, 2.0, 1.0, 0.0]),
        shape=(5, 4),
        extent=(0.0, 3.0, 0.0, 4.0),
    )
    # Means 3, none (joined: 2), 1 and 0; the largest value is in the first row.
    assert dots.astype(int).tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_a_steep_curve_has_no_gap():
    dots = rasterize(
        np.array([0.0, 1.0, 2.0]),
        np.array([0.0, 4.0, 0.0]),
        shape=(5, 3),
        extent=(0.0, 2.0, 0.0, 4.0),
    )
    assert dots.astype(int).T.tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def shown(curves, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=30).print(Curves(curves, axis="epoch", label="loss"))
    file.seek(0)
    return file.read().splitlines()


def test_curves_are_shown_between_the_ends_of_their_axes():
    x = np.arange(1.0, 11.0)
    curves = {"training": (x, 1 / x), "validation": (x, np.full(10, np.nan))}
    heading, *lines = shown(curves)
    assert heading == "loss over epochs: training"  # of the other there is nothing yet
    assert len(lines) == 9
    assert lines[0].startswith("  1 |\u2801") or lines[0][5] > "\u2800"
    assert lines[7].startswith("0.1 |")
    assert lines[8].split() == ["|1", "10"]
    assert max(map(len, lines)) <= 30


def test_curves_need_no_encoding_of_their_own():
    x = np.arange(3.0)
    lines = shown({"training": (x, x)}, encoding="ascii")
    assert {character for line in lines[1:8] for character in line} <= set(" 0123456789.|*")


def test_of_nothing_nothing_is_shown():
    assert shown({"training": (np.empty(0), np.empty(0))}) == []


def test_a_flat_curve_is_shown():
    assert len(shown({"training": (np.ones(2), np.ones(2))})) == 10


def test_the_time_that_a_search_needs():
    def evaluations(count, workers):
        """Each is 4.5 s long."""
        return [
            evaluation(
                number,
                worker=number % workers,
                started=f"2026-11-24T12:00:{4.5 * (number // workers):06.3f}+00:00",
            )
            for number in range(count)
        ]

    ones = evaluations(8, workers=2)
    assert search.time_left(ones, 40) == timedelta(seconds=72)
    assert search.time_left(ones, 8) == timedelta(0)
    assert search.time_left(ones, None) is None
    assert search.time_left([], 40) is None
    # Two more rounds; by the span of the last twenty evaluations, two thirds of a round, it was 14.
    assert search.time_left(evaluations(90, workers=30), 150) == timedelta(seconds=9)
