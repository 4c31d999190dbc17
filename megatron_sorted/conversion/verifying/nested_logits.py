"""Exits of a network in Megatron's layout, computed in plain PyTorch, one matrix at a time.

This is an implementation independent of Megatron and transformers: it uses fused projections as
they are stored. Tests compare it with Megatron's own layers in parallel layouts; `verify` compares
it with transformers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from megatron_sorted.conversion.verifying.streamed import StreamedExit, multiply
from megatron_sorted.rotary import rotary_frequencies
from megatron_sorted.settings.derived import exit_depths, kv_channels, num_query_groups
from megatron_sorted.settings.rope_scaling import rope_of
from megatron_sorted.settings.run import Settings

Read = Callable[[str], torch.Tensor]


def _rotation(settings: Settings, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [s, d] of every position."""
    rope = rope_of(settings)
    frequencies = rotary_frequencies(rope, length)
    angles_sd = (torch.arange(length, dtype=torch.float32)[:, None] * frequencies).repeat(1, 2)
    return angles_sd.cos() * rope.attention_factor, angles_sd.sin() * rope.attention_factor


def _rotate(heads_bnsd: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos_sd, sin_sd = rotation
    left, right = heads_bnsd.chunk(2, -1)
    return heads_bnsd * cos_sd + torch.cat((-right, left), -1) * sin_sd


def nested_exits(
    settings: Settings, read: Read, tokens_bs: torch.Tensor, depths: Sequence[int]
) -> dict[int, StreamedExit]:
    """Compute {depth: exit} in fp32; a depth without an exit uses the last norm and head.

    Args:
        settings: The settings of a network that ``families.family_of_settings`` supports.
        read: A function that reads a tensor by its global name.
        tokens_bs: Token ids [b, s].
        depths: The depths to compute.
    """
    exits: dict[int, StreamedExit] = {}
    with torch.no_grad():
        length = tokens_bs.size(1)
        rotation = _rotation(settings, length)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        # A token (row) attends to itself and those before it, at most a window of tokens.
        visible = (distance >= 0) & (distance < (settings.sliding_window or length))
        hidden_bsh = read("embedding.word_embeddings.weight")[tokens_bs].float()
        for layer in range(max(depths)):
            hidden_bsh = _layer(
                settings,
                lambda name, layer=layer: read(f"decoder.layers.{layer}.{name}"),
                hidden_bsh,
                rotation,
                visible,
            )
            if layer + 1 in depths:
                read_bsh = _after_parts(settings, read, layer + 1, hidden_bsh, rotation, visible)
                exits[layer + 1] = _read_exit(settings, read, layer + 1, read_bsh)
    return exits


def _after_parts(
    settings: Settings,
    read: Read,
    depth: int,
    hidden_bsh: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor,
) -> torch.Tensor:
    """Return the input of an exit's norm: the hidden state after the exit's parts, if any."""
    if depth not in exit_depths(settings)[:-1]:
        return hidden_bsh
    if settings.exit_adapter_rank:
        low_bsr = multiply(hidden_bsh, read(f"exit_adapters.{depth}.down.weight"))
        hidden_bsh = hidden_bsh + multiply(low_bsr, read(f"exit_adapters.{depth}.up.weight"))
    if settings.use_exit_block:
        hidden_bsh = _layer(
            settings,
            lambda name: read(f"exit_blocks.{depth}.{name}"),
            hidden_bsh,
            rotation,
            visible,
        )
    if settings.use_exit_mlp:
        hidden_bsh = _mlp(settings, lambda name: read(f"exit_mlps.{depth}.{name}"), hidden_bsh)
    return hidden_bsh


def _norm(settings: Settings, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:], weight.float(), settings.norm_epsilon)


def _layer(
    settings: Settings,
    read: Read,
    hidden_bsh: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    visible: torch.Tensor,
) -> torch.Tensor:
    """Return the hidden state after one layer."""
    b, s, _ = hidden_bsh.shape
    groups, d = num_query_groups(settings), kv_channels(settings)
    queries = settings.num_attention_heads // groups
    normed = _norm(settings, hidden_bsh, read("self_attention.linear_qkv.layer_norm_weight"))
    bias = read("self_attention.linear_qkv.bias") if settings.add_qkv_bias else None
    fused = multiply(normed, read("self_attention.linear_qkv.weight"), bias).view(
        b, s, groups, queries + 2, d
    )
    query_bnsd = fused[..., :queries, :].reshape(b, s, -1, d).transpose(1, 2)
    key_bgsd, value_bgsd = (
        fused[..., queries, :].transpose(1, 2),
        fused[..., queries + 1, :].transpose(1, 2),
    )
    if settings.qk_layernorm:
        query_bnsd = _norm(settings, query_bnsd, read("self_attention.q_layernorm.weight"))
        key_bgsd = _norm(settings, key_bgsd, read("self_attention.k_layernorm.weight"))
    query_bnsd, key_bgsd = _rotate(query_bnsd, rotation), _rotate(key_bgsd, rotation)
    key_bnsd, value_bnsd = (heads.repeat_interleave(queries, 1) for heads in (key_bgsd, value_bgsd))
    scores = (query_bnsd @ key_bnsd.transpose(-1, -2) / math.sqrt(d)).masked_fill(
        ~visible, float("-inf")
    )
    context_bsh = (scores.softmax(-1) @ value_bnsd).transpose(1, 2).reshape(b, s, -1)
    hidden_bsh = hidden_bsh + multiply(context_bsh, read("self_attention.linear_proj.weight"))
    return _mlp(settings, lambda name: read(f"mlp.{name}"), hidden_bsh)


def _mlp(settings: Settings, read: Read, hidden_bsh: torch.Tensor) -> torch.Tensor:
    """Return the hidden state after a layer's MLP and the norm before it."""
    normed = _norm(settings, hidden_bsh, read("linear_fc1.layer_norm_weight"))
    gate, up = multiply(normed, read("linear_fc1.weight")).chunk(2, -1)
    return hidden_bsh + multiply(functional.silu(gate) * up, read("linear_fc2.weight"))


def _read_exit(
    settings: Settings, read: Read, depth: int, hidden_bsh: torch.Tensor
) -> StreamedExit:
    """Return one exit, without padded rows of the vocabulary."""
    is_own = depth in exit_depths(settings)[:-1]
    norm = (
        f"exit_norms.{depth}.weight"
        if is_own and settings.use_exit_norm
        else "decoder.final_layernorm.weight"
    )
    head = (
        "output_layer.weight"
        if settings.untie_embeddings_and_output_weights
        else "embedding.word_embeddings.weight"
    )
    if is_own and settings.untie_exit_output_weights:
        head = f"exit_output_layers.{depth}.weight"
    return StreamedExit(
        _norm(settings, hidden_bsh, read(norm)), lambda: read(head)[: settings.vocab_size]
    )
