"""The commands of megatron-sorted, one file each.

A command's module has ``main(words)``, which returns the exit status, and may have ``IF_STOPPED`` (what Ctrl-C left of the work),
``clean_up()`` (called before an error is printed) and ``report_error(error)`` (called instead of printing it).
"""

from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from megatron_sorted.command_line import run_main, start_command

COMMANDS = {
    "train": "train or fine-tune a nested model",
    "prepare": "write indexed token files from JSON lines",
    "split": "split a text into training and held-out samples",
    "convert": "convert between Hugging Face directories and Megatron checkpoints",
    "extract": "cut a sub-model out of a nested model",
    "evaluate": "measure every exit of finished models",
    "generate": "write with a nested model, or chat with it",
    "serve": "serve a nested model under OpenAI's API",
    "tune": "choose how to decode a model on this machine",
    "benchmark": "compare ways to decode on the same prompts",
    "report": "draw the losses and exits of runs",
    "plan": "say what a run will take before it is queued",
    "doctor": "examine a machine or the nodes of a job",
    "launch": "start a run on several hosts, under SLURM or over ssh",
    "examples": "copy example runs, site files and launchers out",
}
"""What each command does, in the order in which a model's life meets them."""


def run(name: str, words: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit status.

    Args:
        name: One of ``COMMANDS``.
        words: Its arguments, by default those of the command line.
    """
    start_command()
    module = import_module(f"{__name__}.{name}")
    run_main(
        lambda: module.main(words),
        getattr(module, "IF_STOPPED", ""),
        getattr(module, "clean_up", lambda: None),
        getattr(module, "report_error", None),
    )
