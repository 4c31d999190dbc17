"""Correspondence of our tensors and those of a Hugging Face directory, every name exactly once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megatron_sorted.conversion.tensors.operations import (
    Copy,
    Operation,
    QueryKeyValue,
    Shape,
    Stack,
    Vocabulary,
)
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.derived import exit_depths, num_query_groups
from megatron_sorted.settings.matrices import layer_shapes
from megatron_sorted.settings.run import Settings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER_NORM, OUR_LAYER_NORM = (
    "model.layers.{}.input_layernorm.weight",
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight",
)
MAX_NAME = 100
# Older files also store these tensors, which are computed from config.json.
COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorPair:
    """One tensor of ours and the tensors of Hugging Face (theirs) that it corresponds to.

    Attributes:
        ours: The global name in a sharded checkpoint, with the layer's index.
        theirs: The names in the Hugging Face directory, in the order of the operation.
        shapes: The shapes of theirs that the settings require.
        operation: The operation that joins theirs into ours.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    operation: Operation

    @property
    def shape(self) -> Shape:
        """Shape of our tensor, without padding of the vocabulary."""
        return self.operation.joined_shape(list(self.shapes))

    @property
    def is_own_exit(self) -> bool:
        """Whether it is an intermediate exit's own tensor, stored in exits.safetensors."""
        return self.theirs[0].startswith("exits.")


def _copied(ours: str, theirs: str, shape: Shape) -> TensorPair:
    """Return the pair of a tensor that is the same on both sides."""
    return TensorPair(ours, (theirs,), (shape,), Copy())


def tensor_table(settings: Settings) -> list[TensorPair]:
    """Return the pairs of a network, in the order in which a token passes them."""
    h, v = settings.hidden_size, settings.vocab_size

    def vocabulary(ours: str, theirs: str) -> TensorPair:
        return TensorPair(ours, (theirs,), ((v, h),), Vocabulary(v))

    pairs = [vocabulary("embedding.word_embeddings.weight", EMBEDDING)]
    for layer in range(settings.num_layers):
        pairs += _layer_pairs(settings, f"decoder.layers.{layer}", f"model.layers.{layer}")
    pairs.append(_copied("decoder.final_layernorm.weight", "model.norm.weight", (h,)))
    if settings.untie_embeddings_and_output_weights:
        pairs.append(vocabulary("output_layer.weight", HEAD))
    for depth in exit_depths(settings)[:-1]:
        ours, theirs = f"{depth}.weight", f"exits.{depth}"
        pairs += _part_pairs(settings, depth)
        if settings.use_exit_norm:
            pairs.append(_copied(f"exit_norms.{ours}", f"{theirs}.norm.weight", (h,)))
        if settings.untie_exit_output_weights:
            pairs.append(vocabulary(f"exit_output_layers.{ours}", f"{theirs}.lm_head.weight"))
    return pairs


def _layer_pairs(settings: Settings, ours: str, theirs: str) -> list[TensorPair]:
    """Return the pairs of one layer, whose names begin with ``ours`` and ``theirs``."""
    shapes = layer_shapes(settings)
    h, d, rows = shapes.hidden, shapes.head, (shapes.query, shapes.key_value, shapes.key_value)
    fuse = QueryKeyValue(settings.num_attention_heads, num_query_groups(settings))
    projections = [f"{theirs}.self_attn.{letter}_proj" for letter in "qkv"]
    attention = f"{ours}.self_attention"

    def fused(kind: str, *row_shape: int) -> TensorPair:
        return TensorPair(
            f"{attention}.linear_qkv.{kind}",
            tuple(f"{name}.{kind}" for name in projections),
            tuple((row, *row_shape) for row in rows),
            fuse,
        )

    pairs = [
        _copied(
            f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", (h,)
        ),
        fused("weight", h),
    ]
    if settings.add_qkv_bias:
        pairs.append(fused("bias"))
    if settings.qk_layernorm:
        pairs += [
            _copied(
                f"{attention}.{letter}_layernorm.weight",
                f"{theirs}.self_attn.{letter}_norm.weight",
                (d,),
            )
            for letter in "qk"
        ]
    output, mlp_norm = f"{theirs}.self_attn.o_proj", f"{theirs}.post_attention_layernorm"
    return [
        *pairs,
        _copied(
            f"{attention}.linear_proj.weight", f"{output}.weight", shapes.matrices["linear_proj"]
        ),
        *_mlp_pairs(settings, f"{ours}.mlp", f"{mlp_norm}.weight", f"{theirs}.mlp"),
    ]


