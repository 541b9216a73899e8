"""A short run of schemathesis; `make fuzz-api` is the long one. And it can fail."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from . import api
from .server import Server


@pytest.mark.slow
def test_a_short_run_finds_nothing(server: Server) -> None:
    cases, report = api.fuzz(f"http://{server.host}:{server.port}", 2, seed=1)
    assert cases >= 300, report
    assert "Traceback" not in server.log.read_text()


class _Liar(BaseHTTPRequestHandler):
    """A server whose document promises a number where it gives words."""

    def do_GET(self) -> None:
        answer = {"content": {"application/json": {"schema": {"type": "integer"}}}, "description": "A number."}
        document = {
            "openapi": "3.1.0",
            "info": {"title": "t", "version": "0"},
            "paths": {"/number": {"get": {"responses": {"200": answer}}}},
        }
        body = json.dumps(document if self.path == "/openapi.json" else "one").encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Liar) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_a_server_that_breaks_its_document_is_found(liar: str) -> None:
    with pytest.raises(RuntimeError, match=r"not of type|violates schema"):
        api.fuzz(liar, 2, seed=1)
