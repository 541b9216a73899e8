"""The responses that a server remembers, so that later ones can go on from them."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from trtllm_jax.serve.http.errors import ApiError, bad


@dataclass(frozen=True)
class Stored:
    """A response, all items of its conversation with it, and whose it is."""

    owner: str
    response: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """In memory, the oldest out first.

    Args:
        most: responses, 0 to remember none.
        most_bytes: of them together, as JSON.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.remembers = most > 0
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._stored: OrderedDict[str, tuple[Stored, int]] = OrderedDict()

    def put(self, stored: Stored) -> None:
        """Remember one, unless it is too large by itself."""
        size = len(msgspec.json.encode([stored.response, stored.items]))
        if size > self._most_bytes:
            return
        self._stored[stored.response["id"]] = stored, size
        self._bytes += size
        while len(self._stored) > self._most or self._bytes > self._most_bytes:
            _, (_, gone) = self._stored.popitem(last=False)
            self._bytes -= gone

    def get(self, number: str, owner: str, param: str | None = None) -> Stored:
        """ApiError where there is none of this id, or it is somebody else's."""
        self._check()
        found, _ = self._stored.get(number, (None, 0))
        if found is None or found.owner != owner:
            raise ApiError(
                404,
                f"there is no response {number[:80]!r}: it was never stored, is deleted, or made room for later ones",
                param=param,
                code="not_found",
            )
        return found

    def delete(self, number: str, owner: str) -> None:
        """Forget one. ApiError as `get` has it."""
        self.get(number, owner)
        self._bytes -= self._stored.pop(number)[1]

    def _check(self) -> None:
        if not self.remembers:
            raise bad(
                "previous_response_id",
                "this server stores no responses, because several processes answer: send the conversation in input, or "
                "have it started with num_serve_frontends = 1",
            )
