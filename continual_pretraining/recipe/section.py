"""The base class of a recipe's sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of a recipe. An unknown key is an error, because a misspelt one would silently train something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
NotNegative = Annotated[int, Field(ge=0, lt=1 << 63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
