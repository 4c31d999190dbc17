"""Stop signals are recorded, never deadly, and ignored at the end; in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

CODE = """
import os, signal
from megatron_sorted.training.watch.signals import stop_request, signal_name
stop_request.listen()
assert stop_request.number == 0
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGTERM)
assert signal_name(stop_request.number) == "SIGUSR1"  # the first counts
stop_request.ignore_from_now_on()
os.kill(os.getpid(), signal.SIGTERM)
import sys
assert not {"torch", "numpy"} & set(sys.modules)  # handlers are in place before anything slow
print("alive")
"""


def test_signals_are_recorded_and_then_ignored():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_numbers_have_names():
    from megatron_sorted.training.watch.signals import STOP_SIGNALS, signal_name

    assert (
        [signal_name(number) for number in STOP_SIGNALS]
        == ["SIGTERM", "SIGUSR1"]
        == [s.name for s in map(signal.Signals, STOP_SIGNALS)]
    )
