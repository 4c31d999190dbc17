"""What the fork server imports once for all measured processes."""

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402

import megatron_sorted.training.step  # noqa: E402
from megatron_sorted.platform.select import choose_platform  # noqa: E402

torch.set_num_threads(1)
choose_platform("cpu").prepare()
__all__ = ["megatron_sorted"]
