"""DeepSeek's tool calls, which stand between special tokens."""

from trtllm_jax.serve.parsers.base import NAME_CHARACTERS, ToolParser
from trtllm_jax.serve.parsers.scanner import Malformed, Steps

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR, SENTENCE_END = "<｜tool▁sep｜>", "<｜end▁of▁sentence｜>"


class DeepSeekV31Parser(ToolParser):
    """DeepSeek V3.1: a name, a separator, the arguments."""

    keep_special_tokens = True
    begins = (CALLS_BEGIN,)
    ends = (SENTENCE_END,)

    def _read_calls(self) -> Steps[None]:
        before = self._calls
        while True:
            yield from self._scanner.spaces()
            if not (yield from self._scanner.match(CALL_BEGIN)):
                break
            yield from self._read_call()
            yield from self._scanner.spaces()
            yield from self._scanner.match(CALL_END)
        if self._calls == before:
            raise Malformed
        yield from self._scanner.match(CALLS_END)

    def _read_call(self) -> Steps[None]:
        name = yield from self._scanner.run(NAME_CHARACTERS)
        yield from self._scanner.require(SEPARATOR)
        yield from self._scanner.spaces()
        yield from self._read_arguments(name)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """DeepSeek V3 and R1: ``function``, a separator, the name, and the arguments as a fenced block."""

    def _read_call(self) -> Steps[None]:
        yield from self._scanner.require("function" + SEPARATOR)
        name = yield from self._scanner.run(NAME_CHARACTERS)
        yield from self._scanner.require("\n```json\n")
        yield from self._scanner.spaces()
        yield from self._read_arguments(name)
        yield from self._scanner.spaces()
        yield from self._scanner.match("```")
