"""The commands of megatron-sorted, one file each.

A command's module has ``main(arguments)``, which returns the exit status. It may also have
``IF_STOPPED`` (a sentence about the work that Ctrl-C stopped), ``clean_up()`` (called before an
error is printed) and ``report_error(error)`` (called instead of printing it).
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from megatron_sorted.command_line import run_main, start_command
from megatron_sorted.errors import PlatformError

COMMANDS = {
    "train": "train or fine-tune a nested model",
    "prepare": "write indexed token files from JSON lines",
    "split": "split a text into training and held-out samples",
    "convert": "convert between Hugging Face directories and Megatron checkpoints",
    "extract": "cut a sub-model out of a nested model",
    "evaluate": "measure every exit of trained models",
    "generate": "generate text with a nested model, or chat with it",
    "serve": "serve a nested model under OpenAI's API",
    "tune": "find the fastest decoding options of a model on this machine",
    "benchmark": "compare decoding strategies on the same prompts",
    "report": "draw the losses and exits of runs",
    "plan": "estimate memory and time of a run before it is queued",
    "doctor": "check a machine or the nodes of a job",
    "launch": "start a run on several hosts, under SLURM or over ssh",
    "examples": "copy example runs, site files and launchers to a folder",
}
"""Each command and what it does, in the order in which a user meets them."""

EXTRAS = {
    "train": "train",
    "prepare": "train",
    "plan": "train",
    "serve": "serve",
    "evaluate": "evaluate",
    "benchmark": "evaluate",
    "report": "monitoring",
} | dict.fromkeys(("split", "convert", "extract", "generate", "tune"), "convert")
"""The extra of an installation that brings a command's packages; other commands need none."""


def run(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit status.

    Args:
        name: One of ``COMMANDS``.
        arguments: The command's arguments, by default those of the command line.
    """
    start_command()
    module = import_module(f"{__name__}.{name}")

    def main() -> int | None:
        try:
            return module.main(arguments)
        except ModuleNotFoundError as error:
            if not lacks_extra(name, error):
                raise
            raise PlatformError(
                f"{name}: {error.name} is not installed. "
                f"pip install 'megatron_sorted[{EXTRAS[name]}]'."
            ) from error

    run_main(
        main,
        getattr(module, "IF_STOPPED", ""),
        getattr(module, "clean_up", lambda: None),
        getattr(module, "report_error", None),
    )


def lacks_extra(name: str, error: ModuleNotFoundError) -> bool:
    """Return whether a command lacks a package of its extra, not a module of an installed one."""
    package = error.name or "."
    return name in EXTRAS and "." not in package and package not in sys.stdlib_module_names
