"""What a machine must have for a test; where it does not, the test is skipped with the reason."""

import os
import shutil

import pytest


def need(*programs):
    """Skip the test unless these programs are installed; fail where nothing may be skipped."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("NO_SKIPPED_TESTS"):
            pytest.fail(reason)
        pytest.skip(reason)
