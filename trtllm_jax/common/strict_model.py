"""Records that are valid at any time, whose errors name the field, the value and the remedy; and their field types."""

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
    """A record that is valid at any time: no unknown names, no coerced types, checked when built and when changed.

    ``_later`` is the one list of what this release cannot do: an argument, and the values that do not ask for it.
    ``_accepted`` names arguments that are TensorRT's alone: any value is right, none has an effect. Either kind is
    dropped unless it is also a field. Everything else that is wrong is a ValueError of one line an argument.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    _owner: ClassVar[str]
    _later: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    _accepted: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, *, owner: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._owner = owner or cls.__name__

    def __init__(self, /, **arguments: Any) -> None:
        known = self._meaningful(self._prepare(arguments))
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
        """The arguments under their own names, before any is checked."""
        return arguments

    @classmethod
    def _meaningful(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, neutral in cls._later.items():
            if name in arguments and not any(_same(arguments[name], value) for value in neutral):
                raise ValueError(
                    f"{cls._owner}.{name} = {shown_value(arguments[name])} is not available in this release: "
                    f"leave it out or use {_listed([shown_value(value) for value in neutral])}"
                )
        ignored = (cls._later.keys() | cls._accepted) - cls.model_fields.keys()
        for name in cls._accepted & arguments.keys():
            logger.debug(
                "%s.%s = %s is accepted and has no effect here", cls._owner, name, shown_value(arguments[name])
            )
        return {name: value for name, value in arguments.items() if name not in ignored}


def _same(value: object, other: object) -> bool:
    # Arrays compare elementwise and True equals 1: only plain values of one kind are compared.
    return value is other or (
        isinstance(value, int | float | str) and isinstance(value, bool) == isinstance(other, bool) and value == other
    )


def refuse_two_values(name: str, value: object, other_name: str, other: object) -> None:
    """ValueError where both spellings of one argument are given, with different values."""
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
    if not loc:  # a check of several fields, which words its own error
        return ", ".join(_remedy(problem) for problem in problems)
    name = str(loc[0])
    if problems[0]["type"] == "missing":
        return f"{cls._owner}.{name} is missing: pass {name}=..."
    if problems[0]["type"] == "extra_forbidden":
        names = sorted({*cls.model_fields, *cls._later, *cls._accepted})
        close = difflib.get_close_matches(name, names)
        hint = f"did you mean {_listed(close)}?" if close else f"it takes {', '.join(names)}"
        return f"{cls._owner} got invalid argument: {name} (= {shown_value(arguments[name])}); {hint}"
    # A union reports every alternative; the one that got furthest into the value is the one that was meant.
    depth = max(len(problem["loc"]) for problem in problems)
    first, *others = dict.fromkeys(_remedy(problem) for problem in problems if len(problem["loc"]) == depth)
    remedy = _listed([first, *(other.removeprefix("it should be ") for other in others)])
    return f"{cls._owner}.{name} = {shown_value(arguments[name])} is invalid: {remedy}"


def _remedy(problem: ErrorDetails) -> str:
    item = problem["loc"][-1] if problem["loc"] else None
    subject = f"item {item}" if isinstance(item, int) else "it"
    return re.sub(r"^(Input|String) should", f"{subject} should", problem["msg"].removeprefix("Value error, "))


def shown_value(value: object) -> str:
    """A value as errors show it: short, and a name of an enumeration as the user writes it."""
    return repr(str(value)) if isinstance(value, StrEnum) else reprlib.repr(value)


def _listed(names: list[str]) -> str:
    return " or ".join(names)
