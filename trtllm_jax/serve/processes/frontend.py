"""A frontend process: HTTP and text, over an engine in another process. `serve.frontends` starts it.

    python -m trtllm_jax.serve.processes.frontend ENGINE LISTENING < configuration

ENGINE and LISTENING are inherited sockets' file descriptors; the configuration is JSON: what
`ServerOptions` and `LLM` take. It writes
one line to its standard output when it answers requests. SIGTERM lets the requests end that it has; so does the end of
the engine, which ends them at once.
"""

import asyncio
import gc
import json
import socket
import ssl
import sys
from typing import Any

import uvicorn
import uvloop

from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.logger import logger
from trtllm_jax.remote.llm import RemoteLLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.config import ServerOptions
from trtllm_jax.serve.http.connection import LimitedHttpProtocol, connection_limit

KEEP_ALIVE = 30
"""Seconds that a connection without a request stays open."""
COLLECT_EVERY = 20_000
"""New objects between two collections, as TensorRT-LLM has it: Python's own number is for smaller programs."""
LOOK_AGAIN = 0.2
"""Seconds between two looks at the engine."""


def main() -> int:
    """Serve until told to stop: 0 then, 1 where the engine is gone."""
    engine, listening = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    told = json.loads(sys.stdin.buffer.read())
    options = ServerOptions(**told["server"])
    LimitedHttpProtocol.max_connections = connection_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        llm = RemoteLLM(engine, parse_llm_args(**told["llm"]), runner.get_loop())
        server = _Server(_uvicorn(create_app(llm, options.settings), options), llm)
        # What is there now stays: a collection need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_EVERY)
        runner.run(server.serve_until_done(listening))
        llm.shutdown()
    return 1 if server.engine_is_gone else 0


def _uvicorn(app: Any, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who asks
        http=LimitedHttpProtocol,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(options.drain_timeout)),
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
    )


class _Server(uvicorn.Server):
    """uvicorn, which also ends with the engine."""

    def __init__(self, config: uvicorn.Config, llm: RemoteLLM) -> None:
        super().__init__(config)
        self._llm = llm
        self.engine_is_gone = False

    async def serve_until_done(self, listening: socket.socket) -> None:
        watching = asyncio.create_task(self._watch())
        await self.serve(sockets=[listening])
        watching.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it; then whoever started this process is told."""
        await super().startup(sockets)
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    async def _watch(self) -> None:
        while self._llm.failure is None:
            await asyncio.sleep(LOOK_AGAIN)
        self.engine_is_gone = True
        logger.error("this frontend ends: %s", self._llm.failure)
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
