"""Every tensor of a GGUF file compared, bit for bit, with the model's own.

llama.cpp rotates neighbouring channels of LLaMA's and Mistral's queries and keys, Hugging Face's
classes the two halves of a head, so the converter reorders their rows.
"""

import re
from collections.abc import Iterator

import torch

from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.conversion.tensors.memory import same_bits
from megatron_sorted.conversion.tensors.table import tensor_table
from megatron_sorted.llama_cpp.gguf_file import DTYPES, GgufFile
from megatron_sorted.settings.derived import kv_channels

REORDERED = ("llama", "mistral")
"""Families whose queries and keys are reordered."""
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Hugging Face's names in a layer -> llama.cpp's."""
COMPUTED = frozenset({"rope_freqs.weight"})
"""Tensors that the converter computes from config.json."""


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a Hugging Face tensor.

    >>> gguf_name("model.layers.3.self_attn.q_proj.bias")
    'blk.3.attn_q.bias'
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, inner, end = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
    return f"blk.{layer}.{INSIDE[inner]}.{end}"


def reordered(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return rows of queries or keys with channels c and c + d / 2 of each head side by side.

    >>> reordered(torch.arange(8), 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def expected_tensors(network: NetworkOrigin, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the numbers of each tensor as llama.cpp should have it."""
    for pair in tensor_table(network.settings):
        if pair.is_own_exit:
            continue
        tensors = network.model.read_theirs(network.origins[pair.ours])
        for name, tensor in zip(pair.theirs, tensors, strict=True):
            if family in REORDERED and re.search(r"\.(q|k)_proj\.", name):
                tensor = reordered(tensor, kv_channels(network.settings))
            yield gguf_name(name), tensor


def compare_tensors(network: NetworkOrigin, family: str, file: GgufFile) -> tuple[int, list[str]]:
    """Compare a file with its origin.

    Tensors of a quantised type are only counted, by their shape; others are the model's, cast to
    the file's type.

    Returns:
        The number of tensors whose numbers are equal, and a sentence for each problem.
    """
    num_equal, problems, seen = 0, [], set(COMPUTED)
    for name, tensor in expected_tensors(network, family):
        seen.add(name)
        if name not in file.tensors:
            problems.append(f"{name} is missing")
            continue
        stored = file.tensors[name]
        if stored.shape != tuple(tensor.shape):
            problems.append(f"{name} has the shape {list(stored.shape)}, not {list(tensor.shape)}")
        elif stored.kind in DTYPES:
            if same_bits(tensor.to(DTYPES[stored.kind]).contiguous(), file.read(name)):
                num_equal += 1
            else:
                problems.append(f"{name} has other numbers")
    problems += [f"{name} is not the model's" for name in sorted(file.tensors.keys() - seen)]
    return num_equal, problems
