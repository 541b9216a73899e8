"""JSON answers, encoded by msgspec."""

from typing import Any

import msgspec
from starlette.responses import Response

as_json = msgspec.json.Encoder().encode


def json_response(value: Any) -> Response:
    """A whole answer of JSON."""
    return Response(as_json(value), media_type="application/json")
