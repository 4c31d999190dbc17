"""Examines all nodes of a job; also where torch cannot be imported on one of them."""

import os
import signal
import sys

from doctor.finding import FAIL, broken
from doctor.network.task import Task
from doctor.table import as_text


def hold_termination() -> None:
    """Leaves SIGTERM to the watch: the launcher sends it when another process has failed, and there is a table to print first.

    Called before any thread is started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def examine_job(task: Task) -> int:
    """Returns the exit status; rank 0 prints one table of all nodes, the others nothing, unless they cannot reach it.

    Collective: every process of the job.
    """
    if task.world.rank == 0:
        hold_termination()
    try:
        from megatron_sorted.platform.before_torch import keep_device_packages_out

        keep_device_packages_out()  # as in training; what the others make of torch is said of every node
        from doctor.network.examination import examine
    except Exception as error:  # whatever a broken torch raises
        return _alone(task, f"torch cannot be imported: {' '.join(str(error).split())}")
    try:
        return examine(task)
    except RuntimeError as error:  # the store of MASTER_ADDR:MASTER_PORT cannot be reached, or is gone
        address = f"{task.environment['MASTER_ADDR']}:{task.environment['MASTER_PORT']}"
        return _alone(task, f"rank {task.world.rank} and {address}: {' '.join(str(error).split())[:300]}")


def _alone(task: Task, why: str) -> int:
    """Says what is wrong on this host, if nobody of the same node or of rank 0's does."""
    host = os.uname().nodename
    finding = broken("network test", why, "Mend what fails on this host (python tools/doctor.py on it alone says more), and see that "
                                          "MASTER_ADDR is the first node's name and MASTER_PORT free and not blocked.")
    if task.world.local_rank == 0:
        found = [*task.look_around(), finding]
        if task.world.rank == 0:
            return task.show({host: found}, ())
        print(as_text({host: [one for one in found if one.verdict == FAIL]}, 160), file=sys.stderr, flush=True)
    return 1
