"""Conversations become prompts: messages are checked, and the model's chat template writes them as text."""

import inspect
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from trtllm_jax.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
"""Messages from the first to the last, each with a role and a content."""

Tool = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema as OpenAI's API has it, or a function whose type hints and docstring make one."""

_RESERVED = {"self", "messages", "conversations"}
"""Names that a template's variables cannot have, besides the arguments of `apply_chat_template`."""


@dataclass(frozen=True)
class Chat:
    """What turns conversations into prompts.

    Attributes:
        tokenizer: None where there is none; then every conversation is refused.
        template: the Jinja text to use in place of the tokenizer's own.
        allow_request_template: whether a call may bring a template of its own.
    """

    tokenizer: Tokenizer | None
    template: str | None = None
    allow_request_template: bool = False

    def prompts(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The prompt of one conversation, or those of a list: "prompt", the text, and "prompt_token_ids", its ids.

        The arguments are those of `LLM.chat`. Special tokens come from the template alone. ValueError names the
        argument, its value and the remedy, also where the template itself refuses.
        """
        tokenizer = self._require_tokenizer()
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message = True and add_generation_prompt = True exclude each other: the first goes on "
                "with the last message, the second begins a new one; set one of them to False"
            )
        template = self._template(tokenizer, chat_template)
        how: dict[str, Any] = {
            "tools": _tools(tools),
            "documents": _documents(documents),
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **_variables(tokenizer, chat_template_kwargs),
        }
        if not _is_list(messages) or not messages:
            raise ValueError(f"messages = {_shown(messages)} is invalid: give a list of messages, or a list of such")
        if isinstance(messages[0], Mapping):
            return _prompt(tokenizer, "messages", messages, how)
        return [_prompt(tokenizer, f"messages[{i}]", each, how) for i, each in enumerate(messages)]

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "chat needs a tokenizer, and the model was loaded with skip_tokenizer_init=True: load it without, or "
                "give generate token ids"
            )
        return self.tokenizer

    def _template(self, tokenizer: Tokenizer, requested: Any) -> str | None:
        """The template to use, None for the tokenizer's own."""
        if requested is None:
            if self.template is None and not tokenizer.hf.chat_template:
                raise ValueError(
                    "chat_template: the model's tokenizer has none; give LLM(..., chat_template=...) a file or a Jinja "
                    "text, or give generate a prompt"
                )
            return self.template
        if not self.allow_request_template:
            raise ValueError(
                f"chat_template = {_shown(requested)} is refused, for a template is a program: give it to "
                "LLM(..., chat_template=...), or allow every call its own with "
                "LLM(..., allow_request_chat_template=True)"
            )
        if not isinstance(requested, str) or not requested:
            raise ValueError(f"chat_template = {_shown(requested)} is invalid: give a Jinja text")
        return requested


def read_template(given: str | Path | None) -> str | None:
    """The Jinja text that `LLM(chat_template=...)` gives or names the file of. ValueError where there is none."""
    if given is None:
        return None
    text = str(given)
    if isinstance(given, Path) or not any(character in text for character in "{}\n"):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"LLM.chat_template = {_shown(str(given))} is neither a Jinja text nor a file that can be read "
                f"({error}): give one of them"
            ) from error
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it
    except TemplateError as error:
        raise ValueError(f"LLM.chat_template = {_shown(text)} is no Jinja template: {error}; correct it") from error
    return text


def _prompt(tokenizer: Tokenizer, where: str, conversation: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    if not _is_list(conversation) or not conversation:
        raise ValueError(f"{where} = {_shown(conversation)} is invalid: give a list with at least one message")
    messages = [_message(f"{where}[{i}]", message) for i, message in enumerate(conversation)]
    try:
        text: str = tokenizer.hf.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"{where}: the chat template cannot write this conversation: {error}") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"{where}: the chat template makes no text of this conversation; give another template")
    return {"prompt": text, "prompt_token_ids": ids}


def _message(where: str, given: Any) -> dict[str, Any]:
    """The message with its content as text, its tool calls' arguments as objects, and nothing that is None."""
    if not isinstance(given, Mapping):
        raise ValueError(f'{where} = {_shown(given)} is invalid: give a dict with "role" and "content"')
    message = {name: value for name, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where}.role = {_shown(role)} is invalid: give a str such as "user"')
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    if "content" in message:
        message["content"] = _content(f"{where}.content", message["content"])
    elif not message.get("tool_calls"):
        raise ValueError(f"{where}.content is missing: give a str, or a list of text parts")
    return message


def _content(where: str, content: Any) -> str:
    """The text; parts are lines of their own, as TensorRT-LLM's server joins them."""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise ValueError(f"{where} = {_shown(content)} is invalid: give a str, or a list of text parts")
    return "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f'{where} = {_shown(part)} is invalid: give {{"type": "text", "text": ...}}')
    if kind != "text":
        raise ValueError(f'{where}.type = {kind!r} is not available in this release: use parts of type "text"')
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where}.text = {_shown(part.get('text'))} is invalid: give a str")
    return str(part["text"])


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """The calls with objects for arguments: OpenAI's API has them as JSON text, and templates write them as JSON."""
    if not _is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f'{where} = {_shown(calls)} is invalid: give a list of dicts with a "function"')
    return [_tool_call(f"{where}[{i}].function", dict(call)) for i, call in enumerate(calls)]


def _tool_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}.arguments = {_shown(text)} is no JSON ({error}): give an object") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """JSON schemas; None where there are none, as templates expect it."""
    if tools is not None and not _is_list(tools):
        raise ValueError(f"tools = {_shown(tools)} is invalid: give a list of JSON schemas or functions")
    return [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ())] or None


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not inspect.isfunction(tool) and not inspect.ismethod(tool):
        raise ValueError(f"{where} = {_shown(tool)} is invalid: give a JSON schema or a function")
    from transformers.utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # it reads type hints and a docstring, and has an error of its own for each fault
        raise ValueError(
            f"{where} = {tool.__name__} cannot be described ({error}): give every argument a type hint and a line in "
            "the docstring's Args, or give a JSON schema"
        ) from error
    return schema


def _documents(documents: Any) -> list[dict[str, Any]] | None:
    if documents is None:
        return None
    if not _is_list(documents) or not all(isinstance(document, Mapping) for document in documents):
        raise ValueError(f'documents = {_shown(documents)} is invalid: give a list of dicts with "title" and "text"')
    return [dict(document) for document in documents]


def _variables(tokenizer: Tokenizer, given: Any) -> dict[str, Any]:
    """What a template's own variables are set to; none may take the place of another argument."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"chat_template_kwargs = {_shown(given)} is invalid: give a dict of the template's variables")
    reserved = _RESERVED | inspect.signature(tokenizer.hf.apply_chat_template).parameters.keys()
    if taken := sorted(reserved & given.keys()):
        raise ValueError(
            f"chat_template_kwargs holds {', '.join(taken)}, which is no variable of a template: leave it out, or use "
            "the argument of chat with that name"
        )
    return dict(given)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shown(value: Any) -> str:
    return reprlib.repr(value)
