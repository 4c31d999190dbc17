"""``megatron-sorted train``: train or fine-tune a nested language model.

Under torchrun, start one process on every device.
"""

import faulthandler
import os

from megatron_sorted.conversion.starting_settings import starting_settings
from megatron_sorted.platform.processes import (
    keep_device_packages_out,
    read_world_of_training,
    silence_library_warnings,
)
from megatron_sorted.platform.versions import check_megatron_names, check_megatron_version
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.training.watch.failure import report_and_exit
from megatron_sorted.training.watch.signals import EXIT_STOPPED, stop_request

report_error = report_and_exit


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say (by default those of the command line); return the exit status.

    The status is 0 when the run is complete, and 75 ("try again") when it saved and stopped early,
    for a scheduler to requeue it. torchrun takes any status but 0 for a failure, so under it a run
    that stopped early ends with 0; SAVE/stopped.json distinguishes the two.
    """
    faulthandler.enable()
    keep_device_packages_out()
    settings = load_settings(arguments, starting_settings)
    check_settings(settings, read_world_of_training(os.environ).size)
    check_megatron_version()
    silence_library_warnings()
    if settings.exit_signal_handler:
        stop_request.listen()  # a scheduler's warning may come during the slow imports
    from megatron_sorted.platform.select import load_device

    load_device(settings)
    check_megatron_names()
    from megatron_sorted.training.run.loop import run

    stopped = run(settings) is not None
    return EXIT_STOPPED if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0
