"""What the fork server imports once for all ranks of all tests on NPUs; no device is touched before the ranks are forked."""

from megatron_sorted.platform.npu.start import start_npu

start_npu()

from tests.support import rank_bodies  # noqa: E402  imports Megatron, which must find the device's names in place

__all__ = ["rank_bodies"]
