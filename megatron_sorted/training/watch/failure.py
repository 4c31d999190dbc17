"""How a process that failed tells the user why: once for all ranks, and where the user looks last.

Nothing heavy is imported here: a mistake in the settings is reported within a second.
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

# Most errors are met by every rank at once; the first of a host goes ahead, and its launcher ends the others while they wait.
# On a crowded host it may not manage within this time: then a file that the first made keeps the others silent.
PRECEDENCE_SECONDS = 2.0
# A rank whose peer vanished is a victim: it waits until the launcher has seen the rank that failed by itself.
# Seconds are many launchers' looks (every 0.1 s), but a crowded host may hold a launcher up.
VICTIM_SECONDS = 15.0


def lost_a_peer(error: BaseException) -> bool:
    """Return whether communication broke because another process ended."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "onnection " in str(error))
    )


def seconds_to_wait(error: BaseException, local_rank: int) -> float:
    """Return how long a rank waits before it reports, so that the first report is the one that matters."""
    if lost_a_peer(error):
        return VICTIM_SECONDS
    return PRECEDENCE_SECONDS if local_rank > 0 else 0.0


def message_of(error: BaseException) -> str:
    """Return what the user reads: one line for a mistake of theirs, a traceback for anything else."""
    if (sentence := sentence_of(error)) is not None:
        return f"error: {sentence}"
    return "".join(traceback.format_exception(error)).rstrip()


def wait_for_the_launcher(seconds: float, since: float) -> None:
    """Wait, and end this process without a word once it was told to end after ``since``: the launcher has seen the first failure.

    Args:
        seconds: How long to wait.
        since: Of ``time.monotonic``. Stop signals before it were a scheduler's or a user's.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop_request.last_time > since:
            os._exit(1)
        time.sleep(0.05)


def is_first_to_report(error_file: str) -> bool:
    """Return whether no other rank of this host reports an error in this attempt of torchrun; the first that asks is the one.

    Args:
        error_file: This rank's ``TORCHELASTIC_ERROR_FILE``, which torchrun calls ``attempt_N/LOCAL_RANK/error.json``.
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

    torchrun shows the content of ``TORCHELASTIC_ERROR_FILE`` of the rank that failed first as the last thing on the console. The
    ``record`` decorator of torch writes that file too, but with a traceback for every mistake, without knowing victims, and only
    after importing torch.

    Args:
        error: What happened.
        silent: Another rank says it, so this one only ends, after it.
    """
    # The launcher may tell a victim to end before the broken connection comes up as an error, on a crowded host seconds before.
    before = VICTIM_SECONDS if silent or lost_a_peer(error) else 0.0
    seconds = (
        VICTIM_SECONDS if silent else seconds_to_wait(error, int(os.environ.get("LOCAL_RANK", 0)))
    )
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
        with open(path, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "message": {
                        "message": message,
                        "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))},
                    }
                },
                file,
            )
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # Without waiting for communication threads: other ranks may be stuck in a collective until this process is gone.
    os._exit(1)
