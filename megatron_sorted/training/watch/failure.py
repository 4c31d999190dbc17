"""Reports why a process failed: once for all ranks, and where the user looks last.

Nothing heavy is imported here, so that a mistake in the settings is reported within a second.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from megatron_sorted.command_line import sentence_of
from megatron_sorted.errors import SortedError
from megatron_sorted.training.watch.signals import stop_request

# Most errors occur on every rank at once: the first of a host reports, and its launcher ends the
# others while they wait. On a crowded host it may need longer than this; then a file that the first
# has created keeps the others silent.
PRECEDENCE_SECONDS = 2.0
# A rank whose peer vanished is a victim: it waits until the launcher has seen the rank that failed
# first. Launchers look every 0.1 s, but a crowded host may delay them.
VICTIM_SECONDS = 15.0


def lost_a_peer(error: BaseException) -> bool:
    """Return whether communication broke because another process ended.

    >>> lost_a_peer(RuntimeError("[gloo] Connection closed by peer [10.0.0.7]:3126"))
    True
    >>> lost_a_peer(ValueError("invalid literal"))
    False
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "onnection " in str(error))
    )


def seconds_to_wait(error: BaseException, local_rank: int) -> float:
    """Return how long a rank waits before it reports, so that the cause is reported first."""
    if lost_a_peer(error):
        return VICTIM_SECONDS
    return PRECEDENCE_SECONDS if local_rank > 0 else 0.0


def message_of(error: BaseException) -> str:
    """Return one line for a mistake of the user's, a traceback for any other error."""
    if (sentence := sentence_of(error)) is not None:
        return f"error: {sentence}"
    return "".join(traceback.format_exception(error)).rstrip()


def wait_for_the_launcher(seconds: float, since: float) -> None:
    """Wait; end this process silently if a stop signal arrived after ``since``.

    Such a signal means that the launcher has seen the first failure and ends the other processes.

    Args:
        seconds: Time to wait.
        since: A ``time.monotonic()``; earlier stop signals were a scheduler's or a user's.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop_request.last_time > since:
            os._exit(1)
        time.sleep(0.05)


def is_first_to_report(error_file: str) -> bool:
    """Return whether no other rank of this host has reported an error in this attempt of torchrun.

    The first rank that calls this is the one that reports.

    Args:
        error_file: This rank's ``TORCHELASTIC_ERROR_FILE``, which torchrun names
            ``attempt_N/LOCAL_RANK/error.json``.
    """
    attempt = Path(error_file).absolute().parent.parent
    if not attempt.name.startswith("attempt_"):
        return True
    try:
        (attempt / "reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk must not hide the error itself
        return True
    return True


def report_and_exit(error: BaseException, silent: bool = False) -> NoReturn:
    """Print the error, hand it to the launcher, and end this process with status 1.

    torchrun prints the ``TORCHELASTIC_ERROR_FILE`` of the rank that failed first as the last lines
    on the console. The ``record`` decorator of torch writes that file too, but with a traceback for
    every mistake, without knowing victims, and only after importing torch.

    Args:
        error: The error.
        silent: Whether another rank reports it, so that this one only ends, after it.
    """
    # On a crowded host the launcher may end a victim seconds before the victim sees its broken
    # connection as an error.
    is_victim = silent or lost_a_peer(error)
    before = VICTIM_SECONDS if is_victim else 0.0
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    seconds = VICTIM_SECONDS if silent else seconds_to_wait(error, local_rank)
    wait_for_the_launcher(seconds, time.monotonic() - before)
    if silent:
        os._exit(1)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not is_first_to_report(path):
        wait_for_the_launcher(VICTIM_SECONDS, time.monotonic() - VICTIM_SECONDS)
        os._exit(1)
    message = message_of(error)
    if "RANK" in os.environ and not isinstance(error, SortedError):
        message = f"rank {os.environ['RANK']}: {message}"
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # Ends without waiting for communication threads: other ranks may be stuck in a collective
    # until this process has ended.
    os._exit(1)
