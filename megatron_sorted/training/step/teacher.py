"""A frozen model that teaches every exit, the last one too: laid out over the stages as the network that trains, run beside it.

Its hidden state passes the stages in the carrier (``training.carrier``), which the schedule moves anyway; on the last stage it is normed
and goes back with the gradient, as the last exit's does where that is the teacher. So no message of its own is needed, on any schedule.
"""

import dataclasses
from pathlib import Path

import torch

from megatron_sorted.conversion.network import EXITS, network_fields
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.data.batches import Batch
from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.model.attention import make_attention_mask
from megatron_sorted.model.config import make_config, parameter_dtype, uses_transformer_engine
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.model.stage import SortedStage
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import current_device
from megatron_sorted.settings.derived import padded_vocab_size
from megatron_sorted.settings.layout import ChunkLayout, Layout, layout_of, num_virtual_chunks
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.hugging_face import load_by_name
from megatron_sorted.training.step.carrier import TeacherSlot


def teacher_settings(settings: Settings) -> Settings:
    """Return the settings that the teacher of a run is built by: its own network, in the run's layout and precision.

    Raises:
        SettingsError: It cannot teach this network, or cannot be laid out like it.
        CheckpointError: The directory holds no model that is understood.
    """
    directory = settings.exit_kd_teacher
    found = open_model(Path(directory)).settings
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(settings, name), getattr(found, name)
        if ours != theirs:
            raise SettingsError(
                f"--exit-kd-teacher: {directory} has --{name.replace('_', '-')} {theirs} and this network {ours}. Give a "
                "teacher of the same width and vocabulary."
            )
    chunks, stages = num_virtual_chunks(settings), settings.pipeline_model_parallel_size
    same = found.num_layers == settings.num_layers
    if not same and found.num_layers % (chunks * stages):
        raise SettingsError(
            f"--exit-kd-teacher: {directory} has {found.num_layers} layers, which {stages} stages of {chunks} chunks "
            "cannot share evenly. Use another layout, or a teacher of as many layers as the network."
        )
    plain = {field.name: field.default for field in dataclasses.fields(Settings)}
    changes = network_fields(found) | {
        name: plain[name]
        for name in (
            *EXITS,
            "lora_rank",
            "layer_dropout",
            "exit_kd_weight",
            "exit_kd_teacher",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
        )
    }
    if not same:
        changes |= {
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "pipeline_model_parallel_layout": None,
        }
        if chunks > 1:
            changes["num_layers_per_virtual_pipeline_stage"] = found.num_layers // (chunks * stages)
    return dataclasses.replace(settings, **changes, hidden_dropout=0.0, attention_dropout=0.0)


def check_teacher(settings: Settings) -> None:
    """Check that the teacher in the settings can teach this network.

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

    Weights are in the run's precision; no gradients, no optimizer state. Whatever it computes is not kept for backward.

    Args:
        settings: The run.
        platform: Where it runs.
        layout: Of the network that trains.
        stage: This rank's pipeline stage.
        vocab_size: Real tokens.
    """

    def __init__(
        self, settings: Settings, platform: Platform, layout: Layout, stage: int, vocab_size: int
    ):
        self.settings = own = teacher_settings(settings)
        self.window = settings.sliding_window
        config, spec = (
            make_config(own, platform),
            layer_spec(own, uses_transformer_engine(own, platform)),
        )
        # an exit where a chunk ends gives it the norm and the head that the exits of the chunk beside it are taught through
        ends = [
            theirs.last_layer
            for ours, theirs in zip(layout.chunks, layout_of(own).chunks, strict=True)
            if ours.exits
        ]
        self.chunks: list[SortedStage] = []
        for plan in layout_of(own, ends).of_stage(stage):
            chunk = SortedStage(
                own, config, spec, padded_vocab_size(vocab_size, own), plan, tuple(self.chunks)
            )
            self.chunks.append(
                chunk.to(device=current_device(), dtype=parameter_dtype(settings))
                .requires_grad_(False)
                .eval()
            )
        load_by_name(Path(settings.exit_kd_teacher), own, self.chunks, None)

    @torch.no_grad()
    def run(
        self, plan: ChunkLayout, box: TeacherSlot, batch: Batch, attention_mask: torch.Tensor | None
    ) -> None:
        """Take the teacher's hidden state in ``box`` through a chunk; after the last one it is the normed one that exits learn from.

        Collective: Megatron's, of the layers (tensor parallel group).

        Args:
            plan: Of the chunk of the network that trains.
            box: Of the micro-batch.
            batch: On the device.
            attention_mask: As the network's layers take it.
        """
        stage, own = self.chunks[plan.chunk], self.settings
        if own.sliding_window != self.window:
            attention_mask = make_attention_mask(
                batch.tokens_bs, batch.segments_bs, own.sliding_window, parameter_dtype(own)
            )
        if not stage.pre_process:
            stage.set_input_tensor(box.hidden_tbh)
        deepest = stage.plan.last_layer
        hidden_tbh = stage(
            batch.tokens_bs,
            batch.positions_bs,
            attention_mask,
            lambda _depth, hidden: hidden,
            deepest,
        )
        stage.set_input_tensor(None)
        if stage.plan.is_last:
            box.normed_tbh, box.hidden_tbh = stage.head(deepest).norm(hidden_tbh), None
        else:
            box.hidden_tbh = hidden_tbh

    def weight_ph(self, chunk: int) -> torch.Tensor:
        """Return the teacher's output matrix, this rank's shard of the vocabulary, for the exits of a chunk."""
        return self.chunks[chunk].heads.output.weight
