"""How the commands' help looks: without the types that Typer shows where a name says it all. A switch takes no value,
and bounds are said by the help text and by the error.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class PlainCommand(TyperCommand):
    """A command whose help shows neither `<bool>`, `<str>` nor `[0<=x<=4294967295]`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, switches without the name of a value."""
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _leave_bounds_out()
        super().format_help(ctx, formatter)


class PlainGroup(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, switches without the name of a value."""
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        _leave_bounds_out()
        super().format_help(ctx, formatter)


def _plain(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if parameter.param_type_name == "argument":  # named by its metavar already
            parameter.display_type_rich = lambda ctx: ""
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


def _leave_bounds_out() -> None:
    from typer import rich_utils

    rich_utils.RANGE_STRING = ""
