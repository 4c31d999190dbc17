"""Examines all nodes of a job; also where torch cannot be imported on one of them."""

import os
import signal
import sys

from megatron_sorted.doctor.finding import FAIL, broken
from megatron_sorted.doctor.local import DoctorOptions, look_around
from megatron_sorted.doctor.table import Show, as_text


def hold_termination() -> None:
    """Leave SIGTERM to the watch: the launcher sends it when another process has failed, and there is a table to print first.

    Called before any thread is started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def examine_job(question: DoctorOptions, limit_seconds: float, show: Show) -> int:
    """Examine all nodes and return the exit status; rank 0 prints one table, the others nothing unless they cannot reach it.

    Collective: every process of the job.

    Args:
        question: What is asked about each node.
        limit_seconds: How long others may keep this process waiting.
        show: Prints findings by host and figures, and returns the exit status.
    """
    if question.world.rank == 0:
        hold_termination()
    try:
        from megatron_sorted.platform.processes import keep_device_packages_out

        keep_device_packages_out()  # as in training; what the others make of torch is said of every node
        from megatron_sorted.doctor.network.examination import examine
    except Exception as error:  # whatever a broken torch raises
        return _alone(question, show, f"torch cannot be imported: {' '.join(str(error).split())}")
    try:
        return examine(question, limit_seconds, show)
    except (
        RuntimeError
    ) as error:  # the store of MASTER_ADDR:MASTER_PORT cannot be reached, or is gone
        address = f"{question.environment['MASTER_ADDR']}:{question.environment['MASTER_PORT']}"
        return _alone(
            question,
            show,
            f"rank {question.world.rank} and {address}: {' '.join(str(error).split())[:300]}",
        )


def _alone(question: DoctorOptions, show: Show, why: str) -> int:
    """Say what is wrong on this host, if nobody of the same node or of rank 0's does."""
    if question.world.local_rank > 0:
        return 1
    host = os.uname().nodename
    finding = broken(
        "network test",
        why,
        "Mend what fails on this host (the doctor on it alone says more), and see that "
        "MASTER_ADDR is the first node's name and MASTER_PORT free and not blocked.",
    )
    found = [*look_around(question), finding]
    if question.world.rank == 0:
        return show({host: found}, ())
    print(
        as_text({host: [one for one in found if one.verdict == FAIL]}, 160),
        file=sys.stderr,
        flush=True,
    )
    return 1
