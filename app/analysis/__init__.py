"""Measures the weights in checkpoints that this or any other program wrote."""
