"""Imports of the fork server for all ranks of all tests on NPUs.

No device is used before the ranks are forked.
"""

from megatron_sorted.platform.npu.start import start_npu
from tests.support.own_warnings import raise_own_warnings

raise_own_warnings()
start_npu()

# It imports Megatron, which needs the device's names.
from tests.support import rank_bodies  # noqa: E402

__all__ = ["rank_bodies"]
