"""The summary that megatron-sorted prepare writes beside the data.

It is ``P.json`` for ``P_text_document`` and ``P_valid_text_document``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.prompt_form import NO_FORM, PromptForm, form_from_dict
from megatron_sorted.text.tokenizer.contract import Tokenizer

REMEDY = "Prepare the data again, or remove this file."
ENDINGS = ("_valid_text_document", "_text_document")


def summary_path(prefix: str) -> Path | None:
    """Return the summary of the data at ``prefix``, or None if there is none.

    Data of another tool, or data that were moved alone, have none.
    """
    for ending in ENDINGS:
        path = Path(f"{prefix.removesuffix(ending)}.json")
        if prefix.endswith(ending) and path.is_file():
            return path
    return None


def stored_options(prefix: str) -> dict:
    """Return the content of the summary of the data at ``prefix``; empty if there is none.

    Raises:
        DataError: It cannot be read.
    """
    path = summary_path(prefix)
    return {} if path is None else read_json_object(path, REMEDY)


def check_same_tokenizer(
    prefixes: Sequence[str], tokenizer: Tokenizer, owner: str = "--tokenizer-model is"
) -> None:
    """Check that no summary names another tokenizer, in whatever form of its vocabulary.

    Raises:
        DataError: One does, or it cannot be read. Its tokens would mean other words, and nothing
            else would show it.
    """
    for prefix in prefixes:
        path = summary_path(prefix)
        if path is None:
            continue
        try:
            recorded = stored_options(prefix)["tokenizer"]
            name, sha256 = shown(recorded["name"]), shown(recorded["sha256"])
        except (KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {shown(error)}"
            raise DataError(
                f"{shown(path)}: not readable as the summary of prepared data ({reason}). {REMEDY}"
            ) from error
        if sha256 not in tokenizer.hashes:
            raise DataError(
                f"{prefix}: prepared with tokenizer {name} (sha256 {sha256[:16]}), but {owner} "
                f"{tokenizer.name} (sha256 {tokenizer.sha256[:16]}). Give the tokenizer the data "
                "was prepared with, or prepare it again."
            )


def read_prompt_form(prefix: str) -> PromptForm | None:
    """Return the form in which data were prepared; None if no summary states it.

    Raises:
        DataError: The summary is damaged.
    """
    fields = stored_options(prefix).get("prompt_form")
    return form_from_dict(fields, f"{summary_path(prefix)}: prompt_form") if fields else None


def form_of_data(sources: Sequence[tuple[float, str]]) -> tuple[PromptForm | None, list[str]]:
    """Return the form of conversation that data teach, and lines about it.

    Of several forms it is that of most weight.

    Args:
        sources: (weight, prefix) of all training data.

    Raises:
        DataError: A summary is damaged.
    """
    weights: dict[PromptForm, float] = {}
    first: dict[PromptForm, str] = {}
    lines, without = [], []
    for weight, prefix in sources:
        form = read_prompt_form(prefix)
        if form is None:
            without.append(prefix)
            continue
        known = next((other for other in weights if other.as_dict() == form.as_dict()), form)
        first.setdefault(known, prefix)
        weights[known] = weights.get(known, 0.0) + weight
    if without:
        lines.append(f"{', '.join(without[:3])} {NO_FORM}; how its prompts are written is unknown")
    candidates = [form for form in weights if form.is_conversation] or list(weights)
    if not candidates:
        return None, lines
    chosen = max(candidates, key=lambda form: weights[form])
    same = [form for form in candidates if form.template == chosen.template]
    ends = {end.id: end for form in same for end in form.ends}
    if len(candidates) > len(same):
        forms = ", ".join(f"{form.label} ({first[form]})" for form in candidates)
        lines.append(
            f"the training data are written in several forms: {forms}. The model will be prompted "
            f"in that of most weight, {chosen.label} ({first[chosen]}); --prompt-template of "
            "generate, serve and evaluate selects another"
        )
    form_with_ends = dataclasses.replace(chosen, ends=tuple(ends.values()))
    end_texts = " ".join(end.text for end in form_with_ends.ends) or "nothing"
    lines.append(
        f"prompt form: {form_with_ends.label}; "
        f"{'answers' if form_with_ends.is_conversation else 'documents'} end with {end_texts}"
    )
    return form_with_ends, lines
