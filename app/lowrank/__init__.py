"""Factorized layers, conversion there and back, the update schedule, transport of optimizer state.

torch only: nothing here communicates.
"""
