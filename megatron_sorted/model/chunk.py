"""One model chunk of a nested language model, run in segments between its exits."""

import copy
from collections.abc import Callable
from itertools import accumulate, chain

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_sorted.model.exit_parts import NormWithParts, make_parts
from megatron_sorted.model.heads import ExitReadout, Heads
from megatron_sorted.model.layer_dropout import LayerDropout
from megatron_sorted.model.lora import RanksInUse, start_adapters, with_adapters
from megatron_sorted.model.rotary import make_rotary
from megatron_sorted.settings.derived import max_position_embeddings
from megatron_sorted.settings.exit_parts import PARTS, is_trained
from megatron_sorted.settings.layout import ChunkLayout
from megatron_sorted.settings.run import Settings


def freeze_others(chunk: torch.nn.Module, settings: Settings) -> None:
    """Freeze every parameter of a chunk that does not train.

    Call it before gradient buffers are allocated, which hold trained parameters only. It also sets
    ``chunk.trains_below``: whether anything before the chunk trains; if not, no gradient need leave
    it. The settings alone decide that, since layers are alike: those of earlier chunks train if
    this one's do.
    """
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_trained(name, settings))
    layers_train = any(
        is_trained(name, settings)
        for name, _ in chunk.named_parameters()
        if name.startswith("decoder.")
    )
    chunk.trains_below = is_trained("embedding.word_embeddings.weight", settings) or (
        chunk.layout.layers_before > 0 and layers_train
    )


def cut_block(block: TransformerBlock, ends: list[int]) -> tuple[TransformerBlock, ...]:
    """Return segments of ``block``: views that, run one after another, equal the whole block.

    A segment is a shallow copy with a slice of the layers. It shares layers, configuration and
    hooks with the block, so parameters, state-dict keys, recomputation and hooks are those of the
    block. Segments take their input as an argument, on later pipeline stages too.

    Args:
        block: The layers of one chunk.
        ends: Number of the chunk's layers after which each segment ends; increasing, the last is
            the number of all layers.
    """
    assert ends == sorted(set(ends)) and ends[-1] == len(block.layers), (
        f"segment ends {ends} for {len(block.layers)} layers"
    )
    segments = []
    for start, end in zip([0, *ends], ends, strict=False):
        segment = copy.copy(block)
        segment._modules = dict(block._modules)  # copy.copy shares this dictionary with the block
        segment.layers = torch.nn.ModuleList(block.layers[start:end])
        segment.num_layers_per_pipeline_rank = end - start
        segment.pre_process = True
        segments.append(segment)
    return tuple(segments)


def _nothing(_depth: int) -> None:
    return None


