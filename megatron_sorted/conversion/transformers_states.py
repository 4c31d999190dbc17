"""What transformers computes from a Hugging Face directory at every depth, with one matrix in memory at a time.

The only file of this folder that imports transformers: its own model classes run unchanged, but for their linear layers and embedding,
which read a matrix when they are called.
"""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.streamed import ReadExit, StreamedEmbedding, StreamedLinear
from megatron_sorted.conversion.tensor_table import EMBEDDING, HEAD
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.derived import exit_depths


def require_transformers() -> None:
    """Returns nothing if transformers is installed.

    Raises:
        CheckpointError: It is not.
    """
    if find_spec("transformers") is None:
        raise CheckpointError("Verifying compares with transformers, which is not installed. pip install transformers, or give "
                              "--no-verify.")


def _build(model: OpenModel) -> torch.nn.Module:
    """Returns transformers' model of a directory in fp32, its matrices on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**model.config, "torch_dtype": "float32", "dtype": "float32"})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear):
            stored = EMBEDDING if name == "lm_head" and config.tie_word_embeddings else f"{name}.weight"
            replacement = StreamedLinear(model.source, stored, f"{name}.bias" if module.bias is not None else None)
        elif isinstance(module, torch.nn.Embedding):
            replacement = StreamedEmbedding(model.source, f"{name}.weight")
        else:
            continue
        holder, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(holder), attribute, replacement)
    for name, parameter in list(network.named_parameters()):  # norms
        holder, _, attribute = name.rpartition(".")
        assert parameter.dim() == 1, name
        setattr(network.get_submodule(holder), attribute, torch.nn.Parameter(model.source.read(name).float(), requires_grad=False))
    network.model.rotary_emb = type(network.model.rotary_emb)(config)  # its frequencies are computed, and were on no device
    return network


def transformers_exits(model: OpenModel, tokens_bs: torch.Tensor, depths: Sequence[int]) -> dict[int, ReadExit]:
    """Returns {depth: exit} as transformers' own classes compute it in fp32.

    Raises:
        CheckpointError: transformers is not installed.
    """
    require_transformers()
    with torch.no_grad():
        network, states = _build(model), {}
        hooks = [network.model.layers[depth - 1].register_forward_hook(
            lambda _module, _inputs, output, depth=depth: states.__setitem__(depth, output[0] if isinstance(output, tuple) else output))
            for depth in depths]
        network.model(tokens_bs, use_cache=False)
        for hook in hooks:
            hook.remove()
        exits = {}
        for depth in depths:
            norm, head = network.model.norm, EMBEDDING if network.config.tie_word_embeddings else HEAD
            is_own = depth in exit_depths(model.settings)[:-1]
            if is_own and model.settings.use_exit_norm:
                norm = type(norm)(model.settings.hidden_size, eps=model.settings.norm_epsilon)
                norm.weight = torch.nn.Parameter(model.source.read(f"exits.{depth}.norm.weight").float(), requires_grad=False)
            if is_own and model.settings.untie_exit_output_weights:
                head = f"exits.{depth}.lm_head.weight"
            exits[depth] = ReadExit(norm(states[depth]), lambda head=head: model.source.read(head))
    return exits
