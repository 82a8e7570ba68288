"""Trainings held against each other: the parts of benchmarks/accuracy.py."""
