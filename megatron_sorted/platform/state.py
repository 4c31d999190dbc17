"""The current device and its random state, by the same functions on every platform.

Megatron's functions have names of CUDA; other platforms redirect them (see ``cpu.py``).
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection


def current_device() -> torch.device | int:
    """Return the device of this process, for torch's factories."""
    return torch.cuda.current_device()


def seed_everything(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed the initial weights and dropout.

    Data parallel ranks use the same numbers; tensor parallel ranks use different ones for shards.
    """
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.tp.rank(), ep_rank=groups.ep.rank(), etp_rank=groups.expt_tp.rank()
    )


def random_tracker():
    """Return Megatron's tracker of the random states that differ between tensor parallel ranks."""
    return tensor_parallel.get_cuda_rng_tracker()


def random_state() -> dict:
    """Return the random state of host, device and tracker."""
    return {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": random_tracker().get_states(),
    }


def set_random_state(state: dict) -> None:
    """Restore a state that ``random_state`` returned."""
    torch.set_rng_state(state["host"])
    torch.cuda.set_rng_state(state["device"])
    random_tracker().set_states(state["tracker"])