class SortedChunk(MegatronModule):
    """A model chunk: consecutive layers of one pipeline stage, with the heads of their exits.

    Args:
        settings: The run's settings.
        config: Megatron's configuration of the run.
        spec: Specification of a transformer layer.
        vocab_size: Size of the padded vocabulary.
        layout: What this chunk holds.
        groups: Megatron's process groups.
        shared: Earlier chunks of this rank, whose shared norm and output matrix are used again.

    Attributes:
        depths: Depths of the chunk's exits, increasing.
        heads: The modules that read them.
        trains_below: Whether anything before the chunk trains, see ``freeze_others``.
        exit_hooks: Called with the depth of an exit: the first before its norm and output matrix
            are read in a pass, the second after its backward.
    """

    def __init__(
        self,
        settings: Settings,
        config: TransformerConfig,
        spec: ModuleSpec,
        vocab_size: int,
        layout: ChunkLayout,
        groups: ProcessGroupCollection,
        shared: tuple["SortedChunk", ...] = (),
    ):
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.layout, self.groups = layout, groups
        self.vp_stage = layout.chunk if config.virtual_pipeline_model_parallel_size else None
        self.pre_process, self.post_process = layout.has_embedding, layout.is_last
        # Megatron ties the first and the last stage only; parallel/copies.py keeps all copies equal
        self.share_embeddings_and_output_weights = False
        self.tied = not settings.untie_embeddings_and_output_weights
        self._awaits_gathering = settings.overlap_param_gather
        self.exit_hooks: tuple[Callable[[int], None], Callable[[int], None]] = (_nothing, _nothing)
        self.depths = layout.exits
        if layout.has_embedding:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_position_embeddings(settings),
                settings.position_embedding_type,
                tp_group=groups.tp,
            )
        self.rotary_pos_emb = make_rotary(settings, groups)
        self.adapter_ranks = RanksInUse(settings.lora_rank)
        self.decoder = TransformerBlock(
            config,
            with_adapters(spec, settings, self.adapter_ranks),
            post_layer_norm=False,
            pre_process=layout.has_embedding,
            post_process=layout.is_last,
            pg_collection=groups,
            vp_stage=self.vp_stage,
        )
        start_adapters(self.decoder.layers, layout.layers_before, settings.seed)
        # Recomputed layers pass gradients to their parameters only if their input requires one, and
        # the output of a frozen embedding does not.
        self._input_needs_gradient = (
            bool(settings.lora_rank) and settings.recompute_granularity != "none"
        )
        assert len(self.decoder.layers) == layout.num_layers, (
            "our layer split differs from Megatron's"
        )
        self.layer_dropout = (
            LayerDropout(self.decoder.layers, layout.layers_before, settings)
            if settings.layer_dropout
            else None
        )
        self._segments = cut_block(self.decoder, list(accumulate(layout.segments)))
        self.trains_below = True
        parts = make_parts(settings, config, spec, layout, self.vp_stage, groups)
        tied = self.embedding.word_embeddings if self.tied and layout.has_embedding else None
        earlier_heads = tuple(chunk.heads for chunk in shared)
        self.heads = Heads(layout, config, vocab_size, groups, parts, tied, earlier_heads)
        for name, module in (parts | self.heads.made).items():
            setattr(self, name, module)

    def head(
        self, depth: int, attention_mask: torch.Tensor | None = None, tokens_t: int = 0
    ) -> ExitReadout:
        """Return the readout of the exit at ``depth``, one of this chunk's.

        Args:
            depth: The exit.
            attention_mask: Attention mask of the micro-batch, as for ``forward``.
            tokens_t: Length of the hidden state to read, on this rank; needed for an exit with a
                layer of its own.
        """
        modules = self.heads.by_depth[depth]
        norm = modules.norm
        if modules.parts:
            rotary = None if modules.block is None else self._rotary(tokens_t)
            norm = NormWithParts(
                modules.adapter,
                modules.block or modules.mlp,
                norm,
                attention_mask,
                rotary,
                self.config.sequence_parallel,
            )
        return ExitReadout(norm, modules.output.weight)

    def _rotary(self, tokens_t: int) -> torch.Tensor | None:
        """Return the rotary angles for a hidden state of this length on this rank.

        The result is None where positions are embedded by another method.
        """
        if self.rotary_pos_emb is None:
            return None
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        whole_length = tokens_t * ranks * self.config.context_parallel_size
        return self.rotary_pos_emb(whole_length, cp_group=self.groups.cp)

    def _await_head_parameters(self) -> None:
        """Wait for overlapped gathering of the norms and heads that this chunk owns.

        Megatron waits in forward hooks of the module that holds a parameter; the deferred loss
        reads these parameters without calling their modules, or calls them only in backward, which
        is too late.
        """
        owned = ("final_layernorm", "output_layer", "exit_norms", "exit_output_layers", *PARTS)
        for name, module in self.named_children():
            if name in owned:
                for holder in module.modules():
                    for hook in holder._forward_pre_hooks.values():
                        hook(holder, ())

    def set_input_tensor(self, input_tensor) -> None:
        """Set the hidden state received from the previous stage; Megatron's schedules call it."""
        self.decoder.set_input_tensor(
            input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        )

    def forward(
        self,
        tokens_bs: torch.Tensor,
        positions_bs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        at_exit: Callable[[int, torch.Tensor], torch.Tensor],
        deepest: int,
    ) -> torch.Tensor:
        """Run the chunk's layers, and ``at_exit`` at each exit.

        Collective: Megatron's, of the layers (tensor parallel group).

        Args:
            tokens_bs: Token ids; used by the chunk that holds the embedding.
            positions_bs: Positions for learned absolute embeddings.
            attention_mask: Mask that the layers' attention takes; None for plain causal attention.
            at_exit: Called with each exit's depth and un-normed hidden state [t, b, h]; returns the
                input of deeper layers.
            deepest: Depth of the deepest layer to run.

        Returns:
            The hidden state [t, b, h] for the next chunk, or the result of ``at_exit`` where the
            chunk ends with an exit.
        """
        if self._awaits_gathering:
            self._await_head_parameters()
        hidden = (
            self.embedding(tokens_bs, positions_bs)
            if self.pre_process
            else self.decoder.input_tensor
        )
        if not self.trains_below:
            hidden = hidden.detach()  # Megatron receives it from the stage before with a gradient
        if self._input_needs_gradient and torch.is_grad_enabled():
            hidden.requires_grad_()
        rotary = self._rotary(hidden.size(0))
        depth = self.layout.layers_before
        for segment in self._segments:
            if depth >= deepest:
                break
            segment.training = self.training
            hidden = segment(
                hidden_states=hidden, attention_mask=attention_mask, rotary_pos_emb=rotary
            )
            depth += len(segment.layers)
            if depth in self.depths:
                hidden = at_exit(depth, hidden)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return Megatron's sharded state dict, under the global names of Megatron's GPTModel.

        Copies of a shared parameter have one name; only the first stage that holds one writes it.
        """
        metadata = {**(metadata or {}), "dp_cp_group": self.groups.dp_cp}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron does not look into a ModuleDict: without this it takes each rank's vocabulary
        # shard of an exit's own head for a copy of one tensor.
        for name in ("exit_output_layers", "exit_blocks", "exit_mlps"):
            for depth, module in getattr(self, name).items():
                key = f"{prefix}{name}.{depth}."
                state.update(module.sharded_state_dict(key, sharded_offsets, metadata))
        norm_prefix = f"{prefix}final_layernorm."
        norms = {key: value for key, value in state.items() if key.startswith(norm_prefix)}
        replace_prefix_for_sharding(norms, norm_prefix, f"{prefix}decoder.final_layernorm.")
        output_key = f"{prefix}output_layer.weight"
        for key, value in list(state.items()):
            if "output_layer" in key and key.endswith("_extra_state"):
                del state[key]  # it is empty; Megatron's GPTModel leaves it out too
            elif "output_layer" in key and hasattr(value, "allow_shape_mismatch"):
                value.allow_shape_mismatch = True  # padding of the vocabulary depends on the layout
        if self.tied and output_key in state:
            state[output_key].key = f"{prefix}embedding.word_embeddings.weight"
        self._number_copies(state)
        return state

    def _number_copies(self, state: dict) -> None:
        """Mark the sharded tensors of copies of another stage's parameters as replicas."""
        for parameter in chain.from_iterable(self.heads.shared_parameters().values()):
            if not getattr(parameter, "shared", False):
                continue
            for value in state.values():
                data = getattr(value, "data", None)
                if data is not None and data.data_ptr() == parameter.data_ptr():
                    value.replica_id = (parameter.copy_index, *value.replica_id[1:])
