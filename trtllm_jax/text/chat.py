"""Conversations become prompts: messages are validated and rendered with the model's chat template."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from checkpoints.error_text import short_repr
from trtllm_jax.text.chat_arguments import read_documents, read_tools, read_variables
from trtllm_jax.text.chat_formatting import format_messages
from trtllm_jax.text.chat_messages import is_list, read_messages
from trtllm_jax.text.template_format import TemplateTraits, inspect_template
from trtllm_jax.text.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
"""Messages from the first to the last, each with a role and a content."""

Tool = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema as OpenAI's API has it, or a function whose type hints and docstring make one."""

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
"""The names in transformers of the template for any conversation, and of the one for conversations with tools."""


@dataclass(frozen=True)
class Chat:
    """Renders conversations as prompts.

    Attributes:
        tokenizer: None if the model has none, in which case every conversation is refused.
        template: a Jinja template that replaces those of the tokenizer, which may have several with names.
        allow_request_template: whether a call may give a template of its own.
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

        The arguments are those of `LLM.chat`. Only the template adds special tokens. ValueError names the argument, its
        value and the remedy, also if the template itself raises.
        """
        tokenizer = self._require_tokenizer()
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message = True and add_generation_prompt = True exclude each other: the first goes on "
                "with the last message, the second begins a new one; set one of them to False"
            )
        given_tools = read_tools(tools)
        options: dict[str, Any] = {
            "tools": given_tools,
            "documents": read_documents(documents),
            "chat_template": self._requested_template(chat_template, given_tools is not None),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **read_variables(tokenizer.hf.apply_chat_template, chat_template_kwargs),
        }
        if not is_list(messages) or not messages:
            raise ValueError(
                f"messages = {short_repr(messages)} is invalid: give a list of messages, or a list of such"
            )
        if isinstance(messages[0], Mapping):
            return _prompt(tokenizer, "messages", messages, options)
        return [_prompt(tokenizer, f"messages[{i}]", each, options) for i, each in enumerate(messages)]

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "chat needs a tokenizer, and the model was loaded with skip_tokenizer_init=True: load it without, or "
                "give generate token ids"
            )
        return self.tokenizer

    @property
    def template_for_tools(self) -> str | None:
        """The template for conversations with tools; None if there is none."""
        named = self._templates()
        return named.get(_WITH_TOOLS) or named.get(_DEFAULT)

    def turn_ends(self, stated: Collection[int]) -> frozenset[int]:
        """The end-of-turn ids: those that the templates write directly after an assistant's text.

        A template that ends turns with one of the ids ``stated`` elsewhere adds none, since it may write other tokens
        before that id.
        """
        if self.tokenizer is None:
            return frozenset()
        tokens = self.tokenizer.added_tokens
        known = [token for i, token in tokens.items() if token and i in stated]
        found = set[int]()
        for template in self._templates().values():
            traits = _traits(self.tokenizer, template)
            end = traits.turn_end.lstrip()
            first = [i for i, token in tokens.items() if token and end.startswith(token)]
            if first and not any(token in traits.next_turn for token in known):
                found.add(max(first, key=lambda i: len(tokens[i])))
        return frozenset(found)

    def _templates(self) -> Mapping[str, str]:
        """The templates by name."""
        own = self.template or (self.tokenizer and self.tokenizer.hf.chat_template)
        named = own if isinstance(own, Mapping) else {_DEFAULT: own}
        return {name: text for name, text in named.items() if text and isinstance(text, str)}

    def _requested_template(self, requested: Any, with_tools: bool) -> str:
        """The template that a call gives as a name or a text; if it gives none, the default for its conversation."""
        named = self._templates()
        if requested is None:
            return self._default_template(named, with_tools)
        if isinstance(requested, str) and requested in named:
            return named[requested]
        if not self.allow_request_template:
            raise ValueError(
                f"chat_template = {short_repr(requested)} is refused, for a template is a program: give it to "
                "LLM(..., chat_template=...), or allow every call its own with "
                f"LLM(..., allow_request_chat_template=True){_or_a_name(named)}"
            )
        if not isinstance(requested, str) or not requested:
            raise ValueError(
                f"chat_template = {short_repr(requested)} is invalid: give a Jinja text{_or_a_name(named)}"
            )
        return requested

    @staticmethod
    def _default_template(named: Mapping[str, str], with_tools: bool) -> str:
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
    """The template that `LLM(chat_template=...)` gives as a text or as a file's name. ValueError if it is neither."""
    if given is None:
        return None
    text = str(given)
    if isinstance(given, Path) or not any(character in text for character in "{}\n"):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"LLM.chat_template = {short_repr(str(given))} is neither a Jinja text nor a file that can be read "
                f"({error}): give one of them"
            ) from error
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it
    except TemplateError as error:
        raise ValueError(f"LLM.chat_template = {short_repr(text)} is no Jinja template: {error}; correct it") from error
    return text


def _traits(tokenizer: Tokenizer, template: str) -> TemplateTraits:
    """The traits of a Jinja template whose variables include the tokenizer's special tokens."""
    tokens = tokenizer.hf.special_tokens_map.items()
    return inspect_template(
        template, tuple((name, str(token)) for name, token in tokens if not isinstance(token, list))
    )


def _prompt(tokenizer: Tokenizer, where: str, conversation: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    if not is_list(conversation) or not conversation:
        raise ValueError(f"{where} = {short_repr(conversation)} is invalid: give a list with at least one message")
    message_format = _traits(tokenizer, options["chat_template"]).format
    messages = format_messages(read_messages(where, conversation), message_format)
    try:
        text: str = tokenizer.hf.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"{where}: the chat template cannot write this conversation: {error}") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"{where}: the chat template makes no text of this conversation; give another template")
    return {"prompt": text, "prompt_token_ids": ids}
