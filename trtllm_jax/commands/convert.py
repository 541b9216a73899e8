"""`trtllm-convert`: converts a model between formats. Heavy packages are imported only after the options are read."""

import os
from pathlib import Path

import click

from trtllm_jax.commands.click_options import SETTINGS
from trtllm_jax.commands.user_errors import readable_errors

# Click rewraps paragraphs, except those that begin with a backspace.
HELP = """Convert the model SOURCE and write it to the folder OUTPUT.

\b
trtllm-convert model.gguf smollm2 --dtype bfloat16
trtllm-convert org/name llama-orbax --format orbax
trtllm-convert trained llama-hf --config org/name

SOURCE is a Hugging Face or Orbax folder, a .gguf file, a llama2.c .bin file or a hub name. Only a piece of one weight
is in memory at a time. OUTPUT appears once it is complete: if the command was interrupted, run it again.

Options are written with _ or with -.
"""


@click.command(context_settings=SETTINGS, help=HELP)
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(["hf", "orbax"]), default="hf", help="Safetensors, or JAX's Orbax.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights  [as they are stored]"
)
@click.option("--max_shard_size", default="5GB", help="Of one safetensors file.")
@click.option("--tokenizer", help="Another tokenizer: folder, .gguf file, llama2.c file or hub name.")
@click.option("--config", help="The model whose config.json and tokenizer go with Orbax arrays that have none.")
@click.option("--revision", help="Of a hub name.")
@click.option("--overwrite", is_flag=True, help="Replace the model at OUTPUT, if there is one.")
def main(
    source: str,
    output: Path,
    format: str,
    dtype: str | None,
    max_shard_size: str,
    tokenizer: str | None,
    config: str | None,
    revision: str | None,
    overwrite: bool,
) -> None:
    """Convert, and print the size of the result."""
    # A conversion does not need the GPU, which another process may be using.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from trtllm_jax import convert_checkpoint

    with readable_errors():
        folder = convert_checkpoint(
            source,
            output,
            format=format,
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            config=config,
            revision=revision,
            overwrite=overwrite,
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
