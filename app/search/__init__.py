"""Hyperparameter search with Propulate: many trainings side by side, restartable."""
