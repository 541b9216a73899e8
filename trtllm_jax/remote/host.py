"""`EngineHost`: the engine's side, which runs the sequences of other processes."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from trtllm_jax.common.errors import EngineBusyError, RequestError
from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.remote.host_connection import HostConnection


class EngineHost:
    """An `LLM` for other processes, one connected socket each.

    A connection that ends, however it ended, has its sequences ended at once.

    Args:
        llm: generates; it may be used here as well.
        max_queue_size: sequences that may wait besides those that run; further ones are refused as busy.
    """

    def __init__(self, llm: BaseLLM, max_queue_size: int) -> None:
        self.llm = llm
        self.max_sequences = llm.facts.max_batch_size + max_queue_size
        self._lock = threading.Lock()
        self._unfinished = 0
        self._connections: set[HostConnection] = set()
        # A constraint takes a while to compile, and requests without one do not wait for it.
        self.compilers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="trtllm_jax-constraints")

    def connect(self, connected: socket.socket) -> None:
        """Serve this socket in threads of its own until it is closed."""
        connection = HostConnection(self, connected)
        with self._lock:
            self._connections.add(connection)
        connection.start()

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended."""
        return self._unfinished

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()
        self.compilers.shutdown(wait=False, cancel_futures=True)

    def reserve(self, count: int) -> None:
        """Make room for `count` sequences. EngineBusyError where there is none, RequestError where there never is."""
        if count > self.max_sequences:
            raise RequestError(
                f"{count} sequences are asked for at once, and at most {self.max_sequences} may run and wait"
            )
        with self._lock:
            if self._unfinished + count > self.max_sequences:
                raise EngineBusyError(
                    f"{self._unfinished} sequences run or wait, and at most {self.max_sequences} may: try again later"
                )
            self._unfinished += count

    def release(self, count: int) -> None:
        """Give back the room of `count` sequences."""
        with self._lock:
            self._unfinished -= count

    def remove(self, connection: HostConnection) -> None:
        """Drop a connection that has ended."""
        with self._lock:
            self._connections.discard(connection)
