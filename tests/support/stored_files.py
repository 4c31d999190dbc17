"""Checkpoint files from parts of tensors, and tiny Megatron models with known weights."""

import argparse
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

LAYERS, HIDDEN, HEADS, FFN, ROWS = 4, 8, 2, 12, 16


def write_torch_dist(
    directory: Path,
    tensors: dict[str, tuple[torch.Tensor, list]],
    objects: dict[str, Any] | None = None,
) -> None:
    """Write tensors as rectangles [(file, offsets, sizes), ...], and pickled objects."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytearray] = {}
    described, storage = {}, {}

    def put(file: str, value: Any) -> _StorageInfo:
        content = io.BytesIO()
        torch.save(value, content)
        files.setdefault(file, bytearray())
        files[file] += content.getvalue()
        return _StorageInfo(
            file, len(files[file]) - len(content.getvalue()), len(content.getvalue())
        )

    for name, (whole, rectangles) in tensors.items():
        chunks = []
        for file, offsets, sizes in rectangles:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            storage[MetadataIndex(name, offsets)] = put(file, whole[place].clone())
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=whole.dtype), whole.shape, chunks
        )
    for name, value in (objects or {}).items():
        described[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = put("__0_0.distcp", value)
    for file, content in files.items():
        (directory / file).write_bytes(content)
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(described, None, storage)))


def tiny_weights(untied: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of a tiny gated model by the names of a sharded checkpoint."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"embedding.word_embeddings.weight": (ROWS, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"decoder.layers.{i}.{name}": shape
            for name, shape in {
                "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
                "self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
                "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
                "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
                "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
                "mlp.linear_fc2.weight": (HIDDEN, FFN),
            }.items()
        }
    shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    if untied:
        shapes["output_layer.weight"] = (ROWS, HIDDEN)
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }


def tiny_arguments(tp: int, pp: int, **more) -> argparse.Namespace:
    """Return Megatron's arguments of that model."""
    return argparse.Namespace(
        **{
            **{
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "ffn_hidden_size": FFN,
                "seq_length": 32,
                "position_embedding_type": "rope",
                "normalization": "RMSNorm",
                "swiglu": True,
                "add_bias_linear": False,
                "untie_embeddings_and_output_weights": False,
                "padded_vocab_size": ROWS,
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
            },
            **more,
        }
    )


def cut(name: str, whole: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """Return a tensor parallel rank's part of a weight, as Megatron's documentation defines it."""
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat((gate.chunk(tp)[rank], up.chunk(tp)[rank]))
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return whole.chunk(tp)[rank].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(tp, 1)[rank].clone()
    return whole.clone()


OLD_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_norm.weight",
    "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
    "self_attention.linear_proj.weight": "self_attention.dense.weight",
    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
}


def old_stage(
    weights: dict[str, torch.Tensor], tp: int, rank: int, layers: range, tied: bool
) -> dict[str, Any]:
    """Return the nested state that the older ``language_model`` saves of a stage.

    Layers are counted within the stage.
    """
    encoder = {
        f"layers.{n}.{old}": cut(new, weights[f"decoder.layers.{layer}.{new}"], tp, rank)
        for n, layer in enumerate(layers)
        for new, old in OLD_NAMES.items()
    }
    first, last = layers.start == 0, layers.stop == LAYERS
    embedding = cut("word_embeddings.weight", weights["embedding.word_embeddings.weight"], tp, rank)
    state: dict[str, Any] = {"language_model": {"encoder": encoder}}
    if first:
        state["language_model"]["embedding"] = {"word_embeddings": {"weight": embedding}}
    if last:
        encoder["final_norm.weight"] = weights["decoder.final_layernorm.weight"].clone()
        if not tied:
            state["language_model"]["output_layer"] = {
                "weight": cut("output_layer.weight", weights["output_layer.weight"], tp, rank)
            }
        elif not first:
            state["word_embeddings_for_head"] = {"weight": embedding.clone()}
    return state


def write_old(
    directory: Path,
    weights: dict[str, torch.Tensor],
    tp: int = 1,
    pp: int = 1,
    change=lambda state, stage, rank: None,
    **arguments,
) -> None:
    """Write a legacy checkpoint of the older ``language_model``.

    ``change`` may alter a rank's state before it is saved.
    """
    tied = "output_layer.weight" not in weights
    arguments = {"untie_embeddings_and_output_weights": not tied, **arguments}
    for stage in range(pp):
        for rank in range(tp):
            layers = range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)
            state = {
                "args": tiny_arguments(tp, pp, **arguments),
                "checkpoint_version": 3.0,
                "iteration": 7,
                "model": old_stage(weights, tp, rank, layers, tied),
            }
            change(state, stage, rank)
            path = directory / (
                f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}"
            )
            path.mkdir(parents=True)
            torch.save(state, path / "model_optim_rng.pt")
