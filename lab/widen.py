"""Write a wider model that computes the same function as a trained one.

    python -m lab.widen MODEL OUTPUT --factor 4

Measurements of speed need weights that do not fit into a cache, measurements of speculation need
exits that were really trained: training both takes days. So a small model is trained and widened.
Every channel of the hidden state, every head (with its keys and values) and every unit of an MLP is
repeated FACTOR times, and the matrices whose inputs are repeated are divided by FACTOR. A norm sees
the same root mean square, a head the same width, and every exit returns the same logits, up to
rounding. (Function-preserving widening: Chen et al. 2016, Net2Net, arXiv 1511.05641, section 2.2.)

The logits of every exit are compared before the directory takes its name.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.conversion.hugging_face.families import (
    CONFIG_FILE,
    EXITS_FILE,
    family_of_config,
    read_config,
)
from megatron_sorted.conversion.hugging_face.nested_exits import NestedExits
from megatron_sorted.conversion.hugging_face.safetensors_files import (
    INDEX,
    SINGLE,
    SafetensorsFile,
    SafetensorsWriter,
)
from megatron_sorted.conversion.hugging_face.weight_files import HuggingFaceFiles
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.exported.load import load_with_exits
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.shown import shown

TOLERANCE = 1e-4
"""Largest difference of two logits."""
TOKENS = 64
LEFT_OUT = ("decoding.json", INDEX)
"""Files that describe the narrow model alone: its fastest decoding options, its weight files."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")


def widened_config(config: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return the config.json of the wider model; the size of a head stays."""
    family, heads = family_of_config(config, CONFIG_FILE), config["num_attention_heads"]
    pairs = config.get("num_key_value_heads") or family.absent.get("num_key_value_heads") or heads
    return {
        **config,
        "hidden_size": factor * config["hidden_size"],
        "intermediate_size": factor * config["intermediate_size"],
        "num_attention_heads": factor * heads,
        "num_key_value_heads": factor * pairs,
    }


def widened(name: str, tensor: torch.Tensor, factor: int, tied: bool) -> torch.Tensor:
    """Return a tensor of the wider model.

    Copies lie one after another, so that copy i of the query heads reads copy i of the heads of
    keys and values: their grouping stays. Where the head is the embedding, which cannot be divided,
    the norms before the heads are divided instead, and no head is.

    Args:
        name: Name in the directory.
        tensor: The tensor of the narrow model.
        factor: Number of copies.
        tied: Whether the model's head is its embedding.

    Raises:
        CheckpointError: It is no tensor of a known model.
    """
    *before, module, kind = name.split(".")
    if kind == "bias" and module in PROJECTIONS:
        return tensor.repeat(factor)
    if kind != "weight":
        raise CheckpointError(f"{shown(name)}: it is not known how to widen it.")
    if module in PROJECTIONS:
        return tensor.repeat(factor, factor) / factor
    if module == "embed_tokens" or (module == "lm_head" and tied):
        return tensor.repeat(1, factor)
    if module in ("lm_head", "down"):  # a head; the first matrix of an exit adapter
        return tensor.repeat(1, factor) / factor
    if module == "up":
        return tensor.repeat(factor, 1)
    if module in HEAD_NORMS:
        return tensor
    if module in LAYER_NORMS or (module == "norm" and before[-1:] == ["mlp"]):
        return tensor.repeat(factor)
    if module == "norm":
        return tensor.repeat(factor) / (factor if tied else 1)
    raise CheckpointError(f"{shown(name)}: it is not known how to widen it.")


def write_widened(
    source: TensorSource, directory: Path, file: str, factor: int, tied: bool, index: bool
) -> None:
    """Write one file of the wider model's tensors, one at a time.

    Args:
        source: The narrow model's tensors.
        directory: Where to write.
        file: Name of the file.
        factor, tied: See `widened`.
        index: Whether to write an index beside it.
    """
    infos = {}
    for name, info in source.tensors.items():
        on_meta = torch.empty(info.shape, dtype=info.dtype, device="meta")
        infos[name] = TensorInfo(tuple(widened(name, on_meta, factor, tied).shape), info.dtype)
    writer = SafetensorsWriter(directory, infos, 1 << 62, file, always_index=index)
    for name in infos:
        writer.write(name, widened(name, source.read(name), factor, tied))
    writer.close()


@torch.inference_mode()
def largest_difference(narrow: Path, wide: Path) -> float:
    """Return the largest difference of two logits of the same exit, over all exits, in float32."""
    logits = []
    for directory in (narrow, wide):
        model = NestedExits(*load_with_exits(directory, torch.float32))
        chance = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.base.config.vocab_size, (2, TOKENS), generator=chance)
        logits.append({depth: model(tokens, depth) for depth in model.depths})
    assert logits[0].keys() == logits[1].keys()
    return max(float((logits[0][depth] - logits[1][depth]).abs().max()) for depth in logits[0])


def widen(model: Path, output: Path, factor: int) -> float:
    """Write a wider model; return the largest difference of its logits.

    Args:
        model: Hugging Face directory, with or without exits.
        output: The directory to write.
        factor: Number of copies of every channel, head and unit.

    Raises:
        CheckpointError: The model is not complete or of no known kind, the output exists, or its
            logits differ.
        SettingsError: The factor is below 2.
    """
    if factor < 2:
        raise SettingsError(f"--factor: {factor} does not widen the model. Use at least 2.")
    if output.exists():
        raise CheckpointError(f"{shown(output)}: exists. Give a new directory.")
    config = read_config(model)
    source = HuggingFaceFiles(model)
    tied = "lm_head.weight" not in source.tensors
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in LEFT_OUT:
            shutil.copy(file, partial)
    write_text_atomically(
        partial / CONFIG_FILE, json.dumps(widened_config(config, factor), indent=2) + "\n"
    )
    exits = model / EXITS_FILE
    write_widened(source, partial, SINGLE, factor, tied, exits.is_file())
    if exits.is_file():
        write_widened(SafetensorsFile(exits), partial, EXITS_FILE, factor, tied, False)
    difference = largest_difference(model, partial)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{shown(partial)}: a logit differs by {difference:.1e} from the narrow model's, more "
            f"than {TOLERANCE:g}. Store the narrow model in float32."
        )
    partial.rename(output)
    return difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Widen a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--factor", type=int, default=4, help="(%(default)s)")
    values = parser.parse_args(arguments)
    difference = widen(values.model, values.output, values.factor)
    print(f"{values.output}: logits of every exit within {difference:.1e} of {values.model}")


if __name__ == "__main__":
    run_main(main, "Nothing was written.")
