"""A frontend process: HTTP and text, over an engine in another process. `Frontends` starts it.

    python -m trtllm_jax.serve.processes.frontend ENGINE LISTENING < configuration

ENGINE and LISTENING are file descriptors of inherited sockets; the configuration is a JSON object of the arguments of
`ServerOptions` and of `LLM`. The process writes one line to its standard output when it answers requests. SIGTERM lets
its requests end; the end of the engine ends them at once.
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
"""Seconds that an idle connection stays open."""
GC_THRESHOLD = 20_000
"""Objects between two garbage collections, as in TensorRT-LLM; Python's default suits smaller programs."""
POLL_INTERVAL = 0.2
"""Seconds between two checks of the engine."""


def main() -> int:
    """Serve until SIGTERM, and return the exit code: 1 where the engine is gone, else 0."""
    engine, listening = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    configuration = json.loads(sys.stdin.buffer.read())
    options = ServerOptions(**configuration["server"])
    LimitedHttpProtocol.max_connections = connection_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        llm = RemoteLLM(engine, parse_llm_args(**configuration["llm"]), runner.get_loop())
        server = _Server(_uvicorn(create_app(llm, options.settings), options), llm)
        # Objects that exist now stay, so that collections need not visit them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
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
    """uvicorn's server, which also ends with the engine."""

    def __init__(self, config: uvicorn.Config, llm: RemoteLLM) -> None:
        super().__init__(config)
        self._llm = llm
        self.engine_is_gone = False

    async def serve_until_done(self, listening: socket.socket) -> None:
        watching = asyncio.create_task(self._watch_engine())
        await self.serve(sockets=[listening])
        watching.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then report to the parent process."""
        await super().startup(sockets)
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    async def _watch_engine(self) -> None:
        while self._llm.failure is None:
            await asyncio.sleep(POLL_INTERVAL)
        self.engine_is_gone = True
        logger.error("this frontend ends: %s", self._llm.failure)
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
