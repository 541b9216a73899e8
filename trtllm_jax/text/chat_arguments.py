"""The arguments of a chat besides its messages, validated: tools, documents and the template's variables."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from checkpoints.error_text import short_repr
from trtllm_jax.text.chat_messages import is_list

_RESERVED = {"self", "messages", "conversations"}
"""Names that a template's variables cannot have, besides the arguments of `apply_chat_template`."""


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools as JSON schemas; None, as templates expect it, where there are none."""
    if tools is not None and not is_list(tools):
        raise ValueError(f"tools = {short_repr(tools)} is invalid: give a list of JSON schemas or functions")
    return [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools or ())] or None


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not inspect.isfunction(tool) and not inspect.ismethod(tool):
        raise ValueError(f"{where} = {short_repr(tool)} is invalid: give a JSON schema or a function")
    from transformers.utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # it reads type hints and a docstring, and has an error of its own for each fault
        raise ValueError(
            f"{where} = {tool.__name__} cannot be described ({error}): give every argument a type hint and a line in "
            "the docstring's Args, or give a JSON schema"
        ) from error
    return schema


def read_documents(documents: Any) -> list[dict[str, Any]] | None:
    """The documents as dicts; None where there are none."""
    if documents is None:
        return None
    if not is_list(documents) or not all(isinstance(document, Mapping) for document in documents):
        raise ValueError(
            f'documents = {short_repr(documents)} is invalid: give a list of dicts with "title" and "text"'
        )
    return [dict(document) for document in documents]


def read_variables(apply_chat_template: Callable[..., Any], given: Any) -> dict[str, Any]:
    """The values of a template's own variables, none of which may replace an argument of ``apply_chat_template``."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"chat_template_kwargs = {short_repr(given)} is invalid: give a dict of the template's variables"
        )
    reserved = _RESERVED | inspect.signature(apply_chat_template).parameters.keys()
    if taken := sorted(reserved & given.keys()):
        raise ValueError(
            f"chat_template_kwargs holds {', '.join(taken)}, which is no variable of a template: leave it out, or use "
            "the argument of chat with that name"
        )
    return dict(given)
