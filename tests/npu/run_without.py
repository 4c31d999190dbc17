"""A program that trains a step on an NPU without some of the patches, and saves.

Usage: ``run_without.py FOLDER [PATCH ...]``. A failure ends it with a traceback.
"""

import os
import sys
from pathlib import Path

from megatron_sorted.platform.npu.start import APPLIED_PATCHES, start_npu


def main(folder: str, *left_out: str) -> None:
    """Print the losses of the step and the number of patches applied."""
    os.environ.pop("TORCH_NPU_DEVICE_CAPABILITY", None)
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", TEST_INIT_METHOD=f"file://{folder}/rendezvous"
    )
    start_npu(leave_out=frozenset(left_out))
    from tests.support.rank_bodies import steps_from
    from tests.support.tiny import tiny

    Path(folder, "saved").mkdir()
    settings = tiny(
        device="npu", global_batch_size=2, exit_loss_chunk_tokens=32, use_distributed_optimizer=True
    )
    report = steps_from(settings, f"{folder}/saved", False, 0, 1, True)
    print("losses", report["losses"][0][0], "patches", len(APPLIED_PATCHES), report["outcome"])


if __name__ == "__main__":
    main(*sys.argv[1:])
