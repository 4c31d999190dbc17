"""One pipeline chunk of a nested language model."""

import copy
from collections.abc import Callable
from itertools import accumulate

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_sorted.model.exit_parts import PARTS, ExitReader, make_parts
from megatron_sorted.model.heads import Head, Heads
from megatron_sorted.model.layer_dropout import LayerDropout
from megatron_sorted.model.lora import RanksInUse, start_adapters, with_adapters
from megatron_sorted.model.rotary import make_rotary
from megatron_sorted.platform.versions import chunk_arguments
from megatron_sorted.settings.derived import max_position_embeddings
from megatron_sorted.settings.layout import ChunkLayout
from megatron_sorted.settings.lora import is_adapter
from megatron_sorted.settings.run import Settings

OWN_OF_EXITS = tuple(f"{name}." for name in (*PARTS, "exit_norms", "exit_output_layers"))
"""Names of parameters within a stage begin so where an exit alone owns them."""


def is_trained(name: str, settings: Settings) -> bool:
    """Return whether the parameter of this name within a stage trains."""
    is_base_frozen = settings.tune_exit or settings.lora_rank > 0
    return not is_base_frozen or is_adapter(name) or name.startswith(OWN_OF_EXITS)


def freeze_others(stage: torch.nn.Module, settings: Settings) -> None:
    """Freeze every parameter of a stage that does not train; before gradient buffers are made, which hold trained ones only.

    Notes on the stage whether anything before it trains: else no gradient need come out of it. That follows from settings alone, since
    layers are alike: those of earlier stages train if this one's do.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(is_trained(name, settings))
    layers_train = any(
        is_trained(name, settings)
        for name, _ in stage.named_parameters()
        if name.startswith("decoder.")
    )
    stage.trains_below = is_trained("embedding.word_embeddings.weight", settings) or (
        stage.plan.first_layer > 0 and layers_train
    )


def cut_block(block: TransformerBlock, ends: list[int]) -> tuple[TransformerBlock, ...]:
    """Return views of ``block`` that each own a slice of its layers; run one after another they equal the whole block.

    A segment is a shallow copy: it shares layers, configuration and hooks with the block, so parameters, state-dict keys,
    recomputation and hooks are those of the block. Segments take their input as an argument, also on later pipeline stages.

    Args:
        block: The layers of one chunk.
        ends: Number of layers of the chunk after which each segment ends; increasing, the last is all of them.
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


