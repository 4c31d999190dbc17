"""The doctor on all nodes of a job, also where torch cannot be imported on one of them."""

import os
import signal
import sys

from megatron_sorted.doctor.finding import FAIL, fail
from megatron_sorted.doctor.local import DoctorOptions, check_host
from megatron_sorted.doctor.table import Show, as_text


def hold_termination() -> None:
    """Leave SIGTERM to the watchdog. Call it before any thread is started.

    The launcher sends it when another process has failed; the table must be printed first.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def diagnose_job(options: DoctorOptions, limit_seconds: float, show: Show) -> int:
    """Check all nodes and return the exit status.

    Rank 0 prints one table; the others print nothing unless they cannot reach rank 0.

    Collective: every process of the job.

    Args:
        options: The checks of each node.
        limit_seconds: How long this process waits for others.
        show: Prints findings by host and measurements, and returns the exit status.
    """
    rank = options.world.rank
    if rank == 0:
        hold_termination()
    try:
        from megatron_sorted.platform.processes import keep_device_packages_out

        keep_device_packages_out()  # as training does
        from megatron_sorted.doctor.network.nodes import check_nodes
    except Exception as error:  # a broken torch raises anything
        return _check_alone(options, show, f"torch cannot be imported: {_one_line(error)}")
    try:
        return check_nodes(options, limit_seconds, show)
    except (RuntimeError, ValueError) as error:  # the store is not reachable, or has ended
        address = f"{options.environment['MASTER_ADDR']}:{options.environment['MASTER_PORT']}"
        return _check_alone(options, show, f"rank {rank} and {address}: {_one_line(error)[:300]}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_alone(options: DoctorOptions, show: Show, reason: str) -> int:
    """Check this host alone: the first process of each node prints; return the exit status."""
    if options.world.local_rank > 0:
        return 1
    remedy = (
        "Correct what fails on this host (run the doctor on it alone), and check that MASTER_ADDR "
        "is the first node's name and MASTER_PORT free and not blocked."
    )
    findings = [*check_host(options), fail("network test", reason, remedy)]
    host = os.uname().nodename
    if options.world.rank == 0:
        return show({host: findings}, ())
    failures = [finding for finding in findings if finding.verdict == FAIL]
    print(as_text({host: failures}, 160), file=sys.stderr, flush=True)
    return 1
