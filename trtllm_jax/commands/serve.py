"""`trtllm-serve`: an OpenAI-compatible server. Heavy packages are imported only after the options are read."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from trtllm_jax.commands.click_options import SETTINGS, SectionedCommand, option, set_log_level
from trtllm_jax.commands.engine_options import LOG_LEVEL, engine_options, split_options
from trtllm_jax.commands.user_errors import readable_errors
from trtllm_jax.commands.yaml_file import read_yaml

# Click rewraps paragraphs, except those that begin with a backspace.
HELP = """Serve MODEL over an OpenAI-compatible API.

\b
trtllm-serve Qwen/Qwen3-0.6B
trtllm-serve --model model.gguf --host 0.0.0.0 --port 8000 --api_key "$KEY"
curl http://localhost:8000/v1/models

MODEL is a Hugging Face or Orbax folder, a .gguf file or a hub name. On SIGTERM or Ctrl-C the server accepts no more
requests and exits once the running ones have finished; a second signal makes it exit at once.

Options are written with _ or with -.
"""
SECONDS = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=0)
FILE = click.Path(exists=True, dir_okay=False)

_SERVER_OPTIONS = (
    option("--host", section="Server", help="Address to listen on  [localhost]"),
    option("--port", section="Server", type=click.IntRange(0, 65535), help="Port; 0 for any free port  [8000]"),
    option(
        "--served_model_name",
        section="Server",
        multiple=True,
        default=None,
        help="The model's name in requests; may be repeated.",
    ),
    option(
        "--num_serve_frontends", section="Server", type=click.IntRange(1, 64), help="Processes for HTTP and text  [1]"
    ),
    option("--num_postprocess_workers", section="Server", type=COUNT, help="Further such processes  [0]"),
    option(
        "--max_queue_size", section="Server", type=COUNT, help="Sequences that may wait; further ones get 429  [1024]"
    ),
    option("--request_timeout", section="Server", type=SECONDS, help="Seconds for one answer  [3600]"),
    option("--otlp_traces_endpoint", section="Server", help="URL of an OpenTelemetry collector (OTLP over HTTP)."),
    option("--drain_timeout", section="Server", type=SECONDS, help="Seconds for the last answers after SIGTERM  [30]"),
    option(
        "--api_key",
        section="Security",
        multiple=True,
        default=None,
        envvar="TRTLLM_API_KEY",
        help="Bearer token that clients must send; may be repeated.",
    ),
    option("--ssl_keyfile", section="Security", type=FILE, help="TLS: the private key."),
    option("--ssl_certfile", section="Security", type=FILE, help="TLS: the certificate."),
    option(
        "--ssl_ca_certs", section="Security", type=FILE, help="TLS: CAs that clients' certificates must be signed by."
    ),
    option("--chat_template", section="Text", help="File or Jinja text in place of the model's."),
    option(
        "--allow_request_chat_template",
        section="Text",
        is_flag=True,
        default=None,
        help="Let requests pass their own template.",
    ),
    option("--reasoning_parser", section="Text", help="The format of the model's reasoning; 'auto' detects it."),
    option("--tool_parser", section="Text", help="The format of the model's tool calls; 'auto' detects it."),
)


def server_options(command: Any) -> Any:
    """Add the server's options to `command`."""
    for add in reversed(_SERVER_OPTIONS):
        command = add(command)
    return command


@click.command(cls=SectionedCommand, context_settings=SETTINGS, help=HELP)
@click.argument("model", required=False)
@click.option("--model", "named_model", help="The same as MODEL.")
@server_options
@engine_options
@LOG_LEVEL
def command(model: str | None, named_model: str | None, **options: Any) -> None:
    """Serve until a signal stops the server."""
    if options["log_level"]:
        set_log_level(options["log_level"])
    file = read_yaml(options["config"])
    if model and named_model and model != named_model:
        raise click.UsageError(f"MODEL = {model!r} and --model = {named_model!r} differ: give one of them.")
    location = model or named_model or file.get("model")
    if not location:
        raise click.UsageError("Missing MODEL: a folder, a .gguf file or a hub name.")
    with readable_errors():
        from trtllm_jax.commands.serve_run import run
        from trtllm_jax.serve.config import ServerOptions

        own, arguments = split_options(options, file, str(location), ServerOptions.model_fields)
        sys.exit(run(ServerOptions(**{"served_model_name": (_name_of(str(location)),), **own}), arguments))


def _name_of(model: str) -> str:
    """The default name in requests, as in TensorRT-LLM: a hub name as it is, or a path's last part."""
    return Path(model).resolve().name if os.path.exists(model) else model


def main() -> None:
    """`trtllm-serve`; TensorRT-LLM's `trtllm-serve serve MODEL` is the same."""
    arguments = sys.argv[1:]
    command.main(arguments[1:] if arguments[:1] == ["serve"] else arguments, prog_name="trtllm-serve")
