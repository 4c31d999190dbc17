"""``megatron-sorted train``: train or fine-tune a nested language model; under torchrun, one process a device."""

import faulthandler
import os

from megatron_sorted.conversion.network import network_to_start_from
from megatron_sorted.platform.processes import (
    keep_device_packages_out,
    read_world_of_training,
    silence_library_warnings,
)
from megatron_sorted.platform.versions import check_megatron_version
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.training.watch.failure import report_and_exit
from megatron_sorted.training.watch.signals import EXIT_STOPPED, stop_request

report_error = report_and_exit


def main(words: list[str] | None = None) -> int:
    """Read and check the settings, by default those of the command line, run them, and return the exit status.

    That is 0 when the run is done, and 75 ("try again") when it saved and stopped early, for a scheduler to requeue it. torchrun takes
    any status but 0 for a failure, so under it a run that stopped early ends with 0; SAVE/stopped.json tells the two apart.
    """
    faulthandler.enable()
    keep_device_packages_out()
    settings = load_settings(words, network_to_start_from)
    check_settings(settings, read_world_of_training(os.environ).size)
    check_megatron_version()
    silence_library_warnings()
    if settings.exit_signal_handler:
        stop_request.listen()  # before the slow imports: a scheduler's warning may come while they go on
    from megatron_sorted.platform.select import load_device

    load_device(settings)
    from megatron_sorted.training.run.loop import run

    stopped = run(settings) is not None
    return EXIT_STOPPED if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0