class SortedStage(MegatronModule):
    """The layers of one pipeline chunk with the heads of its exits.

    Args:
        settings: The run.
        config: Megatron's configuration of it.
        spec: What a layer is made of.
        vocab_size: Padded vocabulary.
        plan: What this chunk holds.
        shared: Earlier chunks of this rank; norm and head that one of them owns are used, not made again.
    """

    def __init__(
        self,
        settings: Settings,
        config: TransformerConfig,
        spec: ModuleSpec,
        vocab_size: int,
        plan: ChunkLayout,
        shared: tuple["SortedStage", ...] = (),
    ):
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.plan = plan
        self.vp_stage = plan.chunk if config.virtual_pipeline_model_parallel_size else None
        self.pre_process, self.post_process = plan.has_embedding, plan.is_last
        # Megatron's own tying knows only the first and the last stage; copies are ours to keep equal (parallel/copies.py)
        self.share_embeddings_and_output_weights = False
        self.tied = not settings.untie_embeddings_and_output_weights
        self._awaits_gathering = settings.overlap_param_gather
        # called with a depth before norm and output matrix of its exit are read in a pass, and after its backward
        self.exit_hooks: tuple[Callable[[int], None], Callable[[int], None]] = (_nothing, _nothing)
        self.depths = plan.exits
        if plan.has_embedding:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_position_embeddings(settings),
                settings.position_embedding_type,
            )
        self.rotary_pos_emb = make_rotary(settings)
        self.adapter_ranks = RanksInUse(settings.lora_rank)
        self.decoder = TransformerBlock(
            config,
            with_adapters(spec, settings, self.adapter_ranks),
            post_layer_norm=False,
            pre_process=plan.has_embedding,
            post_process=plan.is_last,
            **chunk_arguments(TransformerBlock.__init__, self.vp_stage),
        )
        start_adapters(self.decoder.layers, plan.first_layer, settings.seed)
        # what is recomputed hands gradients to its parameters only if its input asks for one, and a frozen embedding's output does not
        self._input_needs_gradient = (
            bool(settings.lora_rank) and settings.recompute_granularity != "none"
        )
        assert len(self.decoder.layers) == plan.num_layers, (
            "our layer split differs from Megatron's"
        )
        self.layer_dropout = (
            LayerDropout(self.decoder.layers, plan.first_layer, settings)
            if settings.layer_dropout
            else None
        )
        self._segments = cut_block(self.decoder, list(accumulate(plan.segments)))
        self.trains_below = True
        parts = make_parts(settings, config, spec, plan, self.vp_stage)
        for name, modules in parts.items():
            setattr(self, name, modules)
        tied = self.embedding.word_embeddings if self.tied and plan.has_embedding else None
        self.heads = Heads(
            plan, config, vocab_size, parts, tied, tuple(stage.heads for stage in shared)
        )
        for name, module in self.heads.made.items():
            setattr(self, name, module)

    def head(
        self, depth: int, attention_mask: torch.Tensor | None = None, tokens_t: int = 0
    ) -> Head:
        """Return what reads the exit at ``depth``, one of this chunk's.

        Args:
            depth: The exit.
            attention_mask: Of the micro-batch, as for ``forward``.
            tokens_t: Length of the hidden state that is to be read, on this rank; an exit with a layer of its own needs it.
        """
        own = self.heads.by_depth[depth]
        if not own.parts:
            return Head(own.norm, own.output.weight)
        rotary = None if own.block is None else self._rotary(tokens_t)
        return Head(
            ExitReader(
                own.adapter,
                own.block or own.mlp,
                own.norm,
                attention_mask,
                rotary,
                self.config.sequence_parallel,
            ),
            own.output.weight,
        )

    def _rotary(self, tokens_t: int) -> torch.Tensor | None:
        """Return the rotary angles for a hidden state of this length on this rank; None where positions enter in another way."""
        if self.rotary_pos_emb is None:
            return None
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return self.rotary_pos_emb(tokens_t * ranks * self.config.context_parallel_size)

    def _await_head_parameters(self) -> None:
        """Wait for overlapped gathering of the norms and heads this chunk owns.

        Megatron waits in forward hooks of the module that holds a parameter; the deferred loss reads these parameters without
        calling their modules, or calls them first in backward, which is too late.
        """
        for name, module in self.named_children():
            if name in (
                "final_layernorm",
                "output_layer",
                "exit_norms",
                "exit_output_layers",
                *PARTS,
            ):
                for holder in module.modules():
                    for hook in holder._forward_pre_hooks.values():
                        hook(holder, ())

    def set_input_tensor(self, input_tensor) -> None:
        """Take the hidden state received from the previous stage (called by Megatron's schedules)."""
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
        """Return what the chunk hands on: the hidden state, or whatever ``at_exit`` made of it at the deepest exit.

        Collective: Megatron's, of the layers (tensor parallel group).

        Args:
            tokens_bs: Token ids (used where the embedding is).
            positions_bs: Positions for learned absolute embeddings.
            attention_mask: As the layers' attention takes it; None for plain causal attention.
            at_exit: Called with each exit's depth and un-normed hidden state [t, b, h]; returns what deeper layers go on with.
            deepest: Layers above this depth are not run.
        """
        if self._awaits_gathering:
            self._await_head_parameters()
        hidden = (
            self.embedding(tokens_bs, positions_bs)
            if self.pre_process
            else self.decoder.input_tensor
        )
        if not self.trains_below:
            hidden = hidden.detach()  # Megatron receives it as one that wants a gradient
        if self._input_needs_gradient and torch.is_grad_enabled():
            hidden.requires_grad_()
        rotary = self._rotary(hidden.size(0))
        depth = self.plan.first_layer
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
        """Return Megatron's sharded state dict, under the global names that Megatron's GPTModel uses.

        Copies of a shared parameter go by one name; only the first stage that holds one writes it.
        """
        chunk_arguments(
            TransformerBlock.__init__, self.vp_stage
        )  # an old Megatron numbers layers by the chunk it was told last
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron does not look into a ModuleDict: it took each rank's vocabulary shard of an exit's own head for a copy of one tensor
        for depth, layer in self.exit_output_layers.items():
            state.update(
                layer.sharded_state_dict(
                    f"{prefix}exit_output_layers.{depth}.", sharded_offsets, metadata
                )
            )
        for name in ("exit_blocks", "exit_mlps"):
            for depth, layer in getattr(self, name).items():
                state.update(
                    layer.sharded_state_dict(f"{prefix}{name}.{depth}.", sharded_offsets, metadata)
                )
        norms = {
            key: value
            for key, value in state.items()
            if key.startswith(f"{prefix}final_layernorm.")
        }
        replace_prefix_for_sharding(
            norms, f"{prefix}final_layernorm.", f"{prefix}decoder.final_layernorm."
        )
        output_key = f"{prefix}output_layer.weight"
        for key, value in list(state.items()):
            if "output_layer" in key and key.endswith("_extra_state"):
                del state[key]  # holds nothing; Megatron's GPTModel leaves it out too
            elif "output_layer" in key and hasattr(value, "allow_shape_mismatch"):
                value.allow_shape_mismatch = True  # padding of the vocabulary depends on the layout
        if self.tied and output_key in state:
            state[output_key].key = f"{prefix}embedding.word_embeddings.weight"
        for parameter in (
            p
            for group in self.heads.shared_parameters().values()
            for p in group
            if getattr(p, "shared", False)
        ):
            for value in state.values():
                if (
                    getattr(value, "data", None) is not None
                    and value.data.data_ptr() == parameter.data_ptr()
                ):
                    value.replica_id = (parameter.copy_index, *value.replica_id[1:])
        return state
