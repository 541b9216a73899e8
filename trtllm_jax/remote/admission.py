"""The limit on the sequences of other processes that run or wait in an engine."""

import threading

from trtllm_jax.common.errors import EngineBusyError, RequestError


class Admission:
    """Counts unfinished sequences, at most `max_sequences`; thread-safe."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self._lock = threading.Lock()
        self._unfinished = 0

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended."""
        return self._unfinished

    def reserve(self, count: int) -> None:
        """Admit `count` sequences. EngineBusyError if too many are unfinished, RequestError if `count` is too large."""
        if count > self.max_sequences:
            raise RequestError(
                f"{count} sequences were sent at once, and at most {self.max_sequences} may run or wait: send fewer"
            )
        with self._lock:
            if self._unfinished + count > self.max_sequences:
                raise EngineBusyError(
                    f"{self._unfinished} sequences run or wait, of at most {self.max_sequences}: try again later"
                )
            self._unfinished += count

    def release(self, count: int) -> None:
        """Count `count` admitted sequences as finished."""
        with self._lock:
            self._unfinished -= count
