"""The versions of Python and of the packages that a run's results may depend on."""

import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "numpy", "mpi4py", "timm", "h5py")


def installed_versions() -> str:
    """Return them in one line; none of the packages is imported for it."""
    found = [f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
