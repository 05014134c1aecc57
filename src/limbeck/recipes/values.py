"""The kinds of values that a recipe may hold, and the table they stand in."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator


def whole(value: object) -> object:
    """Let ``80e6`` stand for the integer 80000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_tuple(value: object) -> object:
    """Let a TOML array fill a tuple; its items stay strictly typed."""
    return tuple(value) if isinstance(value, list) else value


def as_names(value: object) -> object:
    """Let one name stand for a list of it."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def amount(value: object) -> int | float:
    """Accept a number of updates (an integer) or a part of the stage's updates (a float from 0 to 1)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    raise ValueError("a number of updates (an integer, such as 244) or a part of the stage (from 0.0 to 1.0)")


def interval(value: object) -> int | float | Literal["epoch"]:
    """Accept an amount, or an epoch."""
    return "epoch" if value == "epoch" else amount(value)


def distinct_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Sort layer numbers and refuse one that is named twice."""
    if len(set(layers)) < len(layers):
        raise ValueError("layer numbers that differ")
    return tuple(sorted(layers))


Count = Annotated[int, Field(gt=0), BeforeValidator(whole)]
Amount = Annotated[int | float, PlainValidator(amount)]
Interval = Annotated[int | float | Literal["epoch"], PlainValidator(interval)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple), AfterValidator(distinct_layers)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]


class Table(BaseModel):
    """A TOML table: unknown keys, wrong types and later changes are all refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)
