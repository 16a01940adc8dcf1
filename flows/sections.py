"""What all sections of a configuration share: how a field names its option, and the values that are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PER_CHANNEL = -1
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, PER_CHANNEL)
AUTO: Literal["auto"] = "auto"
SCALE_BITS = {"bfloat16": 16, "float8": 8}
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8)
MAX_SEED = 2**63 - 1  # what torch.Generator takes


@dataclass(frozen=True, slots=True)
class Flag:
    """The option of the command line that sets a field."""

    name: str
    """Such as ``--budget``; the name of the argument for ``MODEL``."""
    off: str = ""
    """The option that sets it to false, such as ``--no-control``."""


class Section(BaseModel):
    """Base of all sections: immutable, strict, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def chosen(value: tuple[int, ...], known: tuple[int, ...]) -> tuple[int, ...]:
    """Known values, each once, in one order: how they were written must not make another run."""
    for item in value:
        if item not in known:
            raise ValueError(f"{item} is not one of {', '.join(map(str, known))}")
    return tuple(item for item in known if item in value)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
WindowLength = Annotated[int, Field(ge=2)]
"""Tokens; the first one predicts the second."""
