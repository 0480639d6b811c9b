"""The base class of a recipe's sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section of a recipe. An unknown key is an error, because a misspelt one would silently train something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


def _no_switch(value: Any) -> Any:
    """Refuse true and false, which pydantic reads as 1 and 0: ``keep: true`` would delete all checkpoints but one."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "Input should be a number")
    return value


NO_SWITCH = BeforeValidator(_no_switch)
Positive = Annotated[int, Field(gt=0, lt=1 << 63), NO_SWITCH]
NotNegative = Annotated[int, Field(ge=0, lt=1 << 63), NO_SWITCH]
PositiveFloat = Annotated[float, Field(gt=0), NO_SWITCH]
NotNegativeFloat = Annotated[float, Field(ge=0), NO_SWITCH]
