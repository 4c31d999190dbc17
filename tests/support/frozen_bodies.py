"""The work of the processes in tests/ranks/test_frozen_base.py."""

import torch

from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.derived import trained_exits
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.checkpoints import Checkpoints
from megatron_sorted.training.run.evaluate import Evaluator
from megatron_sorted.training.run.inputs import find_checkpoints
from megatron_sorted.training.step.build import unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.reduce import reduce_ledger
from megatron_sorted.training.step.train_step import run_schedule, train_step
from tests.support.gather import shards_of
from tests.support.rank_bodies import start
from tests.support.tiny import InstructionSource, make_samples, micro_batches


def train_frozen(settings: Settings, steps: int) -> dict:
    """Train on one batch and report on this rank.

    Returns the frozen parameters before and after, the first and last losses, and the evaluated
    exits.
    """
    from megatron_sorted.data.samples.dataset import EvaluationSet

    platform, place, model = start(settings)
    stages = [unwrap(chunk) for chunk in model.chunks]
    frozen = {
        name: p.data.clone()
        for stage in stages
        for name, p in stage.named_parameters()
        if not p.requires_grad
    }
    forward_step, rule, losses = (
        ForwardStep(settings, model, platform),
        coefficient_rule(settings),
        [],
    )
    samples = make_samples(settings.global_batch_size, settings.seq_length, 100)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    for step in range(steps):
        result = train_step(
            model,
            settings,
            forward_step,
            batches,
            trained_exits(settings, rule, step),
            settings.global_batch_size,
        )
        assert result.stepped and result.grad_norm > 0
        if step in (0, steps - 1):
            losses.append(
                {
                    depth: e.loss
                    for depth, e in reduce_ledger(forward_step.ledger, settings).exits.items()
                }
            )
    report = Evaluator(
        settings, model, platform, place, "set", EvaluationSet(InstructionSource())
    ).run(0, lambda *_: None)
    after = {name: p.data for stage in stages for name, p in stage.named_parameters()}
    return {
        "frozen": {name: (tensor, after[name]) for name, tensor in frozen.items()},
        "losses": losses,
        "evaluated": set(report.exits),
    }


def optimizer_bytes(settings: Settings) -> dict[str, int]:
    """Return the number of trained parameters, and the bytes of moments and gradient buffers."""
    platform, place, model = start(settings)
    forward_step, rule = ForwardStep(settings, model, platform), coefficient_rule(settings)
    batches = micro_batches(
        make_samples(settings.global_batch_size, settings.seq_length, 5),
        settings,
        place.data_rank,
        place.data_size,
    )
    train_step(
        model,
        settings,
        forward_step,
        batches,
        trained_exits(settings, rule, 0),
        settings.global_batch_size,
    )
    moments = sum(
        tensor.numel() * tensor.element_size()
        for one in model.optimizer.chained_optimizers
        for state in one.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    gradients = sum(
        buffer.grad_data.numel() * buffer.grad_data.element_size()
        for chunk in model.chunks
        for buffer in chunk.buffers
    )
    trained = sum(
        p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad
    )
    # Megatron begins every parameter of a distributed optimizer at a multiple of 64 elements, and
    # ends a bucket at one of 128
    padding = 4 * (
        64 * sum(len(buffer.params) for chunk in model.chunks for buffer in chunk.buffers) + 128
    )
    return {"trained": trained, "moments": moments, "gradients": gradients, "padding": padding}


def activations_kept(settings: Settings) -> dict[str, int]:
    """Return the tensors one step keeps for backward here, and how often a layer's backward ran."""
    platform, place, model = start(settings)
    counts = {"backwards": 0, "layers with a graph": 0, "saved bytes": 0, "exits and chunks": 0}
    stages = [unwrap(chunk) for chunk in model.chunks]

    def count(kind: str, number: int = 1):
        counts[kind] += number

    def after_layer(_module, _inputs, output):
        hidden = output[0]
        if hidden.requires_grad:
            count("layers with a graph")
            hidden.register_hook(lambda gradient: count("backwards"))

    for stage in stages:
        for layer in stage.decoder.layers:
            layer.register_forward_hook(after_layer)
    weights = {p.data_ptr() for stage in stages for p in stage.parameters()}
    forward_step = ForwardStep(settings, model, platform)
    forward_step.coefficients = trained_exits(settings, coefficient_rule(settings), 0)
    batches = micro_batches(
        make_samples(settings.global_batch_size, settings.seq_length, 5),
        settings,
        place.data_rank,
        place.data_size,
    )
    in_exit = [0]
    honest = forward_step.losses.compute

    def exit_loss(*arguments):  # an exit's tensors are freed when its backward ends
        in_exit[0] += 1
        try:
            return honest(*arguments)
        finally:
            in_exit[0] -= 1

    forward_step.losses.compute = exit_loss

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not in_exit[0] and tensor.data_ptr() not in weights:
            count("saved bytes", tensor.numel() * tensor.element_size())
        return tensor

    counts["exits and chunks"] = len(batches) * sum(len(stage.depths) + 1 for stage in stages)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_schedule(model, settings, forward_step, batches, forward_only=False)
    return counts


def begin_from(settings: Settings) -> tuple[dict, list[str]]:
    """Return this rank's weight shards and the log of a run that starts from ``settings.load``."""
    platform, place, model = start(settings)
    logged: list[str] = []
    checkpoints = Checkpoints(
        settings, platform, place, model, coefficient_rule(settings), logged.append
    )
    checkpoints.load(find_checkpoints(settings, None, None).usable[0])
    for chunk in model.chunks:
        if settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    tied = not settings.untie_embeddings_and_output_weights
    return shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied), logged
