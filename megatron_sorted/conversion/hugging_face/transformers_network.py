"""A model of transformers made of a config.json and tensors that were read here.

transformers is not shown the directory. It is given the keys that describe a network of the four families, and no others: whatever
else a config.json says (which kernels, code, quantiser, adapter, file or repository to fetch) reaches nothing.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_sorted.conversion.hugging_face.config_rules import REMEDY, RULES, check_config
from megatron_sorted.conversion.hugging_face.families import family_of_config
from megatron_sorted.conversion.tensors.source import TensorSource
from megatron_sorted.conversion.tensors.table import check_shapes, check_tied
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig

NOT_OF_THE_CONFIG = ("dtype", "torch_dtype")
OLDER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Of transformers 4, which later ones still take."""
DECIMAL = ("rms_norm_eps", "initializer_range")
MOST_REASON = 300
"""Letters of another library's words that are passed on."""


def config_for_transformers(config: Mapping[str, Any], where: str) -> "PreTrainedConfig":
    """Return transformers' config of what a config.json says of its network.

    Args:
        config: Of ``families.read_config``.
        where: Its name, for messages.

    Raises:
        CheckpointError: Its family is not supported, or a value is not what ``config_rules`` or transformers ask for.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = family_of_config(config, where)
    check_config(config, where)
    made = CONFIG_MAPPING[family.model_type]
    known = {field.name for field in dataclasses.fields(made)} | set(OLDER_KEYS)
    words = {
        key: float(config[key]) if key in DECIMAL else config[key]
        for key in RULES
        if key in config and key in known and key not in NOT_OF_THE_CONFIG
    }
    with _in_plain_words(where):
        return made(**words, architectures=[family.architecture])


def network_of_config(
    config: Mapping[str, Any], where: str, dtype: torch.dtype, attention: str
) -> nn.Module:
    """Return a model whose parameters and rotary frequencies are on no device yet.

    Args:
        config: Of ``families.read_config``.
        where: Its name, for messages.
        dtype: Kind of numbers.
        attention: transformers' name of an implementation of its own.

    Raises:
        CheckpointError: As for ``config_for_transformers``.
    """
    from transformers import AutoModelForCausalLM

    made = config_for_transformers(config, where)
    with _in_plain_words(where), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = AutoModelForCausalLM.from_config(
            made, dtype=dtype, attn_implementation=attention
        ).eval()
    return network


def compute_rotations(network: nn.Module, where: str) -> None:
    """Compute the frequencies of rotary positions, which are in no file; only for a head size that the files have been found to have.

    Raises:
        CheckpointError: transformers refuses what config.json says of them.
    """
    with _in_plain_words(where):
        network.model.rotary_emb = type(network.model.rotary_emb)(network.config)


def fill_network(network: nn.Module, source: TensorSource, where: str) -> None:
    """Give a model of ``network_of_config`` its weights, one tensor at a time.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape, cannot be read, or a tied head differs from the embedding.
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
def _in_plain_words(where: str) -> "Iterator[None]":
    """Pass on what transformers says of a config; it and what it calls raise what they like, also ZeroDivisionError."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, MOST_REASON)
        raise CheckpointError(f"{where}: transformers refuses it: {reason}. {REMEDY}") from error
