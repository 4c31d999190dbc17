"""Exits of a Hugging Face directory, computed by transformers, one matrix in memory at a time.

Its model classes run unchanged except for linear layers and embedding, which read their matrices at
each call. (The only other modules of `conversion` that import transformers are
`hugging_face.transformers_network` and `nested_exits`, which is copied beside exported models.)
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE
from megatron_sorted.conversion.hugging_face.transformers_network import (
    compute_rotations,
    network_of_config,
)
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.tensors.table import EMBEDDING, HEAD
from megatron_sorted.conversion.verifying.streamed import (
    StreamedEmbedding,
    StreamedExit,
    StreamedLinear,
)
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.derived import exit_depths


def require_transformers() -> None:
    """Check that transformers is installed.

    Raises:
        CheckpointError: It is not installed.
    """
    if find_spec("transformers") is None:
        raise CheckpointError(
            "Verifying compares with transformers, which is not installed. pip install "
            "transformers, or give --no-verify."
        )


def _build(model: OpenModel) -> torch.nn.Module:
    """Return transformers' model of a directory in fp32, with its matrices left on disk."""
    assert model.config is not None
    network = network_of_config(
        model.config, str(model.directory / CONFIG_FILE), torch.float32, "eager"
    )
    compute_rotations(network, str(model.directory / CONFIG_FILE))
    config = network.config
    return _stream(
        network,
        model,
        lambda name: EMBEDDING if name == "lm_head.weight" and config.tie_word_embeddings else name,
    )


def _stream(
    network: torch.nn.Module, model: OpenModel, stored: Callable[[str], str]
) -> torch.nn.Module:
    """Make a transformers module read its matrices at each call; load its norms at once.

    Args:
        network: The module, on the meta device.
        model: The model that holds the tensors.
        stored: A function from a tensor's name in the module to its name in the model.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear):
            bias = stored(f"{name}.bias") if module.bias is not None else None
            replacement: torch.nn.Module = StreamedLinear(
                model.source, stored(f"{name}.weight"), bias
            )
        elif isinstance(module, torch.nn.Embedding):
            replacement = StreamedEmbedding(model.source, stored(f"{name}.weight"))
        else:
            continue
        holder, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(holder), attribute, replacement)
    for name, parameter in list(network.named_parameters()):  # norms
        holder, _, attribute = name.rpartition(".")
        assert parameter.dim() == 1, name
        setattr(
            network.get_submodule(holder),
            attribute,
            torch.nn.Parameter(model.source.read(stored(name)).float(), requires_grad=False),
        )
    return network


def _after_parts(
    model: OpenModel, network: torch.nn.Module, depth: int, hidden_bsh: torch.Tensor, more: dict
) -> torch.Tensor:
    """Return the input of an exit's norm: the hidden state after the exit's parts, if any.

    Args:
        model: The model on disk.
        network: transformers' model of it.
        depth: The depth of the exit.
        hidden_bsh: The hidden state after ``depth`` layers.
        more: The other arguments of the last of these layers: mask and positions.
    """
    settings, layer, own = model.settings, network.model.layers[depth - 1], f"exits.{depth}"
    if depth not in exit_depths(settings)[:-1]:
        return hidden_bsh
    if settings.exit_adapter_rank:
        down, up = (
            StreamedLinear(model.source, f"{own}.adapter.{part}.weight") for part in ("down", "up")
        )
        hidden_bsh = hidden_bsh + up(down(hidden_bsh))
    if settings.use_exit_block:
        with torch.device("meta"):
            block = type(layer)(network.config, depth)
        output = _stream(block, model, lambda name: f"{own}.block.{name}")(hidden_bsh, **more)
        hidden_bsh = output[0] if isinstance(output, tuple) else output
    if settings.use_exit_mlp:
        with torch.device("meta"):
            mlp = type(layer.mlp)(network.config)
        mlp = _stream(mlp, model, lambda name: f"{own}.mlp.{name}")
        hidden_bsh = hidden_bsh + mlp(_norm(model, network, f"{own}.mlp.norm.weight")(hidden_bsh))
    return hidden_bsh


def _norm(model: OpenModel, network: torch.nn.Module, stored: str) -> torch.nn.Module:
    """Return a norm like the model's last one with a stored weight."""
    norm = type(network.model.norm)(model.settings.hidden_size, eps=model.settings.norm_epsilon)
    norm.weight = torch.nn.Parameter(model.source.read(stored).float(), requires_grad=False)
    return norm


def transformers_exits(
    model: OpenModel, tokens_bs: torch.Tensor, depths: Sequence[int]
) -> dict[int, StreamedExit]:
    """Compute {depth: exit} with transformers' own classes in fp32.

    Raises:
        CheckpointError: transformers is not installed.
    """
    require_transformers()
    with torch.no_grad():
        network, states = _build(model), {}

        def keep(depth: int) -> Callable[..., None]:
            def hook(_module, _inputs, more, output):
                hidden_bsh = output[0] if isinstance(output, tuple) else output
                states[depth] = _after_parts(model, network, depth, hidden_bsh, more)

            return hook

        hooks = [
            network.model.layers[depth - 1].register_forward_hook(keep(depth), with_kwargs=True)
            for depth in depths
        ]
        network.model(tokens_bs, use_cache=False)
        for hook in hooks:
            hook.remove()
        exits = {}
        for depth in depths:
            norm, head = (
                network.model.norm,
                EMBEDDING if network.config.tie_word_embeddings else HEAD,
            )
            is_own = depth in exit_depths(model.settings)[:-1]
            if is_own and model.settings.use_exit_norm:
                norm = _norm(model, network, f"exits.{depth}.norm.weight")
            if is_own and model.settings.untie_exit_output_weights:
                head = f"exits.{depth}.lm_head.weight"
            exits[depth] = StreamedExit(
                norm(states[depth]), lambda head=head: model.source.read(head)
            )
    return exits
