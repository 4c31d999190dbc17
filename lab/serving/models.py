"""The served copy of a model, whose texts do not end early, and the prompts."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lab.serving.dialects import Prompt
from megatron_sorted.benchmark.questions import MultiTurnQuestion, spread
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.errors import DataError
from megatron_sorted.files import write_text_atomically
from megatron_sorted.reading.json_text import read_json_object

WITHOUT_END = {
    "config.json": {"eos_token_id": None},
    "generation_config.json": {"eos_token_id": None},
    "tokenizer_config.json": {"eos_token": None},
    "special_tokens_map.json": {"eos_token": None},
    "prompt_form.json": {"ends": []},
}
"""Files that name tokens which end texts, and what stands there in the copy."""


def copy_model(model: Path, folder: Path, context: int) -> Path:
    """Return a copy of a model without end tokens and with at least this context.

    All servers then write the same number of tokens, and show a token that would have ended a text
    like any other. The weights are links.

    Args:
        model: Hugging Face directory.
        folder: The folder of all copies.
        context: Longest text.
    """
    config = read_json_object(model / "config.json")
    context = max(context, config.get("max_position_embeddings") or 0)
    names = model / "tokenizer_config.json"
    end = read_json_object(names).get("eos_token") if names.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    target = folder / f"{model.resolve().name}-{context}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.name == "tokenizer.json":
            tokenizer = read_json_object(file)
            for token in tokenizer.get("added_tokens", []):
                token["special"] &= token["content"] != end
            write_text_atomically(target / file.name, json.dumps(tokenizer))
            continue
        if file.name not in WITHOUT_END:
            os.symlink(file.resolve(), target / file.name)
            continue
        changes = dict(WITHOUT_END[file.name])
        if file.name == "config.json":
            changes["max_position_embeddings"] = context
        if file.name == "tokenizer_config.json":
            changes["model_max_length"] = context
        values = {**read_json_object(file), **changes}
        kept = {name: value for name, value in values.items() if value is not None}
        if file.name == "config.json":
            kept["eos_token_id"] = None  # where it is absent, transformers takes the family's
        write_text_atomically(target / file.name, json.dumps(kept, indent=1))
    return target


def make_prompts(
    generator: TextGenerator, questions: Sequence[MultiTurnQuestion], count: int, most: int
) -> list[Prompt]:
    """Return first turns of evenly spread questions as prompts of at most ``most`` tokens.

    Raises:
        DataError: No question is short enough.
    """
    prompts = []
    for question in questions:
        text = f"{question.turns[0]}\n"
        ids = generator.encode(text)
        if len(ids) <= most:
            prompts.append(Prompt(text, ids))
    if not prompts:
        raise DataError(f"--questions: no first turn has at most {most} tokens. Use another file.")
    return spread(prompts, count)


def long_prompt(
    generator: TextGenerator, questions: Sequence[MultiTurnQuestion], length: int
) -> Prompt:
    """Return a prompt of about this many tokens, in whole pieces, from turns of the questions."""
    whole = " ".join(turn for question in questions for turn in question.turns)
    parts = (whole + " ").split(" ")
    while len(parts) < length:
        parts += parts
    ids = generator.encode(" ".join(parts[:length]))
    while len(ids) > length:
        parts = parts[: int(len(parts[:length]) * length / len(ids)) or 1]
        ids = generator.encode(" ".join(parts))
    return Prompt(" ".join(parts[:length]), ids)
