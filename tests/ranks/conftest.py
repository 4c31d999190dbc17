"""Skips tests of features that an older megatron-core refuses; none under our own version."""

import re

import pytest

from megatron_sorted.platform.versions import ALL, is_at_least


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip a test if all its ranks report that this megatron-core lacks a feature."""
    try:
        return (yield)
    except AssertionError as error:
        refusal = re.search(
            r"PlatformError: (.*: needs megatron-core .* or later, and .*)", str(error)
        )
        if is_at_least(*ALL) or refusal is None:
            raise
        pytest.skip(refusal[1])
