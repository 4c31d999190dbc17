"""The form in which a finished model is asked, what ends its texts, and how it samples: read from its directory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_settings
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

GENERATION, CONFIG, EOS = "generation_config.json", "config.json", "eos_token_id"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class ModelForm:
    """How a model is asked, and what ends its texts.

    Attributes:
        prompt_form: Of conversations; None where contents stand one below the other.
        line: What is to be said about it.
        generation, config: What generation_config.json and config.json say.
        where: The directory.
        is_stored: Whether the form came with the model.
    """

    prompt_form: PromptForm | None = None
    line: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    where: str = "model"
    is_stored: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def check_rows(self, vocab_size: int) -> None:
        """Check that the model has a row for every end token; errors as for ``prompt_form.check_rows``."""
        if self.prompt_form is not None:
            check_rows(self.prompt_form, vocab_size, self.where)

    def end_ids_of(self, model, tokenizer: Tokenizer) -> frozenset[int]:
        """Return every token that ends a text: of generation_config.json and config.json, those trained, and the tokenizer's eos.

        The files are asked themselves: transformers gives a config that says nothing its family's own end token.

        Raises:
            DataError: One is no token of the model.
        """
        found: set[int] = set(self.prompt_form.end_ids if self.prompt_form else ())
        rows = getattr(model.config, "vocab_size", None) or float("inf")
        said = (
            {GENERATION: self.generation, CONFIG: self.config}
            if self.config
            else {GENERATION: {EOS: getattr(model.generation_config, EOS, None)}}
        )
        for name, content in said.items():
            found.update(end_tokens(content.get(EOS), f"{self.where}/{name}", rows))
        return frozenset(found | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set()))

    def sampling_defaults(self) -> dict[str, Any]:
        """Return temperature, top_p, top_k and repetition_penalty as far as generation_config.json says them.

        ``do_sample`` false means the most likely token; true without a temperature means 1.

        Raises:
            DataError: One is no number.
        """
        found = {
            name: value for name in SAMPLING if (value := self.generation.get(name)) is not None
        }
        for name, value in found.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < 1e6
            ):
                raise DataError(
                    f"{self.where}/{GENERATION}: {name} {shown(repr(value), 40)} is not a number of sampling. "
                    "Mend the file, or give --generation-config none."
                )
        if self.generation.get("do_sample") is False:
            found = {
                name: value for name, value in found.items() if name == "repetition_penalty"
            } | {"temperature": 0.0}
        elif self.generation.get("do_sample") is True:
            found.setdefault("temperature", 1.0)
        if "top_k" in found:
            found["top_k"] = int(found["top_k"]) or None  # 0: all
        return found


def form_of_label(label: str, tokenizer: Tokenizer) -> PromptForm:
    """Return the form that ``--prompt-template`` names.

    Raises:
        DataError: There is no such form or template.
    """
    name, template = parse_label(label)
    if name == CHAT:
        return chat_form(tokenizer, template)[0]
    return written_form(name, tokenizer, name == ALPACA, tokenizer.eos_id is not None)


def form_of_model(directory: Path, tokenizer: Tokenizer, label: str | None = None) -> ModelForm:
    """Return how a model is asked.

    Args:
        directory: The model's.
        tokenizer: Its own.
        label: ``--prompt-template``; None: the form stored with the model, else the tokenizer's own template.

    Raises:
        DataError: There is no such form, or the stored one does not fit the tokenizer.
    """
    stored = read_form(directory)
    if stored is not None:
        check_tokens(stored, tokenizer, str(directory / FILE))
    form, line = _choose(directory.name, stored, tokenizer, label)
    return ModelForm(
        form,
        line,
        read_settings(directory / GENERATION),
        shown(directory),
        form is not None and form is stored,
        read_settings(directory / CONFIG),
    )


def _choose(
    name: str, stored: PromptForm | None, tokenizer: Tokenizer, label: str | None
) -> tuple[PromptForm | None, str]:
    """Return the form in which a model is asked, and a line about it."""
    if stored is not None and stored.is_conversation and label in (None, stored.label):
        return stored, f"prompt form: {stored.label}, as trained"
    if label is not None:
        form = form_of_label(label, tokenizer)
        ends = {end.id: end for end in (*form.ends, *(stored.ends if stored else ()))}
        other = f"; the model was trained in {stored.label}" if stored is not None else ""
        return dataclasses.replace(
            form, ends=tuple(ends.values())
        ), f"prompt form: {form.label} (--prompt-template){other}"
    why = (
        f"{name} {NO_FORM}"
        if stored is None
        else f"{name} was trained on text, not on conversations"
    )
    if not tokenizer.chat_templates:
        return stored, f"note: {why}; a conversation is its contents, one a line"
    template, chosen = chosen_template(tokenizer, None)
    form = PromptForm(
        CHAT, template, dict(tokenizer.special_tokens), None, stored.ends if stored else (), chosen
    )
    return form, f"note: {why}; conversations are written by the tokenizer's own template"
