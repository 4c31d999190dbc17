"""Which tensor of ours is made of which tensors of a Hugging Face directory; every name on both sides exactly once."""

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
MOST_NAME = 100
# Older files store what is computed from config.json; nothing is lost without it.
COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorPair:
    """One tensor of ours and the tensors of theirs it is made of.

    Attributes:
        ours: Global name of the sharded checkpoint, with the layer's index.
        theirs: Names in the Hugging Face directory, in the operation's order.
        shapes: Of theirs, as the settings ask.
        operation: Between them.
        is_own_exit: Whether it is an intermediate exit's own (norm, head, block, MLP, adapter), which lies in a file beside the model's.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    operation: Operation
    is_own_exit: bool = False

    @property
    def shape(self) -> Shape:
        """Return the shape of ours, without padding of the vocabulary."""
        return self.operation.joined_shape(list(self.shapes))


def tensor_table(settings: Settings) -> list[TensorPair]:
    """Return the pairs of a network, in the order in which a token meets them."""
    h, v = settings.hidden_size, settings.vocab_size
    pairs = [TensorPair("embedding.word_embeddings.weight", (EMBEDDING,), ((v, h),), Vocabulary(v))]
    for layer in range(settings.num_layers):
        pairs += layer_pairs(settings, f"decoder.layers.{layer}", f"model.layers.{layer}")
    pairs.append(
        TensorPair("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),), Copy())
    )
    if settings.untie_embeddings_and_output_weights:
        pairs.append(TensorPair("output_layer.weight", (HEAD,), ((v, h),), Vocabulary(v)))
    for depth in exit_depths(settings)[:-1]:
        pairs += _part_pairs(settings, depth)
        if settings.use_exit_norm:
            pairs.append(
                TensorPair(
                    f"exit_norms.{depth}.weight",
                    (f"exits.{depth}.norm.weight",),
                    ((h,),),
                    Copy(),
                    True,
                )
            )
        if settings.untie_exit_output_weights:
            pairs.append(
                TensorPair(
                    f"exit_output_layers.{depth}.weight",
                    (f"exits.{depth}.lm_head.weight",),
                    ((v, h),),
                    Vocabulary(v),
                    True,
                )
            )
    return pairs


def layer_pairs(
    settings: Settings, ours: str, theirs: str, is_own_exit: bool = False
) -> list[TensorPair]:
    """Return the pairs of one layer, called ``ours`` and ``theirs``, in the order in which a token meets them."""
    shapes = layer_shapes(settings)
    h, d, rows = shapes.hidden, shapes.head, (shapes.query, shapes.key_value, shapes.key_value)
    fuse = QueryKeyValue(settings.num_attention_heads, num_query_groups(settings))
    names = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
    pairs = [
        TensorPair(
            f"{ours}.self_attention.linear_qkv.layer_norm_weight",
            (f"{theirs}.input_layernorm.weight",),
            ((h,),),
            Copy(),
            is_own_exit,
        ),
        TensorPair(
            f"{ours}.self_attention.linear_qkv.weight",
            tuple(f"{name}.weight" for name in names),
            tuple((row, h) for row in rows),
            fuse,
            is_own_exit,
        ),
    ]
    if settings.add_qkv_bias:
        pairs.append(
            TensorPair(
                f"{ours}.self_attention.linear_qkv.bias",
                tuple(f"{name}.bias" for name in names),
                tuple((row,) for row in rows),
                fuse,
                is_own_exit,
            )
        )
    if settings.qk_layernorm:
        pairs += [
            TensorPair(
                f"{ours}.self_attention.{part}_layernorm.weight",
                (f"{theirs}.self_attn.{part}_norm.weight",),
                ((d,),),
                Copy(),
                is_own_exit,
            )
            for part in "qk"
        ]
    return [
        *pairs,
        TensorPair(
            f"{ours}.self_attention.linear_proj.weight",
            (f"{theirs}.self_attn.o_proj.weight",),
            (shapes.matrices["linear_proj"],),
            Copy(),
            is_own_exit,
        ),
        *_mlp_pairs(
            settings,
            f"{ours}.mlp",
            f"{theirs}.post_attention_layernorm.weight",
            f"{theirs}.mlp",
            is_own_exit,
        ),
    ]


def _mlp_pairs(
    settings: Settings, ours: str, their_norm: str, theirs: str, is_own_exit: bool
) -> list[TensorPair]:
    """Return the pairs of an MLP and the norm before it."""
    shapes = layer_shapes(settings)
    h, ffn = shapes.hidden, shapes.ffn
    return [
        TensorPair(
            f"{ours}.linear_fc1.layer_norm_weight", (their_norm,), ((h,),), Copy(), is_own_exit
        ),
        TensorPair(
            f"{ours}.linear_fc1.weight",
            tuple(f"{theirs}.{part}_proj.weight" for part in ("gate", "up")),
            ((ffn, h), (ffn, h)),
            Stack(),
            is_own_exit,
        ),
        TensorPair(
            f"{ours}.linear_fc2.weight",
            (f"{theirs}.down_proj.weight",),
            ((h, ffn),),
            Copy(),
            is_own_exit,
        ),
    ]


def _part_pairs(settings: Settings, depth: int) -> list[TensorPair]:
    """Return the pairs of what stands between an intermediate exit's hidden state and its norm."""
    h, rank, theirs, pairs = settings.hidden_size, settings.exit_adapter_rank, f"exits.{depth}", []
    if rank:
        pairs += [
            TensorPair(
                f"exit_adapters.{depth}.{part}.weight",
                (f"{theirs}.adapter.{part}.weight",),
                (shape,),
                Copy(),
                True,
            )
            for part, shape in (("down", (rank, h)), ("up", (h, rank)))
        ]
    if settings.use_exit_block:
        pairs += layer_pairs(settings, f"exit_blocks.{depth}", f"{theirs}.block", True)
    if settings.use_exit_mlp:
        pairs += _mlp_pairs(
            settings, f"exit_mlps.{depth}", f"{theirs}.mlp.norm.weight", f"{theirs}.mlp", True
        )
    return pairs


