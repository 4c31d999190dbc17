"""Examines all nodes of a job; also where torch cannot be imported on one of them."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from doctor.finding import FAIL, Finding, broken
from doctor.local import Question, look_around
from doctor.table import as_text
from doctor.world import World

Show = Callable[[Mapping[str, Sequence[Finding]], Sequence[Mapping[str, Any]]], int]
"""Prints findings by host and figures, and returns the exit status."""


def hold_termination() -> None:
    """Leaves SIGTERM to the watch: the launcher sends it when another process has failed, and there is a table to print first.

    Called before any thread is started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def examine_job(question: Question, root: Path, environment: Mapping[str, str], world: World, limit_seconds: float, show: Show) -> int:
    """Returns the exit status; rank 0 prints one table of all nodes, the others nothing, unless they cannot reach it.

    Collective: every process of the job.

    Args:
        question: What is asked about each node.
        root: Of the project.
        environment: Of the process.
        world: Where it stands.
        limit_seconds: How long others may keep it waiting.
        show: Prints.
    """
    if world.rank == 0:
        hold_termination()
    try:
        from doctor.network.examination import examine
    except Exception as error:  # whatever a broken torch raises
        return _alone(question, root, environment, world, show, f"torch cannot be imported: {' '.join(str(error).split())}")
    try:
        return examine(question, root, environment, world, limit_seconds, show)
    except RuntimeError as error:  # the store of MASTER_ADDR:MASTER_PORT cannot be reached, or is gone
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        return _alone(question, root, environment, world, show, f"rank {world.rank} and {address}: {' '.join(str(error).split())[:300]}")


def _alone(question: Question, root: Path, environment: Mapping[str, str], world: World, show: Show, why: str) -> int:
    """Says what is wrong on this host, if nobody of the same node or of rank 0's does."""
    host = os.uname().nodename
    finding = broken("network test", why, "Mend what fails on this host (python tools/doctor.py on it alone says more), and see that "
                                          "MASTER_ADDR is the first node's name and MASTER_PORT free and not blocked.")
    if world.local_rank == 0:
        found = [*look_around(question, root, environment, world), finding]
        if world.rank == 0:
            return show({host: found}, ())
        print(as_text({host: [one for one in found if one.verdict == FAIL]}, 160), file=sys.stderr, flush=True)
    return 1
