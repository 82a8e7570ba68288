"""What every section of the configuration is."""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

LARGEST_INTEGER = 2**32
LARGEST_NUMBER = 1e9
SMALLEST_NUMBER = 1e-30
"""Of what is not 0. Beyond these float32 cannot hold a square, and loops do not end."""


class Section(BaseModel):
    """A part of the configuration: immutable, keyword-only, no unknown keys, no coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        """Refuse numbers that no key can mean; keys have narrower ranges of their own."""
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise PydanticCustomError("range", "should be at most 2^32 in size")
        if isinstance(value, float) and abs(value) > LARGEST_NUMBER:
            raise PydanticCustomError("range", "should be at most 1e9 in size")
        if isinstance(value, float) and 0 < abs(value) < SMALLEST_NUMBER:
            raise PydanticCustomError("range", "should be 0 or at least 1e-30 in size")
        return value


def expand_home(path: str | None) -> str | None:
    """Put the home folder for the ~ that a path begins with: no shell does it behind ``key=``.

    A validator of the keys that are paths, after pydantic's own.
    """
    if path is None or not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.partition("/")[0] == "~":
        raise PydanticCustomError("home", "should not begin with ~: no home folder is known")
    return expanded
