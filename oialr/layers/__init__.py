"""Factorized layers, one file each. They communicate with nobody."""
