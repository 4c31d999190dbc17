"""A plan's memory of forward, against the tensors that autograd keeps."""

from dataclasses import replace

import pytest
import torch

from megatron_sorted.planning.devices import DEVICES
from megatron_sorted.planning.memory import chunk_bytes
from megatron_sorted.planning.work import work_of_chunks
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import run_schedule
from tests.support.layouts import SANDWICH, TP2, UNTIED
from tests.support.rank_bodies import start
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, micro_batches, tiny

# wide enough that what is kept beside the large tensors (lengths, statistics) is below two percent
WIDE = {
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "global_batch_size": 2,
    "exit_layer_nums": (2,),
}
CASES = {
    "plain": (1, {}),
    "untied, all heads": (1, {**UNTIED, "group_query_attention": False, "num_query_groups": None}),
    "bf16": (1, {"bf16": True}),
    "GELU, layer norms": (1, {"swiglu": False, "normalization": "LayerNorm"}),
    "sandwich": (1, SANDWICH),
    "full recomputation": (1, {"recompute_granularity": "full"}),
    "MLPs again": (1, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}),
    "tp2": (2, TP2),
    "tp2 sequence parallel sandwich": (2, {**TP2, "sequence_parallel": True, **SANDWICH}),
}


def kept_bytes(settings: Settings) -> int:
    """Return the bytes that a micro-batch's forward keeps for backward, without parameters."""
    platform, place, model = start(settings)
    forward_step = ForwardStep(settings, model, platform)
    forward_step.coefficients = dict.fromkeys(exit_depths(settings), 1.0)
    parameters = {
        p.untyped_storage().data_ptr() for chunk in model.chunks for p in chunk.parameters()
    }
    kept: dict[
        int, torch.UntypedStorage
    ] = {}  # storages, so that none is freed and its address used again
    in_forward = [True]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if in_forward[0] and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    honest = forward_step.exits.backward
    forward_step.exits.backward = lambda *given: (
        in_forward.clear(),
        in_forward.append(False),
        honest(*given),
    )[-1]
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_schedule(
            model,
            settings,
            forward_step,
            micro_batches(samples, settings, place.data_rank, place.data_size),
            forward_only=False,
        )
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_a_plan_counts_what_forward_keeps(name):
    world_size, changes = CASES[name]
    settings = tiny(**{**WIDE, **changes})
    [work] = work_of_chunks(settings)
    planned = chunk_bytes(settings, work, settings.vocab_size, DEVICES["cpu"])
    # tokens and rotary angles, kept once, are 9 kB: three percent of what full recomputation keeps
    # of such a small model
    assert run_ranks(world_size, kept_bytes, settings)[0] == pytest.approx(
        planned, rel=0.02, abs=10_000
    )


def test_fused_kernels_keep_less():
    settings = tiny(**WIDE)
    [work] = work_of_chunks(settings)
    cpu = DEVICES["cpu"]
    normed = settings.micro_batch_size * settings.seq_length * settings.hidden_size * 4
    fused = chunk_bytes(settings, work, settings.vocab_size, replace(cpu, fused=True))
    assert (
        chunk_bytes(settings, work, settings.vocab_size, cpu) - fused
        == settings.num_layers * 2 * normed
    )
