"""How many sequences of other processes an engine takes at once, running and waiting."""

import threading

from trtllm_jax.common.errors import EngineBusyError, RequestError


class Admission:
    """Room for `max_sequences` sequences; may be used from several threads."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._lock = threading.Lock()
        self._unfinished = 0

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended."""
        return self._unfinished

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
