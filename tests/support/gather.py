"""Whole tensors from the shards of ranks, under the reference's names, without Megatron's code."""

import re

import torch
from torch.distributed.tensor import DTensor

RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def global_name(stage, name: str, tied: bool) -> str:
    """Return the reference's name of a parameter of one chunk."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        inner, index = match.group(2), int(match.group(1))
        number = stage.layout.layers_before + index
        if (expert := re.match(r"(mlp\.experts\.local_experts)\.(\d+)\.(.*)", inner)) is not None:
            first = stage.decoder.layers[index].mlp.local_expert_indices[0]
            inner = f"{expert.group(1)}.{first + int(expert.group(2))}.{expert.group(3)}"
        if inner.startswith("pre_mlp_layernorm.") and stage.config.num_moe_experts:
            return f"decoder.layers.{number}.{inner}"
        return f"decoder.layers.{number}.{RENAMED.get(inner, inner)}"
    match = re.match(r"(exit_blocks|exit_mlps)\.(\d+)\.(.*)", name)
    if match:
        kind, depth, inner = match.groups()
        inner = RENAMED.get(inner, inner)
        return f"{kind}.{depth}.{inner.removeprefix('mlp.') if kind == 'exit_mlps' else inner}"
    if name.startswith("final_layernorm."):
        return f"decoder.{name}"
    if name == "output_layer.weight" and tied:
        return "embedding.word_embeddings.weight"
    return name


def rows_by_parameter(model, pick) -> dict[int, DTensor]:
    """Return {id of a fully sharded parameter: ``pick(rows)`` of all ranks as one tensor}."""
    return {
        id(shard.sharded): DTensor.from_local(
            pick(shard.rows).detach(),
            shard.sharded.device_mesh,
            shard.sharded.placements,
            shape=shard.sharded.shape,
            stride=shard.sharded.stride(),
        )
        for chunk in model.chunks
        for shard in getattr(chunk, "row_shards", ())
    }


def join_shards(name: str, shards: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    """Return the whole tensor from its tensor parallel shards; without ``dim`` they are copies."""
    if dim is None or len(shards) == 1:
        return shards[0]
    # every shard of these holds its part of the gate, then of the up projection
    if name.endswith(("linear_fc1.weight", "linear_fc1.lora_b")):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat((*gates, *ups))
    return torch.cat(shards, dim)


def join_ranks(
    per_rank: list[dict],
) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Return whole tensors by name, and all copies of each, from the ranks' ``shards_of``."""
    shards: dict[str, dict[int, list]] = {}
    dims: dict[str, int | None] = {}
    for tensors in per_rank:
        for name, entries in tensors.items():
            for tensor, dim, tensor_rank in entries:
                dims[name] = dim
                shards.setdefault(name, {}).setdefault(tensor_rank, []).append(tensor)
    whole, copies = {}, {}
    for name, by_rank in shards.items():
        whole[name] = join_shards(name, [by_rank[r][0] for r in sorted(by_rank)], dims[name])
        for rank, tensors in by_rank.items():
            copies[f"{name} shard {rank}"] = tensors
    return whole, copies


def shards_of(model, unwrap, pick, tensor_rank: int, tied: bool) -> dict[str, list]:
    """Return ``{global name: [(tensor, partition dim, tensor rank)]}`` of one rank.

    The tensor is ``pick(parameter)``.
    A parameter for which there is none (a frozen one has no gradient) is left out.
    """
    result: dict[str, list] = {}
    for chunk in model.chunks:
        stage = unwrap(chunk)
        for name, parameter in stage.named_parameters():
            dim = (
                parameter.partition_dim
                if getattr(parameter, "tensor_model_parallel", False)
                else None
            )
            if (picked := pick(parameter)) is None:
                continue
            if isinstance(picked, DTensor):  # fully sharded: every rank takes part in gathering it
                picked = picked.full_tensor()
            entry = (picked.detach().float().clone().cpu(), dim, tensor_rank)
            result.setdefault(global_name(stage, name, tied), []).append(entry)
    return result
