"""Trains or fine-tunes a nested language model.

    torchrun --nproc-per-node 8 pretrain_sorted.py --config examples/llama2_7b_8gpu.yaml --data-path my_text_document ...
    python pretrain_sorted.py --config examples/quickstart.yaml        one process
    python pretrain_sorted.py --help                                   every setting
    python pretrain_sorted.py --version                                megatron_sorted's; every command of tools/ has it too
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import faulthandler
import os

from megatron_sorted.conversion.network import network_to_start_from
from megatron_sorted.platform.before_torch import keep_device_packages_out
from megatron_sorted.platform.processes import read_world_of_training
from megatron_sorted.platform.quiet import silence_library_warnings
from megatron_sorted.platform.versions import check_megatron_version
from megatron_sorted.settings.check import check_settings
from megatron_sorted.settings.load import load_settings
from megatron_sorted.training.failure import report_and_exit
from megatron_sorted.training.signals import EXIT_STOPPED, stop_request


def main(words: list[str] | None = None) -> int:
    """Reads and checks the settings, by default those of the command line, then runs them; returns the exit status.

    That is 0 when the run is done, and 75 ("try again") when it saved and stopped early, for a scheduler to requeue it. torchrun takes
    any status but 0 for a failure, so under it a run that stopped early ends with 0; SAVE/stopped.json tells the two apart.
    """
    keep_device_packages_out()
    settings = load_settings(words, network_to_start_from)
    check_settings(settings, read_world_of_training(os.environ).size)
    check_megatron_version()
    silence_library_warnings()
    if settings.exit_signal_handler:
        stop_request.listen()  # before the slow imports: a scheduler's warning may come while they go on
    from megatron_sorted.platform.select import load_device

    load_device(settings)
    from megatron_sorted.training.loop import run

    stopped = run(settings) is not None
    return EXIT_STOPPED if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0


if __name__ == "__main__":
    faulthandler.enable()
    run_main(main, report=report_and_exit)
