"""A frozen model that teaches every exit, the last one too, and runs beside the network.

It is laid out over the stages like the network that trains. Its hidden state passes the stages in
the carrier (``training.step.carrier``), which the schedule sends anyway; on the last stage it is
normed and returns with the gradient, as the last exit's does where that is the teacher. So it needs
no messages of its own, on any schedule.
"""

import dataclasses
from pathlib import Path

import torch

from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.starting_settings import EXIT_FIELDS, network_fields
from megatron_sorted.data.batches import Batch
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.chunk import SortedChunk
from megatron_sorted.model.config import make_config, parameter_dtype, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.parallel.groups import process_groups
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import padded_vocab_size
from megatron_sorted.settings.layout import ChunkLayout, Layout, layout_of, num_virtual_chunks
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.carrier import TeacherSlot
from megatron_sorted.training.step.named_weights import load_by_name


def teacher_settings(settings: Settings) -> Settings:
    """Return the settings of a run's teacher: its own network, in the run's layout and precision.

    Raises:
        SettingsError: The teacher cannot teach this network, or cannot be laid out like it.
        CheckpointError: The directory holds no model that is understood.
    """
    directory = settings.exit_kd_teacher
    teacher = open_model(Path(directory)).settings
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(settings, name), getattr(teacher, name)
        if ours != theirs:
            raise SettingsError(
                f"--exit-kd-teacher: {directory} has --{name.replace('_', '-')} {theirs} and this "
                f"network {ours}. Give a teacher of the same width and vocabulary."
            )
    chunks, stages = num_virtual_chunks(settings), settings.pipeline_model_parallel_size
    same_depth = teacher.num_layers == settings.num_layers
    if not same_depth and teacher.num_layers % (chunks * stages):
        raise SettingsError(
            f"--exit-kd-teacher: {directory} has {teacher.num_layers} layers, which {stages} "
            f"stages of {chunks} chunks cannot share evenly. Use another layout, or a teacher of "
            "as many layers as the network."
        )
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    reset = (
        *EXIT_FIELDS,
        "lora_rank",
        "layer_dropout",
        "exit_kd_weight",
        "exit_kd_teacher",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
    )
    changes = network_fields(teacher) | {name: defaults[name] for name in reset}
    if not same_depth:
        changes |= {
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "pipeline_model_parallel_layout": None,
        }
        if chunks > 1:
            per_chunk = teacher.num_layers // (chunks * stages)
            changes["num_layers_per_virtual_pipeline_stage"] = per_chunk
    return dataclasses.replace(settings, **changes, hidden_dropout=0.0, attention_dropout=0.0)


def check_teacher(settings: Settings) -> None:
    """Check that the settings' teacher, if there is one, can teach this network.

    Raises:
        SettingsError: It cannot.
    """
    if settings.exit_kd_teacher is None:
        return
    try:
        teacher_settings(settings)
    except CheckpointError as error:
        raise SettingsError(f"--exit-kd-teacher: {error}") from error


class FrozenTeacher:
    """This rank's chunks of a frozen model, with a head on every rank that has exits to teach.

    Its weights are in the run's precision, without gradients and optimizer state. Nothing that it
    computes is kept for backward.

    Args:
        settings: The run.
        platform: The devices of the run.
        layout: The layout of the network that trains.
        stage: This rank's pipeline stage.
        vocab_size: Number of real tokens, before padding.
    """

    def __init__(
        self, settings: Settings, platform: Platform, layout: Layout, stage: int, vocab_size: int
    ):
        self.settings = own = teacher_settings(settings)
        self.window = settings.sliding_window
        config = make_config(own, platform)
        spec = layer_spec(own, uses_transformer_engine(own, platform))
        rows = padded_vocab_size(vocab_size, own)
        # an exit at the end of a teacher's chunk gives it the norm and the head through which the
        # exits of the network's chunk are taught
        ends = [
            theirs.layers_through
            for ours, theirs in zip(layout.chunks, layout_of(own).chunks, strict=True)
            if ours.exits
        ]
        self.chunks: list[SortedChunk] = []
        for chunk_layout in layout_of(own, ends).of_stage(stage):
            chunk = SortedChunk(
                own, config, spec, rows, chunk_layout, process_groups(), tuple(self.chunks)
            )
            chunk.to(device=current_device(), dtype=parameter_dtype(settings))
            self.chunks.append(chunk.requires_grad_(False).eval())
        load_by_name(Path(settings.exit_kd_teacher), own, self.chunks, None)

    @torch.no_grad()
    def run(
        self,
        chunk_layout: ChunkLayout,
        slot: TeacherSlot,
        batch: Batch,
        attention_mask: torch.Tensor | None,
    ) -> None:
        """Run the teacher's hidden state in ``slot`` through a chunk.

        After the last chunk, ``slot.normed_tbh`` is the normed state that exits learn from.

        Collective: Megatron's, of the layers (tensor parallel group).

        Args:
            chunk_layout: The chunk of the network that trains.
            slot: The slot of the micro-batch.
            batch: The micro-batch, on the device.
            attention_mask: The mask in the form of the network's layers.
        """
        chunk, own = self.chunks[chunk_layout.chunk], self.settings
        if own.sliding_window != self.window:
            attention_mask = make_attention_mask(
                batch.tokens_bs, batch.pieces_bs, own.sliding_window, parameter_dtype(own)
            )
        if not chunk.pre_process:
            chunk.set_input_tensor(slot.hidden_tbh)
        deepest = chunk.layout.layers_through
        hidden_tbh = chunk(
            batch.tokens_bs,
            batch.positions_bs,
            attention_mask,
            lambda _depth, hidden: hidden,
            deepest,
        )
        chunk.set_input_tensor(None)
        if chunk.layout.is_last:
            slot.normed_tbh, slot.hidden_tbh = chunk.head(deepest).norm(hidden_tbh), None
        else:
            slot.hidden_tbh = hidden_tbh

    def weight_ph(self, chunk: int) -> torch.Tensor:
        """Return this rank's shard of the teacher's output matrix, for the exits of a chunk."""
        return self.chunks[chunk].heads.output.weight