def check_names(wanted: Iterable[str], found: Iterable[str], where: str) -> None:
    """Check that the two are the same names.

    Raises:
        CheckpointError: Naming what is missing and what is unknown.
    """
    wanted, found = list(wanted), set(found)
    missing = [name for name in wanted if name not in found]
    unknown = sorted(found - set(wanted))
    if missing or unknown:
        problems = [
            f"{len(names)} {what}: {', '.join(shown(name, MOST_NAME) for name in names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(
            f"{where}: its tensors are not those its configuration describes; {'; '.join(problems)}. Every "
            "tensor must be used exactly once: fetch the files again, or mend the configuration."
        )


def check_num_layers(
    num_layers: int,
    tensors: Mapping[str, TensorInfo],
    where: str,
    key: str = "num_hidden_layers",
    named: str = LAYER_NORM,
) -> None:
    """Check that a number of layers is one that so many tensors can make up, before anything is built for each.

    Raises:
        CheckpointError: There are fewer tensors than layers, naming the first that is missing.
    """
    if num_layers > len(tensors):
        first = next(
            name for layer in range(num_layers) if (name := named.format(layer)) not in tensors
        )
        raise CheckpointError(
            f"{where}: {key} is {num_layers:,}, but its weight files hold {len(tensors):,} tensors in all; "
            f"{first} is the first that is missing. Fetch the files again, or mend the number."
        )


def check_shapes(
    wanted: Mapping[str, Shape], tensors: Mapping[str, TensorInfo], where: str
) -> bool:
    """Return whether a tied model stores its head all the same (it must then equal the embedding), after comparing names and shapes.

    Args:
        wanted: Names and shapes that config.json asks for.
        tensors: What the weight files hold.
        where: The directory, for messages.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape than the configuration says, or holds no floating point numbers.
    """
    wanted = dict(wanted)
    found = {name: info for name, info in tensors.items() if not name.endswith(COMPUTED)}
    stored_twice = HEAD in found and HEAD not in wanted
    check_names(wanted, [name for name in found if not (stored_twice and name == HEAD)], where)
    if stored_twice:
        wanted[HEAD] = wanted[EMBEDDING]
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(found[name].shape)}, and config.json makes it {list(shape)}. "
                "One of the two is wrong; fetch both again."
            )
        if not found[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{where}: {name} holds {found[name].dtype}; only floating point weights are supported."
            )
    return stored_twice


def check_tied(source: TensorSource, where: str) -> None:
    """Check that the head that a tied model stores is its embedding.

    Raises:
        CheckpointError: It is not.
    """
    if not torch.equal(source.read(EMBEDDING), source.read(HEAD)):
        raise CheckpointError(
            f"{where}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}. "
            "One of the two is wrong."
        )


def check_theirs(
    pairs: Iterable[TensorPair], tensors: Mapping[str, TensorInfo], where: str
) -> bool:
    """Return what ``check_shapes`` does, after comparing names, shapes and kinds with those of the table.

    Raises:
        CheckpointError: As ``check_shapes``; or tensors that become one are of different kinds.
    """
    pairs = list(pairs)
    wanted = {
        name: shape for pair in pairs for name, shape in zip(pair.theirs, pair.shapes, strict=True)
    }
    stored_twice = check_shapes(wanted, tensors, where)
    for pair in pairs:
        kinds = {tensors[name].dtype for name in pair.theirs}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{where}: {', '.join(pair.theirs)} are of different kinds ({', '.join(map(str, kinds))}) and become one "
                "tensor. Store them alike."
            )
    return stored_twice


def check_ours(pairs: Iterable[TensorPair], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Check that a Megatron source holds the tensors of the table; a vocabulary may have padding.

    Raises:
        CheckpointError: Naming one that is missing, unknown, or of another shape.
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
                f"{where}: {pair.ours} has shape {list(shape)}, and its settings make it {list(wanted)}."
            )
