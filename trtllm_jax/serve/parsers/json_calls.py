"""Formats whose calls are JSON objects that hold the name and the arguments: Hermes and Qwen, Llama 3, Mistral."""

import re

from trtllm_jax.serve.parsers.base import NAME_CHARACTERS, ToolParser
from trtllm_jax.serve.parsers.scanner import Malformed, Steps, json_object, json_string, json_value

_ARGUMENTS = ("arguments", "parameters")
_CALL_ID = re.compile(r"[a-zA-Z0-9]*")


class JsonCallParser(ToolParser):
    """A reader of ``{"name": ..., "arguments": {...}}``; the keys may come in any order, others are passed over."""

    def _read_object(self) -> Steps[None]:
        scanner = self._scanner
        yield from scanner.require("{")
        name: str | None = None
        arguments: str | None = None
        called = False
        while True:
            yield from scanner.spaces()
            key = yield from json_string(scanner)
            yield from scanner.spaces()
            yield from scanner.require(":")
            yield from scanner.spaces()
            if key == "name" and name is None:
                name = yield from json_string(scanner)
            elif key in _ARGUMENTS and name is not None and not called:
                yield from self._read_arguments(name)
                called = True
            elif key in _ARGUMENTS and arguments is None:
                arguments = yield from self._capture(json_object(scanner))
            else:
                yield from json_value(scanner)
            if name is not None and arguments is not None and not called:
                self._begin_call(name)
                self._emit_arguments(arguments)
                self._end_call()
                called = True
            yield from scanner.spaces()
            if not (yield from scanner.match(",")):
                break
        if not called:
            raise Malformed
        yield from scanner.require("}")


class HermesParser(JsonCallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes, Qwen 2.5 and Qwen 3 write."""

    begins = ("<tool_call>",)
    ends = ("<|im_end|>",)

    def _read_calls(self) -> Steps[None]:
        yield from self._scanner.spaces()
        yield from self._read_object()
        yield from self._scanner.spaces()
        yield from self._scanner.match("</tool_call>")


class Llama3Parser(JsonCallParser):
    """A message that is ``{"name": ..., "parameters": {...}}`` or several of them with ``;`` between.

    They may also follow ``<|python_tag|>`` anywhere.
    """

    keep_special_tokens = True
    begins = ("<|python_tag|>",)
    ends = ("<|eom_id|>", "<|eot_id|>")

    def _read(self) -> Steps[None]:
        self._scanner.send_to(self._emit_content)
        yield from self._scanner.spaces()
        if (yield from self._scanner.peek()) == "{":
            self._scanner.send_to(self._emit_content)
            yield from self._try_calls("")
        yield from super()._read()

    def _read_calls(self) -> Steps[None]:
        while True:
            yield from self._scanner.spaces()
            yield from self._read_object()
            yield from self._scanner.spaces()
            if not (yield from self._scanner.match(";")):
                return


class MistralParser(JsonCallParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}`` since version 11."""

    keep_special_tokens = True
    begins = ("[TOOL_CALLS]",)
    ends = ("</s>",)

    def _read_calls(self) -> Steps[None]:
        scanner = self._scanner
        yield from scanner.spaces()
        if not (yield from scanner.match("[")):
            name = yield from scanner.run(NAME_CHARACTERS)
            if (yield from scanner.match("[CALL_ID]")):
                yield from scanner.run(_CALL_ID)
            yield from scanner.require("[ARGS]")
            yield from scanner.spaces()
            yield from self._read_arguments(name)
            return
        while True:
            yield from scanner.spaces()
            yield from self._read_object()
            yield from scanner.spaces()
            if not (yield from scanner.match(",")):
                yield from scanner.match("]")
                return
