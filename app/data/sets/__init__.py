"""The data sets of ours: one file each, or one for several of the same layout.

A file gives its entries as ``DATA_SETS``; nothing else in the program knows their names. It is
imported where a configuration is read, so it imports nothing heavy at its top.
"""

import importlib
import pkgutil

from app.data.data_set import DataSet

DATA_SETS: dict[str, DataSet] = {
    entry.name: entry
    for module in pkgutil.iter_modules(__path__)
    for entry in importlib.import_module(f"{__name__}.{module.name}").DATA_SETS
}
"""By name."""
