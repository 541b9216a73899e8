"""Parsers by name, and `auto`: the ones that a model's chat template and configuration call for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trtllm_jax.serve.parsers.base import ReasoningParser, ToolParser
from trtllm_jax.serve.parsers.deepseek import CALLS_BEGIN, DeepSeekV3Parser, DeepSeekV31Parser
from trtllm_jax.serve.parsers.harmony import CHANNEL, HarmonyReasoningParser, HarmonyToolParser
from trtllm_jax.serve.parsers.json_calls import HermesParser, Llama3Parser, MistralParser
from trtllm_jax.serve.parsers.qwen3_coder import Qwen3CoderParser
from trtllm_jax.serve.parsers.thinking import CLOSE, OPEN, ThinkParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3Parser,
    "deepseek_v31": DeepSeekV31Parser,
    "gpt-oss": HarmonyToolParser,
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "llama3_json": Llama3Parser,
    "mistral": MistralParser,
    "qwen3": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
}
REASONING_PARSERS = ("deepseek-r1", "gpt-oss", "qwen3")


class ReasoningParserFactory(NamedTuple):
    """What makes a parser for each answer."""

    name: str
    keep_special_tokens: bool
    make: Callable[[str], ReasoningParser]

    def __call__(self, prompt: str = "") -> ReasoningParser:
        """A parser for one answer to ``prompt``, whose end may have opened or closed the reasoning."""
        return self.make(prompt)


class ToolParserFactory(NamedTuple):
    """What makes a parser for each answer."""

    name: str
    keep_special_tokens: bool
    make: type[ToolParser]

    def __call__(self, tools: Sequence[Mapping[str, Any]] = ()) -> ToolParser:
        """A parser for one answer of a model that was given ``tools``."""
        return self.make(tools)


def make_reasoning_parser(
    name: str, *, model_type: str | None = None, chat_template: str | None = None
) -> ReasoningParserFactory | None:
    """The factory of the reasoning parser ``name``; None where ``auto`` sees that the model does not reason.

    ``model_type`` is config.json's; ``auto`` looks at it and at the chat template. ValueError for an unknown name.
    """
    if name == "auto":
        found = _detect_reasoning_parser(model_type or "", chat_template or "")
        if found is None:
            return None
        name = found
    if name == "gpt-oss":
        return ReasoningParserFactory(name, True, lambda prompt: HarmonyReasoningParser())
    if name not in REASONING_PARSERS:
        raise ValueError(_unknown_name("reasoning_parser", name, REASONING_PARSERS))
    opened = name == "deepseek-r1"

    def think(prompt: str) -> ReasoningParser:
        end = prompt.rstrip()
        return ThinkParser(opened=end.endswith(OPEN) or (opened and not end.endswith(CLOSE)))

    return ReasoningParserFactory(name, False, think)


def make_tool_parser(
    name: str, *, model_type: str | None = None, chat_template: str | None = None
) -> ToolParserFactory | None:
    """The factory of the tool parser ``name``; None where ``auto`` finds no format that the model would know.

    ``model_type`` is config.json's; ``auto`` looks at the chat template first. ValueError for an unknown name.
    """
    if name == "auto":
        found = _detect_tool_parser(model_type or "", chat_template or "")
        if found is None:
            return None
        name = found
    if name not in TOOL_PARSERS:
        raise ValueError(_unknown_name("tool_parser", name, TOOL_PARSERS))
    parser = TOOL_PARSERS[name]
    return ToolParserFactory(name, parser.keep_special_tokens, parser)


def _detect_reasoning_parser(model_type: str, template: str) -> str | None:
    if CHANNEL in template or model_type == "gpt_oss":
        return "gpt-oss"
    if OPEN in template or CLOSE in template:
        return "deepseek-r1" if CALLS_BEGIN in template else "qwen3"
    return None


_TEMPLATE_MARKERS = (
    (CHANNEL, "gpt-oss"),
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3"),
    ('"parameters": dictionary of argument name', "llama3"),
)
_MODEL_TYPES = {
    "deepseek_v3": "deepseek_v3",
    "gpt_oss": "gpt-oss",
    "llama": "llama3",
    "mistral": "mistral",
    "mistral3": "mistral",
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
}


def _detect_tool_parser(model_type: str, template: str) -> str | None:
    if CALLS_BEGIN in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    for sign, name in _TEMPLATE_MARKERS:
        if sign in template:
            return name
    return _MODEL_TYPES.get(model_type)


def _unknown_name(field: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    return f"{field} = {name!r} is unknown: use one of auto, {', '.join(sorted(known))}"
