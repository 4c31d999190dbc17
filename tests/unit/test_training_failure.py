"""Which rank reports a failure, when, and with which message."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sorted.errors import DataError
from megatron_sorted.training.watch.failure import (
    PRECEDENCE_SECONDS,
    VICTIM_SECONDS,
    lost_a_peer,
    message_of,
    seconds_to_wait,
)

ROOT = Path(__file__).resolve().parents[2]
GLOO = (
    "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:60194"
)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("remote process exited or there was a network error"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DataError("x.bin: 3 bytes. Connection to the file system lost?"), False),
        (ValueError("gloo"), False),
    ],
)
def test_victims_of_another_rank_are_recognised(error, lost):
    assert lost_a_peer(error) is lost


def test_the_rank_that_failed_by_itself_reports_first():
    assert seconds_to_wait(DataError("x"), 0) == seconds_to_wait(KeyError("x"), 0) == 0
    assert (
        seconds_to_wait(DataError("x"), 3)
        == seconds_to_wait(KeyError("x"), 3)
        == PRECEDENCE_SECONDS
    )
    # the launcher looks every 0.1 s, so seconds between them are ample
    assert seconds_to_wait(RuntimeError(GLOO), 0) == VICTIM_SECONDS > PRECEDENCE_SECONDS + 2


def test_mistakes_are_one_line_and_defects_a_traceback():
    assert (
        message_of(DataError("x.bin: 3 bytes. Write it again."))
        == "error: x.bin: 3 bytes. Write it again."
    )
    try:
        {}["key"]
    except KeyError as error:
        text = message_of(error)
    assert text.startswith("Traceback (most recent call last):\n") and text.endswith(
        "KeyError: 'key'"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("DataError('bad file')", "error: bad file"),
        ("ValueError('defect')", "rank 4: ValueError: defect"),
    ],
)
def test_console_and_launcher_get_the_same_message(tmp_path, error, message):
    code = (
        f"from megatron_sorted.errors import DataError; from "
        f"megatron_sorted.training.watch.failure import report_and_exit; "
        f"print('step 1'); report_and_exit({error})"
    )
    path = tmp_path / "error.json"
    environment = {
        "PYTHONPATH": str(ROOT),
        "RANK": "4",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_ERROR_FILE": str(path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "step 1\n", message + "\n")
    written = json.loads(path.read_text())["message"]
    assert (
        written["message"] == written["extraInfo"]["py_callstack"] == message
        and int(written["extraInfo"]["timestamp"]) > 1e9
    )


@pytest.mark.parametrize(
    ("error", "printed"),
    [(f"RuntimeError({GLOO!r})", ""), ("KeyError('own')", "rank 1: KeyError: 'own'\n")],
)
def test_a_victim_ended_before_it_saw_the_error_ends_silently(error, printed):
    """The launcher's signal comes before the broken connection; an error of its own is reported."""
    code = (
        "import os, signal; from megatron_sorted.training.watch.failure import report_and_exit, "
        "stop_request; "
        f"stop_request.listen(); os.kill(os.getpid(), signal.SIGTERM); report_and_exit({error})"
    )
    environment = {"PYTHONPATH": str(ROOT), "RANK": "1", "LOCAL_RANK": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, printed)
    assert time.monotonic() - started < VICTIM_SECONDS


def test_one_rank_of_a_host_reports_however_slow_the_launcher_is(tmp_path):
    """Both ranks fail; the launcher's signal reaches the second only after its wait is over."""
    code = (
        "import os, signal, threading; from megatron_sorted.training.watch import failure; "
        "from megatron_sorted.training.watch.signals import stop_request; "
        "stop_request.listen(); failure.PRECEDENCE_SECONDS = 0.1; "
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start(); "
        "failure.report_and_exit(KeyError('own'))"
    )
    seen = []
    for rank in range(2):
        path = tmp_path / "attempt_0" / str(rank) / "error.json"
        path.parent.mkdir(parents=True)
        environment = {
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "TORCHELASTIC_ERROR_FILE": str(path),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        seen.append((done.stderr, path.exists()))
    assert seen == [("rank 0: KeyError: 'own'\n", True), ("", False)]
