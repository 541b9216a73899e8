"""Runs an evaluation: loads the tasks first, so that their errors show early, then the engine, then runs lm-eval."""

import importlib.metadata
import importlib.util
import io
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trtllm_jax.commands.eval.report import print_table, record, write_record
from trtllm_jax.common.strict_model import NonNegativeInt, PositiveInt, StrictModel

DEFAULT_TASK = "mmlu"
BOOTSTRAP_ITERATIONS = 1000
"""Bootstrap iterations for standard errors that have no formula."""


class EvalOptions(StrictModel, owner="trtllm-eval"):
    """The options of an evaluation.

    Attributes:
        tasks: names; empty for every task whose files are in `dataset_path`, or `DEFAULT_TASK` without one.
        dataset_path: folder of the tasks' files; None for lm-eval's tasks with data from the hub.
        limit: the number of items of each task to use, from the first on; None for all.
        num_fewshot: examples before each item; None for the task's number.
        max_output_length: tokens of an answer; None for the task's number.
        apply_chat_template: whether items are sent to the model as a conversation.
        system_prompt: text at the start of each conversation or prompt.
        random_seed: seed of the choice of examples.
        output_path: a JSON file to write.
    """

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    dataset_path: Path | None = None
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None
    max_output_length: PositiveInt | None = None
    apply_chat_template: bool = False
    system_prompt: str | None = None
    random_seed: NonNegativeInt = 1234
    output_path: Path | None = None

    @classmethod
    def _prepare(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Convert strings of a command line or a YAML file to the fields' types."""
        changed = dict(arguments)
        if isinstance(tasks := changed.get("tasks"), str | list):
            changed["tasks"] = (
                tuple(name.strip() for name in tasks.split(",")) if isinstance(tasks, str) else tuple(tasks)
            )
        for name in ("dataset_path", "output_path"):
            if isinstance(changed.get(name), str):
                changed[name] = Path(changed[name])
        return changed


def run(options: EvalOptions, arguments: Mapping[str, Any]) -> None:
    """Evaluate `LLM(**arguments)` and report; ValueError for invalid options, mostly before the engine starts."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("an evaluation needs lm-eval: install trtllm-jax[eval]")
    with _quiet_libraries(options.dataset_path is not None):
        found = evaluate(options, arguments)
    if options.output_path is not None:
        write_record(options.output_path, found)
    print_table(found)


def evaluate(options: EvalOptions, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The results of `LLM(**arguments)`, in lm-eval's form."""
    from trtllm_jax import LLM, __version__
    from trtllm_jax.commands.eval.lm import EngineLM
    from trtllm_jax.functional.research import open_model

    tasks = load_tasks(options)
    model = open_model(arguments["model"], revision=arguments.get("revision"))
    length = arguments.get("max_seq_len") or model.config.max_position
    with LLM(**arguments) as llm:
        llm.facts.require_generation()
        lm = EngineLM(llm, model, length)
        if options.apply_chat_template and not llm.chat_template:
            raise ValueError(f"model = {arguments['model']} has no chat template: leave --apply_chat_template out")
        began = time.perf_counter()
        results = measure(lm, tasks, options)
        devices = llm.params["embed"].sharding.device_set
        config = {
            "model": str(arguments["model"]),
            "engine": f"trtllm_jax {__version__}",
            "lm_eval": importlib.metadata.version("lm_eval"),
            "device": f"{len(devices)} x {next(iter(devices)).device_kind}",
            "dtype": model.weight_dtype(llm.params).name,
            "max_length": length,
            "seconds": time.perf_counter() - began,
            "llm": dict(arguments),
            **options.model_dump(),
        }
    return record(results, config)


def load_tasks(options: EvalOptions) -> Any:
    """lm-eval's dict of the tasks. ValueError if a task is unknown or its data is not available."""
    if options.dataset_path is not None:
        from trtllm_jax.commands.eval.data import SOURCES, available_tasks, local_tasks

        names = options.tasks or available_tasks(options.dataset_path)
        if not names:
            files = ", ".join(source.file for source in SOURCES.values())
            raise ValueError(
                f"--dataset_path = {options.dataset_path} has none of the tasks' files: {files}, mmlu/test"
            )
        return local_tasks(names, options.dataset_path)
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = options.tasks or (DEFAULT_TASK,)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        similar = manager.match_tasks([f"{unknown[0][:4]}*"])[:10]
        raise ValueError(
            f"task {unknown[0]!r} is unknown to lm-eval: use mmlu, gsm8k, arc_easy, ..."
            + (f" or one of {', '.join(similar)}" if similar else "")
        )
    try:
        return manager.load(list(names))
    except OSError as error:
        raise ValueError(
            f"the data of {', '.join(names)} is not cached and cannot be fetched from the hub ({error}): give a folder "
            "of files with --dataset_path, see docs/evaluation.md"
        ) from error


def measure(lm: Any, tasks: Any, options: EvalOptions) -> dict[str, Any]:
    """lm-eval's results of the model `lm` on loaded tasks."""
    import numpy as np
    from lm_eval import evaluator

    random.seed(options.random_seed)
    np.random.seed(options.random_seed)  # noqa: NPY002 lm-eval's filters and metrics draw from it
    for task in tasks["tasks"].values():
        # A task that sets 0 must not be shown examples.
        stated = task.get_config("num_fewshot")
        if stated is None or (options.num_fewshot is not None and stated != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
        if options.max_output_length is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": options.max_output_length}, update=True)
        task.set_fewshot_seed(seed=options.random_seed)
    # The standard error of a perplexity is bootstrapped. By default that forks this process, which is unsafe with
    # jax's threads, and it prints to stdout.
    with _environment(DISABLE_MULTIPROC="1"), redirect_stdout(io.StringIO()):
        results: dict[str, Any] = evaluator.evaluate(
            lm=lm,
            task_dict=tasks,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            system_instruction=options.system_prompt,
        )
    return results


@contextmanager
def _quiet_libraries(offline: bool) -> Iterator[None]:
    """A context in which lm-eval and datasets log only errors and, with `offline`, do not access the hub."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _environment(**({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {})):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _environment(**switches: str) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
