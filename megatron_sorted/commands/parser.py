"""The parser of every command: help that fits a screen, mistakes in one line with a suggestion."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_sorted.errors import SettingsError
from megatron_sorted.old_names import rename_flags
from megatron_sorted.reading.shown import one_line
from megatron_sorted.settings.require import nearest

WIDTH = 100
"""Columns of a help page, the same on every terminal."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=WIDTH)


class Parser(argparse.ArgumentParser):
    """A parser that ends the process with status 2 and one line when a command line is wrong.

    Args:
        prog: The command as typed, such as ``megatron-sorted plan``.
        description: The command's purpose, in a sentence or two.
        example: A command line, printed at the end of the help.
        more: Further arguments of argparse.
    """

    def __init__(self, prog: str, description: str, example: str = "", **more: Any):
        more.setdefault("epilog", f"example: {example}" if example else None)
        super().__init__(
            prog=prog, description=description, formatter_class=_Help, add_help=False, **more
        )
        self._positionals.title = "arguments"
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self._allows_unknown = False

    def format_help(self) -> str:
        """Return the help, without empty lines between its groups."""
        parts = super().format_help().strip("\n").split("\n\n")
        first = 2 + self.description.count("\n\n")  # after usage and description
        last = len(parts) - bool(self.epilog)
        return "\n\n".join([*parts[:first], "\n".join(parts[first:last]), *parts[last:]]) + "\n"

    def error(self, message: str) -> NoReturn:
        """End the process with one line about a mistake in the command line."""
        text = one_line(message.removeprefix("argument "))
        remedy = "" if text.endswith((".", "?")) else f". See {self.prog} --help."
        self.exit(2, f"error: {text}{remedy}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the values of the options; refuse every argument that is not known."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r}: unexpected argument. See {self.prog} --help.")
        return values

    def parse_some(
        self, args: Sequence[str] | None, others: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of the options and the remaining arguments.

        Args:
            args: The command line's arguments.
            others: Options that the remaining arguments may have.

        Raises:
            SettingsError: An option is neither known nor one of ``others``.
        """
        self._allows_unknown = True
        values, remaining = self.parse_known_args(args)
        for option in (argument.partition("=")[0] for argument in remaining):
            if option.startswith("--") and option not in others:
                near = nearest(
                    option, [*self._option_string_actions, *others], f"See {self.prog} --help."
                )
                raise SettingsError(f"{option}: there is no such option. {near}")
        return values, remaining

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the values and the remaining arguments.

        Old names are replaced first, and unknown options are refused before missing ones.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        arguments = rename_flags(arguments, self._option_string_actions)
        if not self._allows_unknown and self._subparsers is None:
            end = arguments.index("--") if "--" in arguments else len(arguments)
            for argument in arguments[:end]:
                self._check_option(argument.partition("=")[0])
        return super().parse_known_args(arguments, namespace)

    def _check_option(self, option: str) -> None:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if not option.startswith("--") or " " in option or option in known:
            return
        if not (self.allow_abbrev and any(name.startswith(option) for name in known)):
            shown = [
                name
                for name in known
                if self._option_string_actions[name].help is not argparse.SUPPRESS
                or name == "--help"
            ]
            near = nearest(option, shown, f"See {self.prog} --help.")
            self.error(f"{option}: there is no such option. {near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = nearest(str(value), known, f"Choose one of {', '.join(known)}.")
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}. {near}")


def at_least(least: int) -> Any:
    """Return an argparse type for whole numbers of at least ``least``.

    >>> at_least(1)("3")
    3
    """

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
        return value

    number.__name__ = "int"  # argparse's messages name the type
    return number
