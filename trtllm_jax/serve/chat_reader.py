"""What a model's text says: reasoning, content, calls of tools."""

from collections.abc import Sequence
from typing import Any

from trtllm_jax.serve.errors import bad
from trtllm_jax.serve.protocol_chat import ChatRequest
from trtllm_jax.serve.server import Server

Delta = dict[str, Any]


class Reading:
    """How one request's answers are read. ApiError where the server cannot do what it asks for."""

    keeps_special_tokens = False

    def __init__(self, server: Server, body: ChatRequest) -> None:
        if body.tool_choice not in (None, "none", "auto") and not server.settings.tool_parser:
            raise bad(
                "tool_choice", "tool_choice needs a server that reads this model's calls: start it with tool_parser"
            )

    def guidance(self) -> Any:
        """What forces the calls that must come; None where nothing is forced."""
        return None

    def start(self) -> "Reader":
        """For one more answer."""
        return Reader()


class Reader:
    """One answer's text as deltas of a message.

    Attributes:
        plain: whether all text is content.
        called: whether the model called a tool.
    """

    plain = True
    called = False

    def feed(self, text: str) -> list[Delta]:
        """What more text says."""
        return [{"content": text}] if text else []

    def finish(self) -> list[Delta]:
        """What was held back."""
        return []


def merged_message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message that a stream's deltas add up to."""
    content = "".join(delta.get("content") or "" for delta in deltas)
    return {"role": "assistant", "content": content}
