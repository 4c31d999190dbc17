"""One process: trains a step on an NPU with some of the mends left out, and saves. ``run_without.py FOLDER [MEND]``; a failure shows."""

import os
import sys
from pathlib import Path

from megatron_sorted.platform.npu.start import MENDED, start_npu


def main(folder: str, *left_out: str) -> None:
    """Prints what the step found, and the mends that were in place."""
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
    print("losses", report["losses"][0][0], "mends", len(MENDED), report["outcome"])


if __name__ == "__main__":
    main(*sys.argv[1:])
