"""Imports of training on CPUs, in the order of ``pretrain_sorted.py``, and of torchrun."""

import importlib

from megatron_sorted.platform.processes import keep_device_packages_out, silence_library_warnings
from tests.support.own_warnings import raise_own_warnings

keep_device_packages_out()
silence_library_warnings()
raise_own_warnings()

import torch  # noqa: E402, F401

from megatron_sorted.platform.cpu import keep_unused_out  # noqa: E402

keep_unused_out()

NAMES = """
    megatron.core.parallel_state megatron_sorted.conversion.starting_settings
    megatron_sorted.settings.load
    megatron_sorted.training.run.loop megatron_sorted.training.step.train_step numpy
    safetensors.torch sentencepiece tokenizers torch._dynamo torch.distributed.run
    torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
"""

for name in NAMES.split():
    importlib.import_module(name)
