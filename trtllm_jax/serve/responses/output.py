"""`OutputItems`: an answer as the items of /v1/responses, and the events of their growth."""

import uuid
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]

_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputItems:
    """One answer's items, from the deltas of a `chat.parser.MessageParser`.

    Attributes:
        all: the items so far, in order.
        reasoning: the text of all reasoning items.
    """

    def __init__(self, *, streamed: bool) -> None:
        self.all: list[dict[str, Any]] = []
        self.reasoning = ""
        self._streamed = streamed
        self._open: dict[str, Any] | None = None

    def feed(self, deltas: Sequence[dict[str, Any]], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The events of a step's deltas; its log-probabilities go with the message, if one is open after them."""
        events: list[Event] = []
        for delta in deltas:
            if "broken" in delta:
                events += self._break_call()
            if reasoning := delta.get("reasoning_content"):
                self.reasoning += reasoning
                events += self._append_text("reasoning", reasoning)
            if content := delta.get("content"):
                events += self._append_text("message", content)
            for part in delta.get("tool_calls", ()):
                events += self._call(part)
        if logprobs and self._open is not None and self._open["type"] == "message":
            self._open["content"][0]["logprobs"] += logprobs
            text_deltas = [event for event in events if event["type"] == "response.output_text.delta"]
            if text_deltas:
                text_deltas[-1]["logprobs"] = list(logprobs)
        return events

    def finish(self, *, complete: bool) -> list[Event]:
        """The events of the end; an answer without any item is an empty message."""
        events = [] if self.all else self.start_message()
        return events + self._finish_item("completed" if complete else "incomplete")

    def start_message(self) -> list[Event]:
        """The events of a new message, for a model whose text is nothing else."""
        return self._start_item("message")

    def _append_text(self, kind: str, text: str) -> list[Event]:
        events = [] if self._open is not None and self._open["type"] == kind else self._start_item(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        if kind == "reasoning":
            return [*events, self._event("response.reasoning_text.delta", content_index=0, delta=text)]
        return [*events, self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])]

    def _call(self, part: dict[str, Any]) -> list[Event]:
        function = part["function"]
        events = self._start_item("function_call", call_id=part["id"], name=function["name"]) if "id" in part else []
        assert self._open is not None
        if function["arguments"]:
            self._open["arguments"] += function["arguments"]
            events.append(self._event("response.function_call_arguments.delta", delta=function["arguments"]))
        return events

    def _break_call(self) -> list[Event]:
        """End the open call, which is broken: a stream cannot take it back, and a whole answer leaves it out."""
        if self._streamed:
            return self._finish_item("incomplete")
        self.all.pop()
        self._open = None
        return []

    def _start_item(self, kind: str, **more: str) -> list[Event]:
        events = self._finish_item("completed")
        part: dict[str, Any] | None = None
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        match kind:
            case "message":
                item |= {"role": "assistant", "content": []}
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            case "reasoning":
                item |= {"summary": [], "content": []}
                part = {"type": "reasoning_text", "text": ""}
            case _:
                item |= {**more, "arguments": ""}
        self.all.append(item)
        self._open = item
        events.append(self._event("response.output_item.added", item=_copy_item(item)))
        if part is not None:
            item["content"].append(part)
            events.append(self._event("response.content_part.added", content_index=0, part=dict(part)))
        return events

    def _finish_item(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "function_call":
            events = [
                self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
            ]
        else:
            (part,) = item["content"]
            fields = {name: part[name] for name in ("text", "logprobs") if name in part}
            events = [
                self._event(f"response.{part['type']}.done", content_index=0, **fields),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        events.append(self._event("response.output_item.done", item=_copy_item(item)))
        self._open = None
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        item = self.all[-1]
        index: dict[str, Any] = {"output_index": len(self.all) - 1}
        return {"type": kind, **index, **({} if "item" in fields else {"item_id": item["id"]}), **fields}


def _copy_item(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, **({"content": list(item["content"])} if "content" in item else {})}
