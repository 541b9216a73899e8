"""Records that are always valid, whose errors name the field, the value and the remedy; and common field types."""

import difflib
import re
import reprlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from trtllm_jax.logger import logger

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class StrictModel(BaseModel):
    """A record that is always valid: no unknown names, no coerced types, checked when built and when changed.

    ``_unavailable`` lists the arguments that this release does not support, with the values that are still allowed.
    ``_ignored`` names arguments that only TensorRT uses: any value is allowed and has no effect. Arguments of either
    kind are dropped unless they are also fields. Any other error is a ValueError with one line for each argument.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    _owner: ClassVar[str]
    _unavailable: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    _ignored: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, *, owner: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._owner = owner or cls.__name__

    def __init__(self, /, **arguments: Any) -> None:
        known = self._without_ignored(self._prepare(arguments))
        try:
            super().__init__(**known)
        except ValidationError as error:
            raise ValueError(_explain(type(self), known, error)) from None

    def __setattr__(self, name: str, value: object) -> None:
        changed = self._replaced({name: value})
        object.__setattr__(self, "__dict__", changed.__dict__)
        object.__setattr__(self, "__pydantic_fields_set__", changed.model_fields_set)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with ``update`` applied; unlike pydantic's own, the result is checked."""
        return super().model_copy(deep=deep)._replaced(update or {})

    def _replaced(self, update: Mapping[str, Any]) -> Self:
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | dict(update))

    @classmethod
    def _prepare(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Convert the arguments to the fields' names and types, before they are checked."""
        return arguments

    @classmethod
    def _without_ignored(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, neutral in cls._unavailable.items():
            if name in arguments and not any(_same(arguments[name], value) for value in neutral):
                raise ValueError(
                    f"{cls._owner}.{name} = {shown_value(arguments[name])} is not available in this release: "
                    f"leave it out or use {_listed([shown_value(value) for value in neutral])}"
                )
        ignored = (cls._unavailable.keys() | cls._ignored) - cls.model_fields.keys()
        for name in cls._ignored & arguments.keys():
            logger.debug(
                "%s.%s = %s is accepted and has no effect here", cls._owner, name, shown_value(arguments[name])
            )
        return {name: value for name, value in arguments.items() if name not in ignored}


def _same(value: object, other: object) -> bool:
    # Only plain values are compared, because arrays compare elementwise; and True does not count as 1.
    return value is other or (
        isinstance(value, int | float | str) and isinstance(value, bool) == isinstance(other, bool) and value == other
    )


def refuse_two_values(name: str, value: object, other_name: str, other: object) -> None:
    """ValueError if an argument is given under both of its names with different values."""
    if value is not None and other is not None and value != other:
        raise ValueError(
            f"{name} = {shown_value(value)} and {other_name} = {shown_value(other)} disagree: give one of them"
        )


def _explain(cls: type[StrictModel], arguments: Mapping[str, Any], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    by_name = {
        name: [p for p in problems if p["loc"][:1] == name] for name in dict.fromkeys(p["loc"][:1] for p in problems)
    }
    return "\n".join(_line(cls, arguments, name, of_name) for name, of_name in by_name.items())


def _line(
    cls: type[StrictModel], arguments: Mapping[str, Any], loc: tuple[int | str, ...], problems: list[ErrorDetails]
) -> str:
    if not loc:  # a validator of several fields, whose message is complete
        return ", ".join(_remedy(problem) for problem in problems)
    name = str(loc[0])
    if problems[0]["type"] == "missing":
        return f"{cls._owner}.{name} is missing: pass {name}=..."
    if problems[0]["type"] == "extra_forbidden":
        names = sorted({*cls.model_fields, *cls._unavailable, *cls._ignored})
        close = difflib.get_close_matches(name, names)
        hint = f"did you mean {_listed(close)}?" if close else f"it takes {', '.join(names)}"
        return f"{cls._owner} got invalid argument: {name} (= {shown_value(arguments[name])}); {hint}"
    # A union reports an error for each alternative; the deepest location belongs to the one that fits best.
    depth = max(len(problem["loc"]) for problem in problems)
    first, *others = dict.fromkeys(_remedy(problem) for problem in problems if len(problem["loc"]) == depth)
    remedy = _listed([first, *(other.removeprefix("it should be ") for other in others)])
    return f"{cls._owner}.{name} = {shown_value(arguments[name])} is invalid: {remedy}"


def _remedy(problem: ErrorDetails) -> str:
    item = problem["loc"][-1] if problem["loc"] else None
    subject = f"item {item}" if isinstance(item, int) else "it"
    return re.sub(r"^(Input|String) should", f"{subject} should", problem["msg"].removeprefix("Value error, "))


def shown_value(value: object) -> str:
    """A value as errors show it: abbreviated, and an enumeration's member as its string."""
    return repr(str(value)) if isinstance(value, StrEnum) else reprlib.repr(value)


def _listed(names: list[str]) -> str:
    return " or ".join(names)
