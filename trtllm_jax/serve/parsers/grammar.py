"""Grammars, in llguidance's Lark syntax, of text that calls a tool in a parser's format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trtllm_jax.serve.parsers import deepseek, harmony, thinking
from trtllm_jax.serve.parsers.qwen3_coder import types_of
from trtllm_jax.structured.params import JSON_OPTIONS

Tool = Mapping[str, Any]


class _Format(NamedTuple):
    """How calls are written: ``NAME`` in ``before`` is the tool's; the arguments follow, then ``after``."""

    begin: str
    before: str
    after: str
    between: str
    end: str


_FORMATS = {
    "deepseek_v3": _Format(
        deepseek.CALLS_BEGIN,
        f"{deepseek.CALL_BEGIN}function{deepseek.SEPARATOR}NAME\n```json\n",
        f"\n```{deepseek.CALL_END}",
        "\n",
        deepseek.CALLS_END,
    ),
    "deepseek_v31": _Format(
        deepseek.CALLS_BEGIN,
        f"{deepseek.CALL_BEGIN}NAME{deepseek.SEPARATOR}",
        deepseek.CALL_END,
        "",
        deepseek.CALLS_END,
    ),
    "hermes": _Format("", '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n", ""),
    "llama3": _Format("", '{"name": "NAME", "parameters": ', "}", "; ", ""),
    "mistral": _Format("[TOOL_CALLS][", '{"name": "NAME", "arguments": ', "}", ", ", "]"),
    "mistral_args": _Format("", "[TOOL_CALLS]NAME[ARGS]", "", "", ""),
    "qwen3_coder": _Format("", "<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>", "\n", ""),
    "gpt-oss": _Format(
        "",
        f"{harmony.CHANNEL}commentary to=functions.NAME {harmony.CONSTRAIN}json{harmony.MESSAGE}",
        "",
        f"{harmony.CALL}{harmony.START}assistant",
        harmony.CALL,
    ),
}
_ALIASES = {"llama3_json": "llama3", "qwen3": "hermes"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(
    parser: str,
    tools: Sequence[Tool],
    *,
    special_tokens: Mapping[str, int] | None = None,
    parallel: bool = True,
    reasoning: str | None = None,
    prompt: str = "",
) -> str:
    """A Lark grammar of answers that call one of ``tools``, and with ``parallel`` more of them.

    ``parser`` and ``reasoning`` are parsers' names; reasoning may come before the calls, and must end where ``prompt``
    has opened it. ``special_tokens`` are the ids of the tokens whose text the tokenizer does not make of other tokens
    (``special`` in tokenizer.json). Arguments follow each tool's ``parameters``. ValueError for an unknown parser.
    """
    name = _ALIASES.get(parser, parser)
    special = special_tokens or {}
    if name == "mistral" and "[ARGS]" in special:
        name = "mistral_args"
    if name not in _FORMATS:
        raise ValueError(f"tool_parser = {parser!r} has no grammar: use one of {', '.join(sorted(_FORMATS))}")
    form = _FORMATS[name]

    def text(literal: str) -> str:
        return _literal(literal, special)

    rules = ["%llguidance {}", "start: reasoning " + text(form.begin) + _repeat(form, special, parallel)]
    rules.append(f"reasoning: {_reasoning(reasoning, name, prompt, special)}")
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or {})}
        before = text(form.before.replace("NAME", function["name"]))
        if name == "qwen3_coder":
            arguments, extra = _qwen3_coder_arguments(index, schema)
            rules += extra
        else:
            arguments = _json(schema)
        rules.append(f"call_{index}: {before} {arguments} {text(form.after)}")
    rules += _LAZY_RULES
    return "\n".join(rules) + "\n"


def answer_grammar(
    reasoning: str,
    *,
    schema: Mapping[str, Any] | None = None,
    regex: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
    prompt: str = "",
) -> str:
    """A Lark grammar of answers that follow a JSON schema or a regular expression once the model has thought.

    ``reasoning``, ``special_tokens`` and ``prompt`` as in `call_grammar`.
    """
    special = special_tokens or {}
    name = "gpt-oss" if reasoning == "gpt-oss" else ""
    begin = f"{harmony.CHANNEL}final{harmony.MESSAGE}" if name else ""
    if regex is None:
        answer = "%json " + json.dumps({**(schema or {}), "x-guidance": JSON_OPTIONS})
    else:
        answer = "/" + regex.replace("/", "\\/") + "/"
    rules = [
        "%llguidance {}",
        f"start: reasoning {_literal(begin, special)} answer",
        f"reasoning: {_reasoning(reasoning, name, prompt, special)}",
        f"answer: {answer}",
        *_LAZY_RULES,
    ]
    return "\n".join(rules) + "\n"


_LAZY_RULES = [
    "think_end[lazy]: /(.|\\n)*<\\/think>/",
    "value_end[lazy]: /(.|\\n)*\\n<\\/parameter>\\n/",
    "prose: /(.|\\n)*/",
]


def _repeat(form: _Format, special: Mapping[str, int], parallel: bool) -> str:
    more = f" ({_literal(form.between, special)} call)*" if parallel else ""
    return f" call{more} {_literal(form.end, special)}"


def _reasoning(reasoning: str | None, name: str, prompt: str, special: Mapping[str, int]) -> str:
    if name == "gpt-oss":
        begin = _literal(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}", special)
        return f"({begin} prose {_literal(harmony.END + harmony.START + 'assistant', special)})?"
    if reasoning is None:
        return '""'
    close = special.get(thinking.CLOSE)
    rest = (f"prose <[{close}]>" if close is not None else "think_end") + " /\\n*/"
    end = prompt.rstrip()
    if end.endswith(thinking.OPEN) or (reasoning == "deepseek-r1" and not end.endswith(thinking.CLOSE)):
        return rest
    return f"({_literal(thinking.OPEN, special)} {rest})?"


def _literal(text: str, special: Mapping[str, int]) -> str:
    """Text as a grammar has it, with special tokens by their ids; their text would never match them."""
    parts = []
    while text:
        found = [(text.find(token), -len(token), token) for token in special if token in text]
        at, _, token = min(found, default=(len(text), 0, ""))
        if at:
            parts.append(json.dumps(text[:at], ensure_ascii=False))
        if token:
            parts.append(f"<[{special[token]}]>")
        text = text[at + len(token) :]
    return " ".join(parts)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _COMPACT})


def _qwen3_coder_arguments(index: int, schema: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Qwen3-Coder's parameters in the schema's order, and their rules; those not required may be left out."""
    required = schema.get("required") or ()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [], []
    for number, (key, value) in enumerate((schema.get("properties") or {}).items()):
        rule = f"call_{index}_{number}"
        opening = json.dumps(f"<parameter={key}>\n", ensure_ascii=False)
        closing = json.dumps("\n</parameter>\n")
        if isinstance(value, dict) and types_of(value) == {"string"}:
            values = value.get("enum") or ()
            choices = " | ".join(json.dumps(item, ensure_ascii=False) for item in values)
            body = f"({choices}) {closing}" if values else "value_end"
        else:
            body = f"{_json({**shared, **value} if isinstance(value, dict) else {})} {closing}"
        rules.append(f"{rule}: {opening} {body}")
        parts.append(rule if key in required else f"{rule}?")
    return " ".join(parts), rules
