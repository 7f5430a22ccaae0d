"""The base of all sections of a recipe, and the types of their fields."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe. It is frozen and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def written(value: Any) -> str:
    """A value as it is written in a recipe. Example: (0.2, 0.8) → [0.2, 0.8], None → null."""
    return json.dumps(value).strip('"')
