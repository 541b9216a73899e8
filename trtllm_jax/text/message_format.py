"""The form in which a chat template reads messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

EmptyContent = Literal["empty", "null", "absent"]
"""The content of a message that has tool calls and no text: an empty text, null, or no such field."""


class Content(Enum):
    """The form in which a template reads a message's content."""

    TEXT = "a text"
    PARTS = "a list of text parts"
    ONE_PART = "a list of one text part"
    EITHER = "a text or a list of text parts"

    def encode(self, content: str | Sequence[str]) -> str | list[dict[str, str]]:
        """The content, one text or several, in this form; several texts become the lines of one where needed."""
        joined = content if isinstance(content, str) else "\n".join(content)
        if self is Content.TEXT or (self is Content.EITHER and (isinstance(content, str) or not content)):
            return joined
        if self is Content.ONE_PART or isinstance(content, str) or not content:
            return [text_part(joined)]
        return [text_part(text) for text in content]


@dataclass(frozen=True)
class MessageFormat:
    """What a template expects where OpenAI's API allows one form only, or leaves the form open.

    Attributes:
        content: the form of the content by role; roles that are not listed have that of "user".
        empty_content: the content of a message that has tool calls and no text.
        arguments_as_json: whether the arguments of a tool call are JSON text, and not an object.
        short_call_ids: whether the ids of tool calls must be nine letters and digits, as Mistral's are.
        tool_result_role: the role of the messages that have the results of tool calls.
        tool_result_names: whether the result of a tool call names the function.
        split_text_and_calls: whether text and tool calls must be in separate messages.
        single_call: whether a message may have one tool call only.
        system: whether "many" system messages are read, "one" at the start, or "none".
        alternating_roles: whether two messages of the same role may not follow each other.
    """

    content: Mapping[str, Content] = field(default_factory=dict)
    empty_content: EmptyContent = "empty"
    arguments_as_json: bool = False
    short_call_ids: bool = False
    tool_result_role: Literal["tool", "user"] = "tool"
    tool_result_names: bool = False
    split_text_and_calls: bool = False
    single_call: bool = False
    system: Literal["many", "one", "none"] = "many"
    alternating_roles: bool = False

    def message(self, role: str, content: str | Sequence[str], **fields: Any) -> dict[str, Any]:
        """A message whose content has the form that the template reads for its role."""
        if not content and fields.get("tool_calls") and self.empty_content != "empty":
            return {"role": role, **({"content": None} if self.empty_content == "null" else {}), **fields}
        form = self.content.get(role) or self.content.get("user", Content.TEXT)
        return {"role": role, "content": form.encode(content), **fields}


def text_part(text: str) -> dict[str, str]:
    """A text part of a message's content, as OpenAI's API has it."""
    return {"type": "text", "text": text}
