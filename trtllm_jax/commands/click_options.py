"""What the commands share of click: options in sections, types of values, and options before a subcommand's name."""

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

Command = TypeVar("Command", bound=Callable[..., Any])

SETTINGS = {
    # One spelling is declared; --max-batch-size and --max_batch_size both reach it.
    "token_normalize_func": lambda name: name.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}
Bounds = tuple[int | None, ...]
"""Requests in flight at most, one measurement each; None for no bound."""

BACKENDS = ("jax", "pytorch", "tensorrt")
LOG_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")


class Option(click.Option):
    """An option that the help shows under `section`."""

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
    """A comma-separated list of positive integers; click calls this to convert an option's value."""
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of positive integers: write for example 1,8,32", ctx, param)
    return tuple(map(int, words))


def bounds(ctx: click.Context, param: click.Parameter, value: str) -> Bounds:
    """A comma-separated list of bounds of concurrency, or -1 (or 0) for none; click calls this."""
    return (None,) if value.strip() in ("-1", "0") else positive_ints(ctx, param, value)


def option(name: str, *, section: str = "Workload", **attributes: Any) -> Callable[[Command], Command]:
    """A click option of `section`; `name` may hold several, separated by blanks."""
    return click.option(*name.split(), cls=Option, section=section, **attributes)


POSITIVE = click.IntRange(min=1)
PRESENT = click.Path(exists=True, dir_okay=False, path_type=Path)


class _NewFile(click.Path):
    """A file that can be written, in a folder that is there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click has it, with the folder checked before anything is measured."""
        path: Any = super().convert(value, param, ctx)
        if not Path(path).parent.is_dir():
            self.fail(f"{value!r} lies in no folder: make {str(Path(path).parent)!r} first", param, ctx)
        return path


WRITABLE = _NewFile(dir_okay=False, writable=True, path_type=Path)


def nearest(ctx: click.Context, name: str) -> Any:
    """An option's value as given after the command's name, else before it, else its default."""
    near, *outer = [one for one in _chain(ctx) if name in one.params]
    given = (one for one in (near, *outer) if one.get_parameter_source(name) is not ParameterSource.DEFAULT)
    return next(given, near).params[name]


def refuse_others(ctx: click.Context) -> None:
    """UsageError where an option before the command's name is none of the command's own, and would do nothing."""
    for outer in _chain(ctx.parent):
        for name in outer.params.keys() - ctx.params.keys():
            if outer.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} does nothing for {ctx.info_name!r}: leave it out", ctx)


def _chain(ctx: click.Context | None) -> Iterator[click.Context]:
    """The context and those around it."""
    while ctx is not None:
        yield ctx
        ctx = ctx.parent


def set_log_level(name: str) -> None:
    """The level of this process and, through the environment, of those it starts."""
    from trtllm_jax.logger import set_level

    set_level(name)
    os.environ["TRTLLM_LOG_LEVEL"] = name.upper()
