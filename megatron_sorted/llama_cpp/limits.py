"""What llama.cpp cannot do, named before anything is written."""

from collections.abc import Sequence

from megatron_sorted.conversion.hugging_face.config_settings import config_of_settings
from megatron_sorted.conversion.open_model import OpenModel
from megatron_sorted.conversion.origins import NetworkOrigin
from megatron_sorted.conversion.submodel import cut_submodel
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.derived import exit_depths, max_position_embeddings
from megatron_sorted.settings.rope_scaling import scaling_type
from megatron_sorted.settings.run import Settings

BLOCK, LARGE_BLOCK = 32, 256
"""Columns of a block of Q8_0, and of the types with a K."""


def chosen_depths(model: OpenModel, depths: Sequence[int] | None) -> tuple[int, ...]:
    """Return the depths to convert, increasing: by default every exit."""
    return tuple(sorted(set(depths or exit_depths(model.settings))))


def cut_networks(model: OpenModel, depths: Sequence[int]) -> dict[int, NetworkOrigin]:
    """Return the sub-model of each depth, after checking that llama.cpp can compute it.

    Raises:
        SettingsError: A depth cannot be cut out (`submodel.check_depth`).
        CheckpointError: llama.cpp computes something else, or the model has no tokenizer.
    """
    if model.open_tokenizer() is None:
        raise CheckpointError(
            f"{model.directory}: it has no tokenizer, and a GGUF file holds one. Put the "
            "tokenizer's files beside the weights."
        )
    _check_rope(model)
    return {depth: cut_submodel(model, depth) for depth in depths}


def _check_rope(model: OpenModel) -> None:
    """Check that llama.cpp computes the model's rotary frequencies."""
    kind, family = scaling_type(model.settings), family_of(model)
    if model.settings.rope_resonance or kind not in ("default", "linear", "llama3"):
        shown = f"{kind} with resonance" if model.settings.rope_resonance else kind
        raise CheckpointError(
            f"{model.directory}: rope scaling {shown}, and llama.cpp's numbers for it have not "
            "been compared with the model's. Types that are converted: default, linear, llama3."
        )
    if kind == "llama3" and family not in ("llama", "mistral"):
        raise CheckpointError(
            f"{model.directory}: rope scaling llama3 in a model of type {family} is dropped by "
            "llama.cpp's converter, which would change every number. Such a model cannot run "
            "there."
        )


def family_of(model: OpenModel) -> str:
    """Return the model_type that an export writes.

    Raises:
        CheckpointError: No Hugging Face family computes the network.
    """
    return config_of_settings(model.settings, "float32", model.config)["model_type"]


def context_length(settings: Settings) -> int:
    """Return the longest text that llama.cpp computes as the model was trained, in tokens.

    llama.cpp attends to all tokens in LLaMA's and Mistral's networks, so that a text longer than
    the model's window would be computed differently.
    """
    return min(max_position_embeddings(settings), settings.sliding_window or 1 << 62)


def notes_on(settings: Settings, types: Sequence[str]) -> list[str]:
    """Return lines about what differs from the model, although it is converted."""
    lines = []
    if context_length(settings) < max_position_embeddings(settings):
        lines.append(
            f"the context is limited to the sliding window, {context_length(settings)} tokens: "
            "llama.cpp attends to all tokens in this family"
        )
    columns = settings.hidden_size
    quantised = [name for name in types if name not in ("f32", "f16", "bf16")]
    with_blocks = [name for name in quantised if columns % LARGE_BLOCK and "_k" in name]
    if columns % BLOCK and quantised:
        lines.append(
            f"hidden size {columns} is no multiple of {BLOCK}: matrices of {', '.join(quantised)} "
            "files stay in 16 bits"
        )
    elif with_blocks:
        lines.append(
            f"hidden size {columns} is no multiple of {LARGE_BLOCK}: files of "
            f"{', '.join(with_blocks)} hold most matrices in larger types instead"
        )
    return lines
