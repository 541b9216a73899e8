"""Qwen3-Coder's tool calls: tags, with values that are text rather than JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any

from trtllm_jax.serve.parsers.base import NAME_CHARACTERS, ToolParser
from trtllm_jax.serve.parsers.scanner import Malformed, Scanner, Steps, json_value

_KEY = re.compile(r"[^<>\n]*")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Qwen3CoderParser(ToolParser):
    """``<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>``.

    A value is a string where the tool's schema says so, and streams; elsewhere it is JSON if it can be read as JSON.
    """

    begins = ("<tool_call>",)
    ends = ("<|im_end|>",)

    def _read_calls(self) -> Steps[None]:
        scanner = self._scanner
        yield from scanner.spaces()
        yield from scanner.require("<function=")
        name = yield from scanner.run(NAME_CHARACTERS)
        yield from scanner.require(">")
        self._begin_call(name)
        self._emit_arguments("{")
        separator = ""
        while True:
            yield from scanner.spaces()
            if not (yield from scanner.match("<parameter=")):
                break
            key = yield from scanner.run(_KEY)
            yield from scanner.require(">")
            self._emit_arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._read_value(types_of(_property_schema(self._schemas.get(name), key)))
            separator = ", "
        yield from scanner.require("</function>")
        self._emit_arguments("}")
        self._end_call()
        yield from scanner.spaces()
        yield from scanner.match("</tool_call>")

    def _read_value(self, types: frozenset[str]) -> Steps[None]:
        """The newline after the opening tag and the one before the closing tag are the format's."""
        yield from self._scanner.match("\n")
        if types != {"string"}:
            text = yield from self._capture(self._until_end_of_value())
            self._emit_arguments(_as_json(text.removesuffix("\n"), types))
            return
        held = ""

        def buffer_and_emit(text: str) -> None:
            nonlocal held
            self._buffer(text)
            shown = held + text
            held = "\n" if shown.endswith("\n") else ""
            self._emit_arguments(_escaped(shown.removesuffix("\n")))

        self._emit_arguments('"')
        self._scanner.send_to(buffer_and_emit)
        yield from self._until_end_of_value()
        self._scanner.send_to(self._buffer)
        self._emit_arguments('"')

    def _until_end_of_value(self) -> Steps[None]:
        end = yield from self._scanner.until(("</parameter>",))
        self._source.append(end)
        if not end:
            raise Malformed


def _property_schema(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def types_of(schema: Any) -> frozenset[str]:
    """The types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    types, values = schema.get("type"), schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return frozenset(["string"])
    return frozenset([types] if isinstance(types, str) else types if isinstance(types, list) else ())


def _as_json(text: str, types: frozenset[str]) -> str:
    if "string" in types and text not in ("null", "None"):
        return json.dumps(text, ensure_ascii=False)
    stripped = text.strip(" \t\r\n")
    value = _PYTHON.get(stripped, stripped)
    return value if _is_json(value) else json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    scanner = Scanner()
    scanner.add(text)
    scanner.end()
    try:
        next(_whole_value(scanner), None)
    except Malformed:
        return False
    return True


def _whole_value(scanner: Scanner) -> Steps[None]:
    yield from json_value(scanner)
    if (yield from scanner.peek()):
        raise Malformed


def _escaped(text: str) -> str:
    """A part of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
