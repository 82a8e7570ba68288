"""What every section of the configuration is."""

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
