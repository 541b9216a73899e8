"""The command line of `trtllm-eval`. Heavy packages are imported only after the options are read."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from trtllm_jax.commands.click_options import OUTPUT_FILE, POSITIVE, SETTINGS, SectionedCommand, option, set_log_level
from trtllm_jax.commands.engine_options import LOG_LEVEL, engine_options, split_options
from trtllm_jax.commands.user_errors import readable_errors
from trtllm_jax.commands.yaml_file import read_yaml

# Click rewraps paragraphs, except those that begin with a backspace.
HELP = """Evaluate a model with lm-eval, on the engine.

\b
trtllm-eval --model M --dataset_path FOLDER
trtllm-eval --model M --dataset_path FOLDER arc_easy gsm8k --limit 100
trtllm-eval --model M --tasks mmlu,gsm8k --tp_size 2 --output_path scores.json

TASKS are lm-eval's names. With --dataset_path, tasks read files in FOLDER; available are arc_easy, arc_challenge,
boolq, gsm8k, lambada_openai, mmlu, mmlu_<subject>, openbookqa, piqa, wikitext and winogrande, and the default is every
task whose files are there. Without --dataset_path, lm-eval fetches data from the hub, and the default is mmlu.

Options are written with _ or with -, before or after TASKS.
"""
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_EVAL_OPTIONS = (
    option("--tasks", metavar="A[,B...]", help="TASKS as an option."),
    option("--dataset_path", type=FOLDER, help="Folder of the tasks' files; nothing is fetched from the hub."),
    option("--limit --num_samples", type=POSITIVE, help="Use only the first items of each task  [all]"),
    option("--num_fewshot", type=click.IntRange(min=0), help="Examples before each item  [the task's]"),
    option("--max_output_length", type=POSITIVE, help="Tokens of an answer  [the task's, or 256]"),
    option("--apply_chat_template", is_flag=True, default=None, help="Send items as a conversation."),
    option("--system_prompt", help="Text at the start of each conversation or prompt."),
    option("--random_seed", type=click.IntRange(min=0), help="Seed of the choice of examples  [1234]"),
    option("--output_path", type=OUTPUT_FILE, help="Write scores and settings to this JSON file."),
)


def eval_options(command: Any) -> Any:
    """Add the evaluation's options to `command`."""
    for add in reversed(_EVAL_OPTIONS):
        command = add(command)
    return command


@click.command(cls=SectionedCommand, context_settings=SETTINGS, help=HELP)
@click.argument("names", nargs=-1, metavar="[TASKS]...")
@eval_options
@option("--model -m", section="Model", help="Folder, .gguf file or hub name.")
@engine_options
@option("--disable_kv_cache_reuse", section="Engine", is_flag=True, help="Turn the prefix cache off.")
@LOG_LEVEL
@click.pass_context
def main(
    ctx: click.Context, /, names: tuple[str, ...], model: str | None, disable_kv_cache_reuse: bool, **options: Any
) -> None:
    """Evaluate, and print a table."""
    if options["log_level"]:
        set_log_level(options["log_level"])
    file = read_yaml(options["config"])
    location = model or file.get("model")
    if not location:
        raise click.UsageError("Missing option '--model' / '-m': a folder, a .gguf file or a hub name.", ctx)
    if names and options["tasks"]:
        raise click.UsageError("TASKS and --tasks are the same: give one of them.", ctx)
    if not sys.stderr.isatty():
        # The libraries' progress bars do not check for a terminal; they read these variables when they are imported.
        os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    from trtllm_jax.commands.eval.run import EvalOptions, run

    named = {"tasks": names} if names else {}
    own, arguments = split_options({**options, **named}, file, str(location), EvalOptions.model_fields)
    if disable_kv_cache_reuse:
        arguments["kv_cache_config"] = {**(arguments.get("kv_cache_config") or {}), "enable_block_reuse": False}
    with readable_errors():
        run(EvalOptions(**own), arguments)


if __name__ == "__main__":
    main()
