"""Measurements: each says what it measures and how long it takes in its ``--help``."""
