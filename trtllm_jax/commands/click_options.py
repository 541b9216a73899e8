"""Click helpers of the commands: options in sections, value types, and options before a subcommand's name."""

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

Command = TypeVar("Command", bound=Callable[..., Any])

SETTINGS = {
    # Options are declared with underscores; this also accepts --max-batch-size for --max_batch_size.
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}
Bounds = tuple[int | None, ...]
"""The most requests in flight for each measurement; None for no bound."""

BACKENDS = ("jax", "pytorch", "tensorrt")
LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")


class Option(click.Option):
    """An option that the help lists under `section`."""

    def __init__(self, *declarations: Any, section: str = "Workload", **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section in the order of its first option."""
        shown = [(getattr(param, "section", "Other"), param.get_help_record(ctx)) for param in self.get_params(ctx)]
        order = list(dict.fromkeys(section for section, _ in shown))
        for section, entries in groupby(sorted(shown, key=lambda one: order.index(one[0])), key=lambda one: one[0]):
            with formatter.section(section):
                formatter.write_dl([record for _, record in entries if record])


class SectionedGroup(click.Group):
    """A group whose help lists options by section."""

    command_class = SectionedCommand

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, then the commands."""
        SectionedCommand.format_options(self, ctx, formatter)  # type: ignore[arg-type]
        self.format_commands(ctx, formatter)


def positive_ints(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """The callback of an option that takes a comma-separated list of positive integers."""
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of positive integers: write for example 1,8,32", ctx, param)
    return tuple(map(int, words))


def bounds(ctx: click.Context, param: click.Parameter, value: str) -> Bounds:
    """The callback of an option that takes a comma-separated list of concurrency bounds, or -1 or 0 for no bound."""
    return (None,) if value.strip() in ("-1", "0") else positive_ints(ctx, param, value)


def option(name: str, *, section: str = "Workload", **attributes: Any) -> Callable[[Command], Command]:
    """A click option of `section`; `name` may have several names, separated by spaces."""
    return click.option(*name.split(), cls=Option, section=section, **attributes)


POSITIVE = click.IntRange(min=1)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _NewFile(click.Path):
    """A file that can be written, in a folder that exists."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does, and fail early if the folder does not exist."""
        path: Any = super().convert(value, param, ctx)
        if not Path(path).parent.is_dir():
            self.fail(f"{value!r} is not in an existing folder: make {str(Path(path).parent)!r} first", param, ctx)
        return path


OUTPUT_FILE = _NewFile(dir_okay=False, writable=True, path_type=Path)


def nearest(ctx: click.Context, name: str) -> Any:
    """An option's value: as given after the command's name, else as given before it, else its default."""
    near, *outer = [one for one in _chain(ctx) if name in one.params]
    given = (one for one in (near, *outer) if one.get_parameter_source(name) is not ParameterSource.DEFAULT)
    return next(given, near).params[name]


def refuse_others(ctx: click.Context) -> None:
    """UsageError if an option was given before the command's name that the command does not have."""
    for outer in _chain(ctx.parent):
        for name in outer.params.keys() - ctx.params.keys():
            if outer.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} has no effect on {ctx.info_name!r}: leave it out", ctx)


def _chain(ctx: click.Context | None) -> Iterator[click.Context]:
    """The context and its parents, the innermost first."""
    while ctx is not None:
        yield ctx
        ctx = ctx.parent


def set_log_level(name: str) -> None:
    """Set the log level of this process and, through the environment, of its child processes."""
    from trtllm_jax.logger import set_level

    set_level(name)
    os.environ["TRTLLM_LOG_LEVEL"] = name.upper()
