"""Conversations become prompts: messages are checked, and the model's chat template writes them as text."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from trtllm_jax.text.chat_messages import in_shape, is_list, read_messages, shown
from trtllm_jax.text.template_shape import TemplateFacts, facts_of
from trtllm_jax.text.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
"""Messages from the first to the last, each with a role and a content."""

Tool = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema as OpenAI's API has it, or a function whose type hints and docstring make one."""

_RESERVED = {"self", "messages", "conversations"}
"""Names that a template's variables cannot have, besides the arguments of `apply_chat_template`."""

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
"""The names, as transformers knows them, of the templates for any conversation and for one with tools."""


@dataclass(frozen=True)
class Chat:
    """What turns conversations into prompts.

    Attributes:
        tokenizer: None where there is none; then every conversation is refused.
        template: the Jinja text to use in place of the tokenizer's own, of which there may be several with names.
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
        given_tools = _tools(tools)
        how: dict[str, Any] = {
            "tools": given_tools,
            "documents": _documents(documents),
            "chat_template": self._requested(chat_template, given_tools is not None),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **_variables(tokenizer, chat_template_kwargs),
        }
        if not is_list(messages) or not messages:
            raise ValueError(f"messages = {shown(messages)} is invalid: give a list of messages, or a list of such")
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

    @property
    def template_for_tools(self) -> str | None:
        """The Jinja text that writes conversations with tools; None where there is none."""
        named = self._templates()
        return named.get(_WITH_TOOLS) or named.get(_DEFAULT)

    def turn_ends(self, stated: Collection[int]) -> frozenset[int]:
        """The ids that the templates write right after an assistant's text, which end its turn.

        None of a template that ends turns with one of the ids ``stated`` elsewhere: it may write others before.
        """
        if self.tokenizer is None:
            return frozenset()
        tokens = self.tokenizer.added_tokens
        known = [token for i, token in tokens.items() if token and i in stated]
        found = set[int]()
        for template in self._templates().values():
            facts = _facts(self.tokenizer, template)
            end = facts.turn_end.lstrip()
            first = [i for i, token in tokens.items() if token and end.startswith(token)]
            if first and not any(token in facts.next_turn for token in known):
                found.add(max(first, key=lambda i: len(tokens[i])))
        return frozenset(found)

    def _templates(self) -> Mapping[str, str]:
        """Those that conversations are written with, by name."""
        own = self.template or (self.tokenizer and self.tokenizer.hf.chat_template)
        named = own if isinstance(own, Mapping) else {_DEFAULT: own}
        return {name: text for name, text in named.items() if text and isinstance(text, str)}

    def _requested(self, requested: Any, with_tools: bool) -> str:
        """The Jinja text that a call asks for, by name or as a text; the one for its conversation where it does not."""
        named = self._templates()
        if requested is None:
            return self._usual(named, with_tools)
        if isinstance(requested, str) and requested in named:
            return named[requested]
        if not self.allow_request_template:
            raise ValueError(
                f"chat_template = {shown(requested)} is refused, for a template is a program: give it to "
                "LLM(..., chat_template=...), or allow every call its own with "
                f"LLM(..., allow_request_chat_template=True){_or_a_name(named)}"
            )
        if not isinstance(requested, str) or not requested:
            raise ValueError(f"chat_template = {shown(requested)} is invalid: give a Jinja text{_or_a_name(named)}")
        return requested

    @staticmethod
    def _usual(named: Mapping[str, str], with_tools: bool) -> str:
        if with_tools and _WITH_TOOLS in named:
            return named[_WITH_TOOLS]
        if _DEFAULT in named:
            return named[_DEFAULT]
        if named:
            raise ValueError(
                f"chat_template is missing, and of the model's ({', '.join(sorted(named))}) none is the default: give "
                "one of these names"
            )
        raise ValueError(
            "chat_template: the model's tokenizer has none; give LLM(..., chat_template=...) a file or a Jinja text, "
            "or give generate a prompt"
        )


def _or_a_name(named: Mapping[str, str]) -> str:
    return f", or give the name of one of the model's: {', '.join(sorted(named))}" if named.keys() - {_DEFAULT} else ""


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
                f"LLM.chat_template = {shown(str(given))} is neither a Jinja text nor a file that can be read "
                f"({error}): give one of them"
            ) from error
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it
    except TemplateError as error:
        raise ValueError(f"LLM.chat_template = {shown(text)} is no Jinja template: {error}; correct it") from error
    return text


def _facts(tokenizer: Tokenizer, template: str) -> TemplateFacts:
    """What is known of a Jinja text, with the tokenizer's special tokens as its variables."""
    tokens = tokenizer.hf.special_tokens_map.items()
    return facts_of(template, tuple((name, str(token)) for name, token in tokens if not isinstance(token, list)))


def _prompt(tokenizer: Tokenizer, where: str, conversation: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    if not is_list(conversation) or not conversation:
        raise ValueError(f"{where} = {shown(conversation)} is invalid: give a list with at least one message")
    shape = _facts(tokenizer, how["chat_template"]).shape
    messages = in_shape(read_messages(where, conversation), shape)
    try:
        text: str = tokenizer.hf.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"{where}: the chat template cannot write this conversation: {error}") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"{where}: the chat template makes no text of this conversation; give another template")
    return {"prompt": text, "prompt_token_ids": ids}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """JSON schemas; None where there are none, as templates expect it."""
    if tools is not None and not is_list(tools):
        raise ValueError(f"tools = {shown(tools)} is invalid: give a list of JSON schemas or functions")
    return [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ())] or None


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not inspect.isfunction(tool) and not inspect.ismethod(tool):
        raise ValueError(f"{where} = {shown(tool)} is invalid: give a JSON schema or a function")
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
    if not is_list(documents) or not all(isinstance(document, Mapping) for document in documents):
        raise ValueError(f'documents = {shown(documents)} is invalid: give a list of dicts with "title" and "text"')
    return [dict(document) for document in documents]


def _variables(tokenizer: Tokenizer, given: Any) -> dict[str, Any]:
    """What a template's own variables are set to; none may take the place of another argument."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"chat_template_kwargs = {shown(given)} is invalid: give a dict of the template's variables")
    reserved = _RESERVED | inspect.signature(tokenizer.hf.apply_chat_template).parameters.keys()
    if taken := sorted(reserved & given.keys()):
        raise ValueError(
            f"chat_template_kwargs holds {', '.join(taken)}, which is no variable of a template: leave it out, or use "
            "the argument of chat with that name"
        )
    return dict(given)
