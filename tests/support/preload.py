"""What the fork server imports once for all ranks of all tests."""

import torch
from megatron.core import parallel_state

import megatron_sorted.training.step
from megatron_sorted.platform.select import choose_platform

torch.set_num_threads(1)
choose_platform("cpu").prepare()
__all__ = ["megatron_sorted", "parallel_state"]
