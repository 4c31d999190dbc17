"""A plan's bytes of fully sharded runs, against what ranks keep and send."""

import pytest
import torch

from megatron_sorted.dry_run.counting import Counter
from megatron_sorted.planning.devices import DEVICES
from megatron_sorted.planning.estimate import make_plan
from megatron_sorted.planning.messages import messages_of_stage
from megatron_sorted.planning.work import work_of_chunks
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import build_optimizer
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import run_schedule, train_step
from tests.support.layouts import FSDP, OWN, UNTIED
from tests.support.rank_bodies import start
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, micro_batches, tiny

CASES = {
    "dp2": (2, {}),
    "dp2 untied": (2, UNTIED),
    "dp2 own": (2, {**UNTIED, **OWN}),
    "dp2 full recompute": (2, {"recompute_granularity": "full"}),
    "dp4 bf16, one micro-batch": (4, {**UNTIED, "bf16": True}),
}


def kept_and_sent(settings: Settings) -> tuple[int, dict[str, float]]:
    """Return the bytes of this rank's weights, gradients and moments, and the bytes it sends.

    The first are counted after one step, the last in the passes of another.
    """
    platform, place, model = start(settings)
    build_optimizer(model, settings, place.world_size)
    forward_step = ForwardStep(settings, model, platform)
    coefficients = dict.fromkeys(exit_depths(settings), 1.0)
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    train_step(model, settings, forward_step, batches, coefficients, settings.global_batch_size)
    kept = [shard.rows for shard in model.chunks[0].row_shards] + [
        shard.rows.main_grad for shard in model.chunks[0].row_shards
    ]
    for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        for parameter, state in part.optimizer.state.items():
            kept += [
                parameter,
                *(
                    value
                    for value in state.values()
                    if isinstance(value, torch.Tensor) and value.dim()
                ),
            ]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept
    }
    forward_step.coefficients = coefficients
    with Counter() as counter:
        run_schedule(model, settings, forward_step, batches, forward_only=False)
    return sum(storages.values()), dict(counter.collective_bytes)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_counts_what_fully_sharded_ranks_keep_and_send(name):
    world_size, changes = CASES[name]
    settings = tiny(**FSDP, hidden_size=64, ffn_hidden_size=160, **changes)
    plan = make_plan(settings, settings.vocab_size, world_size, DEVICES["cpu"], 256)
    [stage] = plan.stages
    planned = messages_of_stage(
        settings, work_of_chunks(settings), 0, settings.vocab_size, world_size
    )
    for kept, sent in run_ranks(world_size, kept_and_sent, settings):
        assert kept == stage.memory.states
        # scalars, and rows of norms that are cut into equal shares, come on top
        assert sum(sent.values()) == pytest.approx(
            planned.gradients + planned.parameters, rel=1e-3, abs=200
        )
