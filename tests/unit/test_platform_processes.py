"""What the console shows of warnings, and that our own are errors in tests.

tests/system/test_preloaded.py has the same in commands and ranks."""

import logging
import subprocess
import sys

import pytest

from megatron_sorted.platform.processes import UNWANTED_RECORDS, silence_library_warnings
from tests.support.clean_environment import clean_environment
from tests.support.commands import ROOT
from tests.support.own_warnings import warn_as

OURS = ("megatron_sorted.training.run.loop", "lab.demo")
CATEGORIES = (DeprecationWarning, FutureWarning, UserWarning, RuntimeWarning)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("module", OURS)
def test_a_warning_of_our_own_is_an_error_here(module, category):
    with pytest.raises(category, match="to be mended"):
        warn_as(module, category)


def test_a_warning_of_a_library_is_none():
    for module in ("megatron.core", "megatron_other", "torch", "label"):
        warn_as(module, DeprecationWarning)


@pytest.mark.parametrize("logger", UNWANTED_RECORDS)
def test_records_for_programmers_are_dropped_and_others_are_not(logger, monkeypatch):
    silence_library_warnings()
    silence_library_warnings()
    kept = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    library = logging.getLogger(logger)
    monkeypatch.setattr(library, "disabled", False)  # as other tests' libraries may have left it
    monkeypatch.setattr(library, "level", logging.WARNING)
    library.addHandler(handler)
    try:
        library.warning("first: %s, and so on", UNWANTED_RECORDS[logger])
        library.warning("the file is damaged")
    finally:
        library.removeHandler(handler)
    assert kept == ["the file is damaged"]


def test_what_we_hide_of_libraries_names_their_modules_alone():
    """A user's own module, or one of ours, is never hidden."""
    code = (
        "import warnings\n"
        "from megatron_sorted.platform.processes import silence_library_warnings\n"
        "silence_library_warnings()\n"
        "for name in ('megatron.core.x', 'torch.distributed.checkpoint.y', 'megatron_sorted.z',"
        " 'torch.nn', '__main__'):\n"
        "    warnings.warn_explicit(name, UserWarning, name, 1, name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [line.split(":")[0] for line in done.stderr.splitlines() if "UserWarning" in line]
    assert shown == ["megatron_sorted.z", "torch.nn", "__main__"]
