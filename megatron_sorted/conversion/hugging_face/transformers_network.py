"""A transformers model built from a config.json and tensors that were read here.

transformers never sees the directory. It is given the keys that describe a network of the four
families, and no others: no other entry of a config.json (kernels, code, quantiser, adapter, file or
repository to fetch) has an effect.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_sorted.conversion.hugging_face.config_rules import REMEDY, VALUE_RULES, check_config
from megatron_sorted.conversion.hugging_face.families import family_of_config
from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_config
from megatron_sorted.conversion.tensors.source import TensorSource
from megatron_sorted.conversion.tensors.table import check_shapes, check_tied
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

SEPARATE_KEYS = ("dtype", "torch_dtype")
OLDER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Keys of transformers 4 that later versions still accept."""
DECIMAL = ("rms_norm_eps", "initializer_range")
MAX_REASON = 300
"""Most characters of another library's error message that are passed on."""


def config_for_transformers(config: Mapping[str, Any], where: str) -> "PreTrainedConfig":
    """Return transformers' config of the network that a config.json describes.

    Args:
        config: The content, as ``families.read_config`` returns it.
        where: The file's name, for messages.

    Raises:
        CheckpointError: Its family is not supported, or ``config_rules`` or transformers refuse a
            value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = family_of_config(config, where)
    check_config(config, where)
    rope_of_config({**family.absent, **config}, where)
    transformers_config = CONFIG_MAPPING[family.model_type]
    known = {field.name for field in dataclasses.fields(transformers_config)} | set(OLDER_KEYS)
    values = {
        key: float(config[key]) if key in DECIMAL else config[key]
        for key in VALUE_RULES
        if key in config and key in known and key not in SEPARATE_KEYS
    }
    with _as_checkpoint_errors(where):
        return transformers_config(**values, architectures=[family.architecture])


def network_of_config(
    config: Mapping[str, Any], where: str, dtype: torch.dtype, attention: str
) -> nn.Module:
    """Return a model whose parameters and rotary frequencies are on the meta device.

    Args:
        config: The content, as ``families.read_config`` returns it.
        where: The file's name, for messages.
        dtype: The data type.
        attention: transformers' name of one of its attention implementations.

    Raises:
        CheckpointError: ``config_for_transformers`` fails.
    """
    from transformers import AutoModelForCausalLM

    transformers_config = config_for_transformers(config, where)
    with _as_checkpoint_errors(where), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = AutoModelForCausalLM.from_config(
            transformers_config, dtype=dtype, attn_implementation=attention
        ).eval()
    return network


def compute_rotations(network: nn.Module, where: str) -> None:
    """Compute the frequencies of rotary positions, which no file holds.

    The head size must have been compared with the files, as memory is allocated for it.

    Raises:
        CheckpointError: transformers refuses the values of config.json.
    """
    with _as_checkpoint_errors(where):
        network.model.rotary_emb = type(network.model.rotary_emb)(network.config)


def fill_network(network: nn.Module, source: TensorSource, where: str) -> None:
    """Load the weights of a model of ``network_of_config``, one tensor at a time.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape, cannot be read, or a tied
            head differs from the embedding.
    """
    parameters = dict(network.named_parameters())
    if check_shapes(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        source.tensors,
        where,
    ):
        check_tied(source, where)
    for name, parameter in parameters.items():
        holder, _, attribute = name.rpartition(".")
        tensor = source.read(name).to(parameter.dtype)
        setattr(network.get_submodule(holder), attribute, nn.Parameter(tensor, requires_grad=False))
    compute_rotations(network, where)
    network.tie_weights()
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


@contextmanager
def _as_checkpoint_errors(where: str) -> "Iterator[None]":
    """Re-raise every error of transformers, which may be of any class, as a CheckpointError."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of any class
        reason = shown(" ".join(str(error).split()) or type(error).__name__, MAX_REASON)
        raise CheckpointError(f"{where}: transformers refuses it: {reason}. {REMEDY}") from error
