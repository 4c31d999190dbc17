"""Under an older megatron-core, what it is refused for is reported as not run, with the refusal; under this project's own nothing is."""

import re

import pytest

from megatron_sorted.platform.versions import ALL, is_at_least


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skips a test whose ranks all say that this megatron-core cannot do what it asks for."""
    try:
        return (yield)
    except AssertionError as error:
        refusal = re.search(
            r"PlatformError: (.*: needs megatron-core .* or later, and .*)", str(error)
        )
        if is_at_least(*ALL) or refusal is None:
            raise
        pytest.skip(refusal[1])
