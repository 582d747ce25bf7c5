"""What all sections of the settings have in common, and the types of their values."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Precision = Literal["fp64", "fp32", "bf16", "fp16"]
Edge = Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountFromZero = Annotated[int, Field(ge=0, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]


def expand_home(text: str) -> str:
    """`text` with the home folder for a ~ that begins it, as in a shell; the text itself where there is none."""
    return os.path.expanduser(text)  # noqa: PTH111, as Path makes ./x and a//b of other names something else


LocalPath = Annotated[str, AfterValidator(expand_home)]
"""A path, or whatever else says where something is: a hub id, the name of something built in."""


class Section(BaseModel):
    """Settings are frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
