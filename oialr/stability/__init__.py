"""Basis stability, measured in memory (arXiv 2401.08505, section 3)."""
