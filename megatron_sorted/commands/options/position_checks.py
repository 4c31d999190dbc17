"""Checks of ``megatron-sorted evaluate --by-position`` against models and texts.

They run before the first model is loaded.
"""

import argparse
from collections.abc import Mapping, Sequence

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, read_config
from megatron_sorted.conversion.hugging_face.rope_keys import rope_of_config
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.by_position import check_length
from megatron_sorted.evaluation.documents import Document
from megatron_sorted.evaluation.evaluate import Subject
from megatron_sorted.evaluation.positions import Positions
from megatron_sorted.exported.generation_defaults import GenerationDefaults
from megatron_sorted.exported.tokenizer import open_tokenizer


def check_positions(
    values: argparse.Namespace,
    positions: Positions,
    subjects: Sequence[Subject],
    forms: Sequence[GenerationDefaults],
    texts: Mapping[str, Sequence[Document]],
) -> None:
    """Check that all models can read windows of this length, and that all texts have one.

    Args:
        values: The options.
        positions: Windows and buckets.
        subjects: The models.
        forms: What is known of the prompt form of each.
        texts: Documents by name.

    Raises:
        CheckpointError: A config.json names no supported rotary positions.
        SettingsError: The scaling of a model's rotary positions is meant for shorter texts.
        DataError: A text has no window of this length.
    """
    for subject, form in zip(subjects, forms, strict=True):
        rope = rope_of_config(read_config(subject.directory), f"{subject.name}/{CONFIG_FILE}")
        if rope.longest is not None and positions.length > rope.longest:
            raise SettingsError(
                f"--length: {positions.length} is more than the {rope.longest} tokens that the "
                f"rotary positions of {subject.name} are scaled to ({rope}). "
                f"Use at most {rope.longest}, or train it with a greater --rope-scaling-factor."
            )
        tokenizer = open_tokenizer(subject.directory, values.tokenizer)
        used = form.form_in_use(values.prompt_template is not None)
        for name, documents in texts.items():
            check_length(name, documents, tokenizer, values.append_eos, used, positions)
