"""Logits and gradients of a network with given weights, computed by the processes of a test."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_sorted.data.batches import Batch
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.evaluate import EvaluationStep
from megatron_sorted.training.step.build import Model, unwrap
from megatron_sorted.training.step.forward_step import ForwardStep
from megatron_sorted.training.step.train_step import run_schedule, train_step
from tests.support.gather import global_name, shards_of
from tests.support.rank_bodies import load_now, start
from tests.support.tiny import make_samples, micro_batches


def cut_shard(
    name: str, whole: torch.Tensor, dim: int | None, rank: int, size: int
) -> torch.Tensor:
    """Return the part of a whole tensor that tensor parallel rank ``rank`` of ``size`` holds."""
    if dim is None:
        return whole
    if name.endswith(
        ("linear_fc1.weight", "linear_fc1.lora_b")
    ):  # part of the gate, then part of the up projection
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank]


def set_weights(
    model: Model, settings: Settings, weights: dict[str, torch.Tensor], tensor_rank: int
) -> set[str]:
    """Copy in this rank's parts of ``weights``; return the names of the weights that it used."""
    used = set()
    for chunk in model.chunks:
        stage = unwrap(chunk)
        for local, parameter in stage.named_parameters():
            name = global_name(stage, local, not settings.untie_embeddings_and_output_weights)
            whole, dim = (
                weights[name],
                parameter.partition_dim
                if getattr(parameter, "tensor_model_parallel", False)
                else None,
            )
            if "embedding" in name or "output_layer" in name:
                rows = parameter.shape[0] * settings.tensor_model_parallel_size
                whole = F.pad(whole, (0, 0, 0, rows - whole.shape[0]))
            shard = cut_shard(name, whole, dim, tensor_rank, settings.tensor_model_parallel_size)
            assert shard.shape == parameter.shape, (
                f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
            )
            with torch.no_grad():
                parameter.copy_(shard)
            used.add(name)
    return used


def compute_logits(
    model: Model,
    settings: Settings,
    platform,
    tokens_bs: torch.Tensor,
    pieces_bs: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Return {depth: vocabulary shard of the logits [b, s, p]} of this rank's exits.

    They are computed through Megatron's schedule.
    """
    forward_step, logits_of = EvaluationStep(settings, model, platform, None), {}

    def at_exit(micro, depth, hidden_tbh):
        head = micro.chunk.head(depth, micro.attention_mask, hidden_tbh.size(0))
        read_sbh = head.norm(hidden_tbh)
        if settings.sequence_parallel:
            read_sbh = gather_from_sequence_parallel_region(read_sbh)
        logits_of[depth] = F.linear(read_sbh, head.weight_ph).transpose(0, 1).float().cpu()
        return torch.zeros(()) if depth == micro.deepest else hidden_tbh

    forward_step.at_exit = at_exit
    positions_bs = torch.arange(tokens_bs.size(1)).expand(tokens_bs.shape)
    batch = Batch(tokens_bs, tokens_bs, torch.ones(tokens_bs.shape), pieces_bs, positions_bs)
    for chunk in model.chunks:
        chunk.eval()
    with torch.no_grad():
        # chunks take turns in groups of as many micro-batches as there are stages
        repeats = settings.pipeline_model_parallel_size if len(model.chunks) > 1 else 1
        run_schedule(model, settings, forward_step, [batch] * repeats, forward_only=True)
    return logits_of


def logits_of_exits(
    settings: Settings,
    weights: dict[str, torch.Tensor],
    tokens_bs: torch.Tensor,
    pieces_bs: torch.Tensor | None = None,
) -> tuple[int, set[str], dict[int, torch.Tensor]]:
    """Return the tensor parallel rank, the weights it used, and its exits' logits."""
    platform, place, model = start(settings)
    used = set_weights(model, settings, weights, place.tensor_rank)
    return (
        place.tensor_rank,
        used,
        compute_logits(model, settings, platform, tokens_bs, pieces_bs),
    )


def join_logits(
    reports: list[tuple[int, set[str], dict[int, torch.Tensor]]], vocab_size: int
) -> dict[int, torch.Tensor]:
    """Return {depth: logits [b, s, v]} over the real vocabulary from all ranks' reports."""
    shards: dict[int, dict[int, torch.Tensor]] = {}
    for tensor_rank, _, logits_of in reports:
        for depth, logits in logits_of.items():
            shards.setdefault(depth, {})[tensor_rank] = logits
    return {
        depth: torch.cat([of_rank[rank] for rank in sorted(of_rank)], -1)[..., :vocab_size]
        for depth, of_rank in shards.items()
    }


def gradients_of_step(
    settings: Settings, weights: dict[str, torch.Tensor], coefficients: dict[int, float]
) -> dict[str, list]:
    """Return shards (see ``gather.shards_of``) of one step's gradients, on samples of seed 5."""
    platform, place, model = start(settings)
    set_weights(model, settings, weights, place.tensor_rank)
    finalize, kept = model.config.finalize_model_grads_func, {}

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        kept.update(
            shards_of(
                model,
                unwrap,
                lambda p: p.main_grad,
                place.tensor_rank,
                not settings.untie_embeddings_and_output_weights,
            )
        )

    model.config.finalize_model_grads_func = finalize_and_keep
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    train_step(
        model,
        settings,
        ForwardStep(settings, model, platform),
        batches,
        coefficients,
        settings.global_batch_size,
    )
    return kept


def load_and_report(settings: Settings, root: str, tokens_bs: torch.Tensor) -> dict:
    """Return weights and logits of a run that loads from ``root``, before and after one step."""
    platform, place, model = start(settings)
    progress, lines = load_now(settings, root, platform, place, model)
    tied = not settings.untie_embeddings_and_output_weights
    report = {
        "tensor rank": place.tensor_rank,
        "progress": progress,
        "lines": lines,
        "weights": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied),
        "logits": compute_logits(model, settings, platform, tokens_bs),
    }
    for chunk in model.chunks:
        chunk.train()
    samples = make_samples(settings.global_batch_size, settings.seq_length, 5)
    batches = micro_batches(samples, settings, place.data_rank, place.data_size)
    train_step(
        model,
        settings,
        ForwardStep(settings, model, platform),
        batches,
        {settings.num_layers: 1.0},
        settings.global_batch_size,
    )
    return report | {
        "weights after": shards_of(model, unwrap, lambda p: p.data, place.tensor_rank, tied)
    }
