"""Prompt template, end tokens and sampling defaults of a finished model, from its directory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.conversion.hugging_face.families import CONFIG_FILE, GENERATION_FILE
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_optional_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.conversation import chat_form, chosen_template
from megatron_sorted.text.prompt_form import (
    ALPACA,
    CHAT,
    FILE,
    NO_FORM,
    PromptForm,
    check_rows,
    check_tokens,
    end_tokens,
    parse_label,
    read_form,
)
from megatron_sorted.text.tokenizer.contract import Tokenizer
from megatron_sorted.text.written_forms import written_form

EOS = "eos_token_id"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """The prompt template, end tokens and sampling defaults of a model.

    Attributes:
        prompt_form: The prompt template of conversations; None joins their contents, one a line.
        line: A line to print about the template.
        generation, config: The contents of generation_config.json and config.json.
        where: The name of the directory, for messages.
        is_stored: Whether the template came with the model.
    """

    prompt_form: PromptForm | None = None
    line: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    where: str = "model"
    is_stored: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def form_in_use(self, is_chosen: bool) -> PromptForm | None:
        """Return the template that came with the model or was chosen; None for a guessed one."""
        return self.prompt_form if self.is_stored or is_chosen else None

    def check_rows(self, vocab_size: int) -> None:
        """Check that the vocabulary has every end token; errors: ``prompt_form.check_rows``."""
        if self.prompt_form is not None:
            check_rows(self.prompt_form, vocab_size, self.where)

    def end_ids_of(self, model, tokenizer: Tokenizer) -> frozenset[int]:
        """Return all tokens that end a text.

        They come from generation_config.json, config.json, the prompt template and the tokenizer's
        eos. The files themselves are read: where config.json names none, transformers assumes the
        end token of the model family.

        Raises:
            DataError: An entry is no token of the model.
        """
        end_ids: set[int] = set(self.prompt_form.end_ids if self.prompt_form else ())
        rows = getattr(model.config, "vocab_size", None) or float("inf")
        contents = (
            {GENERATION_FILE: self.generation, CONFIG_FILE: self.config}
            if self.config
            else {GENERATION_FILE: {EOS: getattr(model.generation_config, EOS, None)}}
        )
        for name, content in contents.items():
            end_ids.update(end_tokens(content.get(EOS), f"{self.where}/{name}", rows))
        return frozenset(end_ids | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set()))

    def sampling_defaults(self) -> dict[str, Any]:
        """Return the sampling parameters that generation_config.json sets.

        ``do_sample`` false means temperature 0, the most likely token; true without a temperature
        means 1.

        Raises:
            DataError: A value is no number.
        """
        values = {
            name: value for name in SAMPLING if (value := self.generation.get(name)) is not None
        }
        for name, value in values.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < 1e6
            ):
                raise DataError(
                    f"{self.where}/{GENERATION_FILE}: {name} {shown(repr(value), 40)} is not a "
                    "number of sampling. Correct the file, or give --generation-config none."
                )
        if self.generation.get("do_sample") is False:
            values = {
                name: value for name, value in values.items() if name == "repetition_penalty"
            } | {"temperature": 0.0}
        elif self.generation.get("do_sample") is True:
            values.setdefault("temperature", 1.0)
        if "top_k" in values:
            values["top_k"] = int(values["top_k"]) or None  # 0: all
        return values


def form_of_label(label: str, tokenizer: Tokenizer) -> PromptForm:
    """Return the prompt template that ``--prompt-template`` names.

    Raises:
        DataError: There is no such template.
    """
    name, template = parse_label(label)
    if name == CHAT:
        return chat_form(tokenizer, template)[0]
    return written_form(name, tokenizer, name == ALPACA, tokenizer.eos_id is not None)


def generation_defaults_of(
    directory: Path, tokenizer: Tokenizer, label: str | None = None
) -> GenerationDefaults:
    """Return prompt template, end tokens and sampling defaults of a model.

    Args:
        directory: The directory of the model.
        tokenizer: The model's tokenizer.
        label: The value of ``--prompt-template``. None takes the template stored with the model,
            otherwise the tokenizer's own.

    Raises:
        DataError: There is no such template, or the stored one does not fit the tokenizer.
    """
    stored = read_form(directory)
    if stored is not None:
        check_tokens(stored, tokenizer, str(directory / FILE))
    form, line = _choose(directory.name, stored, tokenizer, label)
    return GenerationDefaults(
        form,
        line,
        read_optional_object(directory / GENERATION_FILE),
        shown(directory),
        form is not None and form is stored,
        read_optional_object(directory / CONFIG_FILE),
    )


def _choose(
    name: str, stored: PromptForm | None, tokenizer: Tokenizer, label: str | None
) -> tuple[PromptForm | None, str]:
    """Choose the prompt template of a model; return it with a line about the choice."""
    if stored is not None and stored.is_conversation and label in (None, stored.label):
        return stored, f"prompt form: {stored.label}, as trained"
    if label is not None:
        form = form_of_label(label, tokenizer)
        ends = {end.id: end for end in (*form.ends, *(stored.ends if stored else ()))}
        other = f"; the model was trained in {stored.label}" if stored is not None else ""
        return dataclasses.replace(
            form, ends=tuple(ends.values())
        ), f"prompt form: {form.label} (--prompt-template){other}"
    reason = (
        f"{name} {NO_FORM}"
        if stored is None
        else f"{name} was trained on text, not on conversations"
    )
    if not tokenizer.chat_templates:
        return stored, f"note: {reason}; a conversation is its contents, one a line"
    template, chosen = chosen_template(tokenizer, None)
    form = PromptForm(
        CHAT, template, dict(tokenizer.special_tokens), None, stored.ends if stored else (), chosen
    )
    return form, f"note: {reason}; conversations are written by the tokenizer's own template"