def _mlp_pairs(settings: Settings, ours: str, their_norm: str, theirs: str) -> list[TensorPair]:
    """Return the pairs of an MLP and the norm before it."""
    shapes = layer_shapes(settings)
    h, ffn = shapes.hidden, shapes.ffn
    gate_and_up = tuple(f"{theirs}.{part}_proj.weight" for part in ("gate", "up"))
    return [
        _copied(f"{ours}.linear_fc1.layer_norm_weight", their_norm, (h,)),
        TensorPair(f"{ours}.linear_fc1.weight", gate_and_up, ((ffn, h), (ffn, h)), Stack()),
        _copied(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", (h, ffn)),
    ]


def _part_pairs(settings: Settings, depth: int) -> list[TensorPair]:
    """Return the pairs of the parts between an intermediate exit's hidden state and its norm."""
    h, rank, theirs, pairs = settings.hidden_size, settings.exit_adapter_rank, f"exits.{depth}", []
    if rank:
        pairs += [
            _copied(
                f"exit_adapters.{depth}.{half}.weight", f"{theirs}.adapter.{half}.weight", shape
            )
            for half, shape in (("down", (rank, h)), ("up", (h, rank)))
        ]
    if settings.use_exit_block:
        pairs += _layer_pairs(settings, f"exit_blocks.{depth}", f"{theirs}.block")
    if settings.use_exit_mlp:
        norm = f"{theirs}.mlp.norm.weight"
        pairs += _mlp_pairs(settings, f"exit_mlps.{depth}", norm, f"{theirs}.mlp")
    return pairs


def check_names(wanted: Iterable[str], present: Iterable[str], where: str) -> None:
    """Check that two lists hold the same names.

    Raises:
        CheckpointError: A name is missing or unknown.
    """
    wanted, present = list(wanted), set(present)
    missing = [name for name in wanted if name not in present]
    unknown = sorted(present - set(wanted))
    if missing or unknown:
        problems = [
            f"{len(names)} {state}: {', '.join(shown(name, MAX_NAME) for name in names[:5])}"
            + (" ..." if len(names) > 5 else "")
            for state, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(
            f"{where}: its tensors are not those its configuration describes; "
            f"{'; '.join(problems)}. Every tensor must be used exactly once: fetch the files "
            "again, or correct the configuration."
        )


def check_num_layers(
    num_layers: int,
    tensors: Mapping[str, TensorInfo],
    where: str,
    key: str = "num_hidden_layers",
    named: str = LAYER_NORM,
) -> None:
    """Check that there is at least one tensor a layer, before anything is built for each layer.

    Raises:
        CheckpointError: There are fewer tensors than layers. The message names the first missing.
    """
    if num_layers > len(tensors):
        first = next(
            name for layer in range(num_layers) if (name := named.format(layer)) not in tensors
        )
        raise CheckpointError(
            f"{where}: {key} is {num_layers:,}, but its weight files hold {len(tensors):,} tensors "
            f"in all; {first} is the first that is missing. Fetch the files again, or correct the "
            "number."
        )


def check_shapes(
    wanted: Mapping[str, Shape], tensors: Mapping[str, TensorInfo], where: str
) -> bool:
    """Check names, shapes and data types; return whether a tied model also stores its head.

    The stored head must then equal the embedding (``check_tied``).

    Args:
        wanted: Names and shapes that config.json requires.
        tensors: The tensors of the weight files.
        where: The directory's name, for messages.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape than the configuration says,
            or holds no floating point numbers.
    """
    wanted = dict(wanted)
    present = {name: info for name, info in tensors.items() if not name.endswith(COMPUTED)}
    stored_twice = HEAD in present and HEAD not in wanted
    check_names(wanted, [name for name in present if not (stored_twice and name == HEAD)], where)
    if stored_twice:
        wanted[HEAD] = wanted[EMBEDDING]
    for name, shape in wanted.items():
        if present[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(present[name].shape)}, and config.json makes it "
                f"{list(shape)}. One of the two is wrong; fetch both again."
            )
        if not present[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{where}: {name} holds {present[name].dtype}; only floating point weights are "
                "supported."
            )
    return stored_twice


def check_tied(source: TensorSource, where: str) -> None:
    """Check that the head that a tied model stores equals its embedding.

    Raises:
        CheckpointError: It does not.
    """
    if not torch.equal(source.read(EMBEDDING), source.read(HEAD)):
        raise CheckpointError(
            f"{where}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}. "
            "One of the two is wrong."
        )


def check_theirs(
    pairs: Iterable[TensorPair], tensors: Mapping[str, TensorInfo], where: str
) -> bool:
    """Check a Hugging Face source against the table; return what ``check_shapes`` returns.

    Raises:
        CheckpointError: ``check_shapes`` fails, or tensors to be joined have different data types.
    """
    pairs = list(pairs)
    wanted = {
        name: shape for pair in pairs for name, shape in zip(pair.theirs, pair.shapes, strict=True)
    }
    stored_twice = check_shapes(wanted, tensors, where)
    for pair in pairs:
        dtypes = {tensors[name].dtype for name in pair.theirs}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{where}: {', '.join(pair.theirs)} are of different kinds "
                f"({', '.join(map(str, dtypes))}) and become one tensor. Store them alike."
            )
    return stored_twice


def check_ours(pairs: Iterable[TensorPair], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check that a Megatron source holds the tensors of the table; a vocabulary may be padded.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of another shape.
    """
    pairs = list(pairs)
    check_names([pair.ours for pair in pairs], tensors, where)
    for pair in pairs:
        shape, wanted = tensors[pair.ours].shape, pair.shape
        padded = (
            isinstance(pair.operation, Vocabulary)
            and shape[1:] == wanted[1:]
            and shape[0] >= wanted[0]
        )
        if shape != wanted and not padded:
            raise CheckpointError(
                f"{where}: {pair.ours} has shape {list(shape)}, and its settings make it "
                f"{list(wanted)}."
            )
