"""Prints the versions of megatron-core that ``make test-npu`` runs: the oldest and the newest.

Of the tested ones those count for which the Ascend stack has a branch.
"""

from megatron_sorted.platform.npu.adaptors import ADAPTORS, branch_for
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED


def versions() -> list[str]:
    """Return the versions, the oldest one first."""
    fitting = [
        version
        for version in MEGATRON_CORE_TESTED
        if branch_for(ADAPTORS["mindspeed"], version) is not None
    ]
    return [fitting[0], fitting[-1]]


if __name__ == "__main__":
    print(*versions())
