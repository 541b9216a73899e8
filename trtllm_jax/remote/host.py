"""`EngineHost`: runs the sequences of other processes in this process's engine."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.remote.admission import Admission
from trtllm_jax.remote.host_connection import HostConnection


class EngineHost:
    """Serves an `LLM` to other processes, each with its own connected socket.

    When a connection ends for any reason, its sequences are cancelled.

    Args:
        llm: the LLM; this process may use it as well.
        max_queue_size: most sequences that may wait, besides those that run; more are refused with EngineBusyError.
    """

    def __init__(self, llm: BaseLLM, max_queue_size: int) -> None:
        self._llm = llm
        self._admission = Admission(llm.facts.max_batch_size + max_queue_size)
        self._lock = threading.Lock()
        self._connections: set[HostConnection] = set()
        # Grammars compile in these threads, so that requests without one do not wait.
        self._compilers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="trtllm_jax-constraints")

    def connect(self, connected: socket.socket) -> None:
        """Serve this socket in new threads until it is closed."""
        connection = HostConnection(self._llm, self._admission, self._compilers, connected, self._remove)
        with self._lock:
            self._connections.add(connection)
        connection.start()

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended."""
        return self._admission.unfinished

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _remove(self, connection: HostConnection) -> None:
        """Drop a connection that has ended."""
        with self._lock:
            self._connections.discard(connection)
