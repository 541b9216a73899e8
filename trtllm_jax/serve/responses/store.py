"""`ResponseStore`: the responses that a server keeps, so that later ones can continue them."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from trtllm_jax.serve.http.errors import ApiError, bad_request


@dataclass(frozen=True)
class StoredResponse:
    """A response, the items of its conversation, and the digest of the key that it belongs to."""

    owner: str
    response: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """Responses in memory, of which the oldest are dropped first.

    Args:
        max_responses: how many are kept, 0 for none.
        max_bytes: their size together, as JSON.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.enabled = max_responses > 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._bytes = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def put(self, stored: StoredResponse) -> None:
        """Store a response, unless it is too large by itself."""
        size = len(msgspec.json.encode([stored.response, stored.items]))
        if size > self._max_bytes:
            return
        self._stored[stored.response["id"]] = stored, size
        self._bytes += size
        while len(self._stored) > self._max_responses or self._bytes > self._max_bytes:
            _, (_, freed) = self._stored.popitem(last=False)
            self._bytes -= freed

    def get(self, response_id: str, owner: str, param: str | None = None) -> StoredResponse:
        """The response of this id; ApiError where there is none, or it belongs to another key."""
        self._check_enabled()
        found, _ = self._stored.get(response_id, (None, 0))
        if found is None or found.owner != owner:
            raise ApiError(
                404,
                f"there is no response {response_id[:80]!r}: it was never stored, is deleted, or made room for "
                "later ones",
                param=param,
                code="not_found",
            )
        return found

    def delete(self, response_id: str, owner: str) -> None:
        """Drop a response; ApiError as for `get`."""
        self.get(response_id, owner)
        self._bytes -= self._stored.pop(response_id)[1]

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise bad_request(
                "previous_response_id",
                "this server stores no responses, because several processes answer: send the conversation in input, or "
                "have it started with num_serve_frontends = 1",
            )
