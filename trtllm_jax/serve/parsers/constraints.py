"""What a request's tools and tool_choice mean: which tools the template shows, and which call is forced."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MAX_TOOLS, _MAX_ENUM_VALUES, _MAX_DEPTH = 128, 1000, 64

Tool = Mapping[str, Any]


class ToolPlan(NamedTuple):
    """``shown`` goes to the chat template; one of ``forced`` must be called, where it is not empty."""

    shown: tuple[Tool, ...]
    forced: tuple[Tool, ...]


def plan_tools(tools: Sequence[Tool] | None, tool_choice: str | Mapping[str, Any] | None) -> ToolPlan:
    """The plan for OpenAI's ``tools`` and ``tool_choice`` (None: "auto" where there are tools).

    ValueError names the field at fault and the remedy.
    """
    checked = check_tools(tools or ())
    match tool_choice:
        case "none":
            return ToolPlan((), ())
        case None | "auto":
            return ToolPlan(checked, ())
        case "required":
            if not checked:
                raise ValueError('tool_choice = "required" needs tools: give at least one, or leave tool_choice out')
            return ToolPlan(checked, checked)
        case {"type": "function", "function": {"name": str(name)}}:
            named = tuple(tool for tool in checked if tool["function"]["name"] == name)
            if not named:
                raise ValueError(f"tool_choice.function.name = {name!r} is not the name of a tool: give one of tools")
            return ToolPlan(checked, named)
    raise ValueError(
        f'tool_choice = {tool_choice!r} is invalid: give "none", "auto", "required" or '
        '{"type": "function", "function": {"name": ...}}'
    )


def check_tools(tools: Sequence[Any]) -> tuple[Tool, ...]:
    """The tools, once they are in OpenAI's form; ValueError names what is not, as in ``tools[0].function.name``."""
    if len(tools) > _MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} entries: give at most {_MAX_TOOLS}")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise ValueError(f'{where}.type is not "function": give {{"type": "function", "function": {{...}}}}')
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise ValueError(f"{where}.function is missing: give an object with a name and parameters")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}.function.name = {name!r} is invalid: give 1 to 64 of a-z, A-Z, 0-9, _ and -")
        if name in seen:
            raise ValueError(f"{where}.function.name = {name!r} is another tool's name too: rename one of them")
        seen.add(name)
        _check_parameters(function.get("parameters"), f"{where}.function.parameters")
    return tuple(tools)


def _check_parameters(schema: Any, where: str) -> None:
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} is a {type(schema).__name__}: give a JSON schema of an object, or leave it out")
    if schema.get("type", "object") != "object":
        raise ValueError(f'{where}.type = {schema["type"]!r} is invalid: arguments are always an "object"')
    if not isinstance(schema.get("properties", {}), Mapping):
        raise ValueError(f"{where}.properties is a {type(schema['properties']).__name__}: give an object")
    values = 0
    level: list[Any] = [schema]
    for _ in range(_MAX_DEPTH):
        values += sum(len(item["enum"]) for item in level if isinstance(item, Mapping) and _is_list(item.get("enum")))
        level = [child for item in level for child in _nested_values(item)]
        if not level:
            break
    else:
        raise ValueError(f"{where} is more than {_MAX_DEPTH} levels deep: simplify the schema")
    if values > _MAX_ENUM_VALUES:
        raise ValueError(f"{where} has {values} enum values: give at most {_MAX_ENUM_VALUES} a function")


def _nested_values(item: Any) -> Sequence[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    return item if _is_list(item) else ()


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
