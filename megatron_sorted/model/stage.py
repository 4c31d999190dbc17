"""One pipeline chunk of a nested language model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_sorted.model.exit_parts import PARTS, ExitReader, make_parts
from megatron_sorted.model.layer_dropout import LayerDropout
from megatron_sorted.model.lora import RanksInUse, start_adapters, with_adapters
from megatron_sorted.model.norm import Norm
from megatron_sorted.model.rotary import make_rotary
from megatron_sorted.model.segments import cut_block
from megatron_sorted.platform.versions import chunk_arguments
from megatron_sorted.settings.derived import last_exit_teaches, max_position_embeddings
from megatron_sorted.settings.run import Settings


@dataclass(frozen=True)
class Head:
    """How an exit is read: ``norm`` with the exit's own parts before it, then the vocabulary shard ``weight_ph`` of the output matrix."""

    norm: torch.nn.Module | ExitReader
    weight_ph: torch.nn.Parameter


@dataclass(frozen=True)
class ChunkPlan:
    """What one chunk holds: its layers, its exits, and whether it is where the network begins or ends."""

    chunk: int
    first_layer: int
    num_layers: int
    depths: tuple[int, ...]
    has_embedding: bool
    is_last: bool


def _output_layer(config: TransformerConfig, vocab_size: int) -> tensor_parallel.ColumnParallelLinear:
    return tensor_parallel.ColumnParallelLinear(
        config.hidden_size, vocab_size, config=config, init_method=config.init_method, bias=False, gather_output=False)


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

    def __init__(self, settings: Settings, config: TransformerConfig, spec: ModuleSpec, vocab_size: int, plan: ChunkPlan,
                 shared: tuple["SortedStage", ...] = ()):
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
        self.depths = plan.depths
        if plan.has_embedding:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, max_position_embeddings(settings), settings.position_embedding_type)
        self.rotary_pos_emb = make_rotary(settings)
        self.adapter_ranks = RanksInUse(settings.lora_rank)
        self.decoder = TransformerBlock(
            config, with_adapters(spec, settings, self.adapter_ranks), post_layer_norm=False, pre_process=plan.has_embedding,
            post_process=plan.is_last, **chunk_arguments(TransformerBlock.__init__, self.vp_stage))
        start_adapters(self.decoder.layers, plan.first_layer, settings.seed)
        # what is recomputed hands gradients to its parameters only if its input asks for one, and a frozen embedding's output does not
        self._input_needs_gradient = bool(settings.lora_rank) and settings.recompute_granularity != "none"
        assert len(self.decoder.layers) == plan.num_layers, "our layer split differs from Megatron's"
        self.layer_dropout = LayerDropout(self.decoder.layers, plan.first_layer, settings) if settings.layer_dropout else None
        ends = sorted({depth - plan.first_layer for depth in plan.depths} | {plan.num_layers})
        self._segments = cut_block(self.decoder, ends)
        self.trains_below = True
        own = [depth for depth in plan.depths if depth != settings.num_layers]
        for name, parts in make_parts(settings, config, spec, plan.first_layer, own, self.vp_stage).items():
            setattr(self, name, parts)
        self._build_heads(settings, vocab_size, shared)

    def _build_heads(self, settings: Settings, vocab_size: int, shared: tuple["SortedStage", ...]) -> None:
        """Makes the norms and heads of this chunk's exits; shared ones live in the rank's first chunk that reads or embeds."""
        own_norms = [depth for depth in self.depths if settings.use_exit_norm and depth != settings.num_layers]
        own_heads = [depth for depth in self.depths if settings.untie_exit_output_weights and depth != settings.num_layers]
        self.exit_norms = torch.nn.ModuleDict({str(depth): self._make_norm() for depth in own_norms})
        self.exit_output_layers = torch.nn.ModuleDict({str(depth): _output_layer(self.config, vocab_size) for depth in own_heads})
        self._shared_norm: tuple[torch.nn.Module, ...] = ()
        self._weight_holder: tuple[torch.nn.Module, ...] = ()  # of the shared output matrix
        if len(own_norms) < len(self.depths):
            self._shared_norm = next((stage._shared_norm for stage in shared if stage._shared_norm), ())
            if not self._shared_norm:
                self.final_layernorm = self._make_norm()
                self._shared_norm = (self.final_layernorm,)
        taught = bool(self.depths) and last_exit_teaches(settings)
        if len(own_heads) < len(self.depths) or taught or (self.tied and self.pre_process):
            self._weight_holder = next((stage._weight_holder for stage in shared if stage._weight_holder), ())
            if not self._weight_holder and self.tied and self.pre_process:
                self._weight_holder = (self.embedding.word_embeddings,)
            if not self._weight_holder:
                self.output_layer = _output_layer(self.config, vocab_size)
                self._weight_holder = (self.output_layer,)

    def _make_norm(self) -> torch.nn.Module:
        return Norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)

    def head(self, depth: int, attention_mask: torch.Tensor | None = None, tokens_t: int = 0) -> Head:
        """Returns what reads the exit at ``depth``, one of this chunk's.

        Args:
            depth: The exit.
            attention_mask: Of the micro-batch, as for ``forward``.
            tokens_t: Length of the hidden state that is to be read, on this rank; an exit with a layer of its own needs it.
        """
        key = str(depth)
        norm = self.exit_norms[key] if key in self.exit_norms else self._shared_norm[0]
        weight = self.exit_output_layers[key].weight if key in self.exit_output_layers else self.last_weight()
        adapter, block, mlp = (dict(getattr(self, name)).get(key) for name in PARTS)
        if adapter is None and block is None and mlp is None:
            return Head(norm, weight)
        rotary = None if block is None else self._rotary(tokens_t)
        return Head(ExitReader(adapter, block or mlp, norm, attention_mask, rotary, self.config.sequence_parallel), weight)

    def _rotary(self, tokens_t: int) -> torch.Tensor | None:
        """Returns the rotary angles for a hidden state of this length on this rank; None where positions enter in another way."""
        if self.rotary_pos_emb is None:
            return None
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return self.rotary_pos_emb(tokens_t * ranks * self.config.context_parallel_size)

    def last_weight(self) -> torch.nn.Parameter:
        """Returns this rank's copy of the last exit's output matrix; where every exit has its own, it is there for teaching only."""
        return self._weight_holder[0].weight

    def heads(self) -> list[torch.nn.Module]:
        """Returns the modules that hold an output matrix and nothing else."""
        return [*self.exit_output_layers.values(), *([self.output_layer] if hasattr(self, "output_layer") else [])]

    def head_unit(self, depth: int) -> torch.nn.Module:
        """Returns the module of this chunk with the output matrix of the exit at ``depth``; the whole embedding where that is tied."""
        key = str(depth)
        if key in self.exit_output_layers:
            return self.exit_output_layers[key]
        return self.output_layer if hasattr(self, "output_layer") else self.embedding

    def shared_head_name(self) -> str:
        """Returns the name of the shared output matrix in this chunk."""
        return "output_layer.weight" if hasattr(self, "output_layer") else "embedding.word_embeddings.weight"

    def _await_head_parameters(self) -> None:
        """Waits for overlapped gathering of the norms and heads this chunk owns.

        Megatron waits in forward hooks of the module that holds a parameter; the deferred loss reads these parameters without
        calling their modules, or calls them first in backward, which is too late.
        """
        for name, module in self.named_children():
            if name in ("final_layernorm", "output_layer", "exit_norms", "exit_output_layers", *PARTS):
                for holder in module.modules():
                    for hook in holder._forward_pre_hooks.values():
                        hook(holder, ())

    def parameters_complete_at(self, depth: int) -> tuple[torch.nn.Parameter, ...]:
        """Returns the parameters of this chunk whose gradient is complete once the exit at ``depth`` has run backward.

        Backward passes exits from deep to shallow, and a rank's first chunk last; so what several exits of this rank share is
        complete at the shallowest exit of the chunk that owns it. A tied embedding is not listed: its lookup runs last.
        """
        key = str(depth)
        complete = list(self.exit_norms[key].parameters()) if key in self.exit_norms else []
        if key in self.exit_output_layers:
            complete.append(self.exit_output_layers[key].weight)
        for parts in (getattr(self, name) for name in PARTS):
            complete += parts[key].parameters() if key in parts else ()
        if depth == self.depths[0]:
            shared = self.shared_parameters()
            complete += shared["norm"]
            if hasattr(self, "output_layer"):
                complete += shared["head"]
        return tuple(p for p in complete if p.requires_grad)

    def shared_parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Returns the parameters registered in this chunk that other stages may hold copies of, by what they are."""
        head = []
        if hasattr(self, "output_layer"):
            head = [self.output_layer.weight]
        elif self.tied and self.pre_process:
            head = [self.embedding.word_embeddings.weight]
        norm = list(self.final_layernorm.parameters()) if hasattr(self, "final_layernorm") else []
        return {"head": head, "norm": norm}

    def set_input_tensor(self, input_tensor) -> None:
        """Takes the hidden state received from the previous stage (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, tokens_bs: torch.Tensor, positions_bs: torch.Tensor, attention_mask: torch.Tensor | None,
                at_exit: Callable[[int, torch.Tensor], torch.Tensor], deepest: int) -> torch.Tensor:
        """Returns what the chunk hands on: the hidden state, or whatever ``at_exit`` made of it at the deepest exit.

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
        hidden = self.embedding(tokens_bs, positions_bs) if self.pre_process else self.decoder.input_tensor
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
            hidden = segment(hidden_states=hidden, attention_mask=attention_mask, rotary_pos_emb=rotary)
            depth += len(segment.layers)
            if depth in self.depths:
                hidden = at_exit(depth, hidden)
        return hidden

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Returns Megatron's sharded state dict, under the global names that Megatron's GPTModel uses.

        Copies of a shared parameter go by one name; only the first stage that holds one writes it.
        """
        chunk_arguments(TransformerBlock.__init__, self.vp_stage)  # an old Megatron numbers layers by the chunk it was told last
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Megatron does not look into a ModuleDict: it took each rank's vocabulary shard of an exit's own head for a copy of one tensor
        for depth, layer in self.exit_output_layers.items():
            state.update(layer.sharded_state_dict(f"{prefix}exit_output_layers.{depth}.", sharded_offsets, metadata))
        for name in ("exit_blocks", "exit_mlps"):
            for depth, layer in getattr(self, name).items():
                state.update(layer.sharded_state_dict(f"{prefix}{name}.{depth}.", sharded_offsets, metadata))
        norms = {key: value for key, value in state.items() if key.startswith(f"{prefix}final_layernorm.")}
        replace_prefix_for_sharding(norms, f"{prefix}final_layernorm.", f"{prefix}decoder.final_layernorm.")
        output_key = f"{prefix}output_layer.weight"
        for key, value in list(state.items()):
            if "output_layer" in key and key.endswith("_extra_state"):
                del state[key]  # holds nothing; Megatron's GPTModel leaves it out too
            elif "output_layer" in key and hasattr(value, "allow_shape_mismatch"):
                value.allow_shape_mismatch = True  # padding of the vocabulary depends on the layout
        if self.tied and output_key in state:
            state[output_key].key = f"{prefix}embedding.word_embeddings.weight"
        for parameter in (p for group in self.shared_parameters().values() for p in group if getattr(p, "shared", False)):
            for value in state.values():
                if getattr(value, "data", None) is not None and value.data.data_ptr() == parameter.data_ptr():
                    value.replica_id = (parameter.copy_index, *value.replica_id[1:])
        return state
