"""A transformer block cut at its exits, so that Megatron's own forward runs from one exit to the next."""

import copy

import torch
from megatron.core.transformer.transformer_block import TransformerBlock


def cut_block(block: TransformerBlock, ends: list[int]) -> tuple[TransformerBlock, ...]:
    """Returns views of ``block`` that each own a slice of its layers; run one after another they equal the whole block.

    A segment is a shallow copy: it shares layers, configuration and hooks with the block, so parameters, state-dict keys,
    recomputation and hooks are those of the block. Segments take their input as an argument, also on later pipeline stages.

    Args:
        block: The layers of one chunk.
        ends: Number of layers of the chunk after which each segment ends; increasing, the last is all of them.
    """
    assert ends == sorted(set(ends)) and ends[-1] == len(block.layers), f"segment ends {ends} for {len(block.layers)} layers"
    segments = []
    for start, end in zip([0, *ends], ends, strict=False):
        segment = copy.copy(block)
        segment._modules = dict(block._modules)  # copy.copy shares this dictionary with the block
        segment.layers = torch.nn.ModuleList(block.layers[start:end])
        segment.num_layers_per_pipeline_rank = end - start
        segment.pre_process = True
        segments.append(segment)
    return tuple(segments)
