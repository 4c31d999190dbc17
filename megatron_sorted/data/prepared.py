"""What megatron-sorted prepare left beside the data: ``P.json``, for ``P_text_document`` and ``P_valid_text_document``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reading.shown import shown
from megatron_sorted.text.prompt_form import NO_FORM, PromptForm, form_from_dict

REMEDY = "Prepare the data again, or take this file away."
ENDINGS = ("_valid_text_document", "_text_document")


def summary_path(prefix: str) -> Path | None:
    """Return the summary of the data at ``prefix``, or None where there is none (data made by another tool, or moved alone)."""
    for ending in ENDINGS:
        path = Path(f"{prefix.removesuffix(ending)}.json")
        if prefix.endswith(ending) and path.is_file():
            return path
    return None


def stored_options(prefix: str) -> dict:
    """Return what the summary of the data at ``prefix`` says, or nothing where there is none.

    Raises:
        DataError: It cannot be read.
    """
    path = summary_path(prefix)
    return {} if path is None else read_json_object(path, REMEDY)


def check_same_tokenizer(
    prefixes: Sequence[str], tokenizer: Tokenizer, owner: str = "--tokenizer-model is"
) -> None:
    """Check that no summary names another tokenizer than ``tokenizer``, in whatever form of its vocabulary.

    Raises:
        DataError: One does, or it cannot be read. Its tokens would mean other words, and nothing else would tell.
    """
    for prefix in prefixes:
        path = summary_path(prefix)
        if path is None:
            continue
        try:
            made_with = stored_options(prefix)["tokenizer"]
            name, sha256 = shown(made_with["name"]), shown(made_with["sha256"])
        except (KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {shown(error)}"
            raise DataError(
                f"{shown(path)}: not readable as the summary of prepared data ({reason}). {REMEDY}"
            ) from error
        if sha256 not in tokenizer.hashes:
            raise DataError(
                f"{prefix}: prepared with tokenizer {name} (sha256 {sha256[:16]}), but {owner} {tokenizer.name} "
                f"(sha256 {tokenizer.sha256[:16]}). Give the tokenizer the data was prepared with, or prepare it again."
            )


def read_prompt_form(prefix: str) -> PromptForm | None:
    """Return the form in which data were prepared; None where their summary says none, or is not there.

    Raises:
        DataError: The summary is damaged.
    """
    said = stored_options(prefix).get("prompt_form")
    return form_from_dict(said, f"{summary_path(prefix)}: prompt_form") if said else None


def form_of_data(sources: Sequence[tuple[float, str]]) -> tuple[PromptForm | None, list[str]]:
    """Return the form of conversation that data teach, and lines about it; of several, that of most weight.

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
        known = next((one for one in weights if one.as_dict() == form.as_dict()), form)
        first.setdefault(known, prefix)
        weights[known] = weights.get(known, 0.0) + weight
    if without:
        lines.append(
            f"{', '.join(without[:3])} {NO_FORM}; nothing is known of how its prompts are written"
        )
    talks = [form for form in weights if form.is_conversation] or list(weights)
    if not talks:
        return None, lines
    chosen = max(talks, key=lambda form: weights[form])
    alike = [form for form in talks if form.template == chosen.template]
    ends = {end.id: end for form in alike for end in form.ends}
    if len(talks) > len(alike):
        said = ", ".join(f"{form.label} ({first[form]})" for form in talks)
        lines.append(
            f"the training data are written in several forms: {said}. The model will be asked in that of most weight, "
            f"{chosen.label} ({first[chosen]}); --prompt-template of generate, serve and evaluate takes another"
        )
    found = dataclasses.replace(chosen, ends=tuple(ends.values()))
    words = " ".join(end.text for end in found.ends) or "nothing"
    lines.append(
        f"prompt form: {found.label}; {'answers' if found.is_conversation else 'documents'} end with {words}"
    )
    return found, lines
