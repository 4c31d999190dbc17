"""What holds for all tests: the servers from which they start commands and ranks, and what is
printed at the end.
"""

import contextlib
import os
import signal
import tempfile
from pathlib import Path

import megatron_sorted  # noqa: F401  before tests import megatron: see triton_stand_in.py
from megatron_sorted.decoding.native.private_folder import CacheError, private_folder
from tests.support.preloaded.session import close_session, open_session

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: two workers with two threads each get in each other's way


def own_cache() -> Path:
    """Return the tests' cache of compiled libraries: not the user's, and kept for the next session.

    It is beside the tests, or in the temporary folder where others may write to the clone's.
    """
    for path in (
        Path(__file__).parents[1] / ".pytest_cache" / "compiled",
        Path(tempfile.gettempdir()) / f"megatron_sorted-tests-{os.geteuid()}",
    ):
        with contextlib.suppress(CacheError):
            return private_folder(path / "native").parent
    return path


os.environ["MEGATRON_SORTED_CACHE"] = str(own_cache())
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background; programs under test are started as in a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest_plugins = ["tests.support.order", "tests.support.skips", "tests.support.timing"]


def pytest_configure() -> None:
    """Make the folder of the preloaded servers; they start when a test first needs them."""
    open_session()


def pytest_unconfigure() -> None:
    """End them."""
    close_session()
