"""The parser of every command: help that fits a screen and ends with an example, mistakes in one line that names what may be meant."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_sorted.errors import SettingsError
from megatron_sorted.old_names import rename_flags
from megatron_sorted.reading.shown import one_line
from megatron_sorted.settings.require import nearest

WIDTH = 100
"""Columns of a help page, whatever the terminal has: so it reads the same everywhere."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=WIDTH)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end the process with status 2 and one line.

    Args:
        prog: What is typed to start it, such as ``megatron-sorted plan``.
        description: What it does, in a sentence or two.
        example: A command line, the last of its help; a command with verbs leaves examples to them too.
        more: As of argparse.
    """

    def __init__(self, prog: str, description: str, example: str = "", **more: Any):
        more.setdefault("epilog", f"example: {example}" if example else None)
        super().__init__(
            prog=prog, description=description, formatter_class=_Help, add_help=False, **more
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self._takes_any = False

    def format_help(self) -> str:
        """Return the help, its groups one below the other without empty lines between."""
        parts = super().format_help().strip("\n").split("\n\n")
        first = 2 + self.description.count("\n\n")  # after usage and description
        last = len(parts) - bool(self.epilog)
        return "\n\n".join([*parts[:first], "\n".join(parts[first:last]), *parts[last:]]) + "\n"

    def error(self, message: str) -> NoReturn:
        """End the process with one line about a mistake in the command line."""
        text = one_line(message.removeprefix("argument "))
        self.exit(
            2,
            f"error: {text}{'' if text.endswith(('.', '?')) else f'. {self.prog} --help says what it takes.'}\n",
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the values; a word that is none of its own is a mistake."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r}: a word too many. {self.prog} --help says what it takes.")
        return values

    def parse_some(
        self, args: Sequence[str] | None, others: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the values, and the words that are left, whose options are ``others``.

        Raises:
            SettingsError: One is none of these.
        """
        self._takes_any = True
        values, left = self.parse_known_args(args)
        for option in (word.partition("=")[0] for word in left):
            if option.startswith("--") and option not in others:
                near = nearest(
                    option,
                    [*self._option_string_actions, *others],
                    f"{self.prog} --help names them.",
                )
                raise SettingsError(f"{option}: there is no such option. {near}")
        return values, left

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the values and the words left over, after a look for options that there are not: before what is missing is told."""
        words = sys.argv[1:] if args is None else list(args)
        words = rename_flags(words, self._option_string_actions)
        if not self._takes_any and self._subparsers is None:
            for word in words[: words.index("--")] if "--" in words else words:
                self._check_option(word.partition("=")[0])
        return super().parse_known_args(words, namespace)

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
            self.error(
                f"{option}: there is no such option. {nearest(option, shown, f'{self.prog} --help names them.')}"
            )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = nearest(str(value), known, f"Choose one of {', '.join(known)}.")
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}. {near}")


def at_least(least: int) -> Any:
    """Return the type of a whole number that is not below ``least``."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
        return value

    number.__name__ = "int"  # what argparse says of a text that is none
    return number
