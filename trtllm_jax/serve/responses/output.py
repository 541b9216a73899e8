"""An answer as the items of /v1/responses, and the events that tell a stream's reader how they grow."""

import uuid
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]

_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class Items:
    """One answer's items, from the deltas of a `chat_reader.Reader`.

    Attributes:
        all: the items so far, in order.
        thought: all that was reasoning.
    """

    def __init__(self, *, streamed: bool) -> None:
        self.all: list[dict[str, Any]] = []
        self.thought = ""
        self._streamed = streamed
        self._open: dict[str, Any] | None = None

    def feed(self, deltas: Sequence[dict[str, Any]], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The events of what a step added; its log-probabilities go with the message, if one is open after it."""
        events: list[Event] = []
        for delta in deltas:
            if "broken" in delta:
                events += self._break_off()
            if thought := delta.get("reasoning_content"):
                self.thought += thought
                events += self._write("reasoning", thought)
            if content := delta.get("content"):
                events += self._write("message", content)
            for part in delta.get("tool_calls", ()):
                events += self._call(part)
        if logprobs and self._open is not None and self._open["type"] == "message":
            self._open["content"][0]["logprobs"] += logprobs
            written = [event for event in events if event["type"] == "response.output_text.delta"]
            if written:
                written[-1]["logprobs"] = list(logprobs)
        return events

    def finish(self, *, complete: bool) -> list[Event]:
        """The end; an answer without anything is an empty message."""
        events = [] if self.all else self.begin_message()
        return events + self._close("completed" if complete else "incomplete")

    def begin_message(self) -> list[Event]:
        """The message that all text goes to, for a model whose text is nothing else."""
        return self._begin("message")

    def _write(self, kind: str, text: str) -> list[Event]:
        events = [] if self._open is not None and self._open["type"] == kind else self._begin(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        if kind == "reasoning":
            return [*events, self._event("response.reasoning_text.delta", content_index=0, delta=text)]
        return [*events, self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])]

    def _call(self, part: dict[str, Any]) -> list[Event]:
        function = part["function"]
        events = self._begin("function_call", call_id=part["id"], name=function["name"]) if "id" in part else []
        assert self._open is not None
        if function["arguments"]:
            self._open["arguments"] += function["arguments"]
            events.append(self._event("response.function_call_arguments.delta", delta=function["arguments"]))
        return events

    def _break_off(self) -> list[Event]:
        """The open call was none. A stream cannot take it back; a whole answer does not show it."""
        if self._streamed:
            return self._close("incomplete")
        self.all.pop()
        self._open = None
        return []

    def _begin(self, kind: str, **more: str) -> list[Event]:
        events = self._close("completed")
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
        events.append(self._event("response.output_item.added", item=_copied(item)))
        if part is not None:
            item["content"].append(part)
            events.append(self._event("response.content_part.added", content_index=0, part=dict(part)))
        return events

    def _close(self, status: str) -> list[Event]:
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
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            events = [
                self._event(f"response.{part['type']}.done", content_index=0, **told),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        events.append(self._event("response.output_item.done", item=_copied(item)))
        self._open = None
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        item = self.all[-1]
        place: dict[str, Any] = {"output_index": len(self.all) - 1}
        return {"type": kind, **place, **({} if "item" in fields else {"item_id": item["id"]}), **fields}


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, **({"content": list(item["content"])} if "content" in item else {})}
