"""What values of a recipe may be: counts, shares and names with their ranges, and what a section is."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmb]?)", re.IGNORECASE)
_MOST_IMAGES = 10**15
_FACTOR = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_images(value: Any) -> int:
    """A count of images: 50000, "50k", "5.12M" or "1B" -> int; raises `ValueError` for anything else."""
    match = (
        _COUNT.fullmatch(str(value).strip()) if isinstance(value, (int, float, str)) else None
    )  # "True" is no match
    if match and Decimal(match[1]) <= _MOST_IMAGES:  # int(1e999999999) would not come to an end
        count = Decimal(match[1]) * _FACTOR[match[2].lower()]
        if count == int(count):
            return int(count)
    raise ValueError("must be a whole number of images, such as 50000, 50k or 5.12M")


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def one_or_list(value: Any) -> str:
    """`list` or `one`: which of the two forms of a value was given."""
    return "list" if isinstance(value, (list, tuple)) else "one"


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Images = Annotated[int, BeforeValidator(parse_images)]
SomeImages = Annotated[Images, Field(ge=1)]
Count = Annotated[Whole, Field(ge=1)]
CountOrNone = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Decay = Annotated[Number, Field(gt=0, lt=1)]
Width = Annotated[Count, Field(le=1_000_000)]  # larger networks cannot even be counted through
Layers = Annotated[CountOrNone, Field(le=256)]
Ratio = Annotated[Positive, Field(le=1_000)]
Ratios = Annotated[
    Annotated[Ratio, Tag("one")] | Annotated[tuple[Ratio, ...], Tag("list")],
    Discriminator(one_or_list),
]
Blocks = Annotated[
    Annotated[CountOrNone, Tag("one")] | Annotated[tuple[CountOrNone, ...], Tag("list")],
    Discriminator(one_or_list),
]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
