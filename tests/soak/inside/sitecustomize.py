"""Python imports this when a frontend of a soaked server starts: SIGUSR1 then has it count its unfinished tasks.

Nothing outside a process can see its tasks, and no server should tell them to strangers.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any


def count_tasks(number: int, frame: Any) -> None:
    import asyncio
    import gc

    tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
    names = sorted(task.get_coro().__qualname__ for task in tasks)  # type: ignore[union-attr]
    answer = Path(os.environ["SOAK_FOLDER"]) / f"tasks-{os.getpid()}"
    answer.with_suffix(".new").write_text("\n".join(names))
    answer.with_suffix(".new").rename(answer)


if "trtllm_jax.serve.processes.frontend" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, count_tasks)
