"""Which spectra of a long run are recorded: they would be most of its file."""

DENSE = 64
"""Spectra of a layer of which each is recorded: more than a run of the usual length has."""


def is_recorded(number: int) -> bool:
    """Whether a layer's spectrum is recorded, by its number, from 1.

    Of those beyond :data:`DENSE` every second, from twice as many on every fourth, and so on: with
    each doubling of the run's length come half of DENSE more, 295 of 10,000. What is recorded never
    depends on what comes later, since rows cannot be taken back from a file that others read.
    """
    return number % _stride(number) == 0


def _stride(number: int) -> int:
    """Return the smallest power of 2 that is no less than number / DENSE."""
    return 1 << max(0, ((number - 1) // DENSE).bit_length())
