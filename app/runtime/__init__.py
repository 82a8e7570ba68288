"""Processes and devices, the placement of factorizations, and their distribution."""
