"""Options of the commands that decode (model, way, sampling, prompts), and the values that they name."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sorted.conversion.hugging_face.families import DTYPES
from megatron_sorted.decoding.strategies import MEASURES, STRATEGIES, SamplingParameters
from megatron_sorted.decoding.tuning.choices import CHOICES
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import printable

if TYPE_CHECKING:  # it loads torch
    from megatron_sorted.decoding.choice import StrategyChoice
    from megatron_sorted.decoding.text_generator import TextGenerator

STRATEGY_OPTIONS = (
    "depth",
    "depths",
    "measure",
    "thresholds",
    "num_draft_tokens",
    "num_levels",
    "num_branches",
    "num_nodes",
    "num_candidates",
)
"""Options of ways; --exit-layers is ``strategy_depths`` on the command line, where ``depths`` are the model's."""


def check_positive(values: argparse.Namespace, *names: str) -> None:
    """Check that these options, as far as they are given, are at least 1.

    Raises:
        SettingsError: One is not.
    """
    for name in names:
        if (value := getattr(values, name)) is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is not 1 or more. Change it.")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model, where and in which numbers."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Hugging Face directory (llama, mistral, qwen2, qwen3), or checkpoints",
    )
    group.add_argument(
        "--draft",
        type=Path,
        metavar="MODEL",
        help="another model of the same vocabulary, which drafts",
    )
    group.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="N",
        help="exits to use (default: those that config.json names)",
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="directory or sentencepiece file (default: the model's)",
    )
    group.add_argument(
        "--prompt-template",
        metavar="FORM",
        help="plain, alpaca, chat or chat:NAME (default: as it was trained)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="KIND",
        help=f"{', '.join(DTYPES)} (%(default)s)",
    )
    group.add_argument(
        "--device", help="cpu, or as torch calls it (default: the accelerator, else cpu)"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )


def add_strategy_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how to generate; a way takes those options that it knows."""
    group = parser.add_argument_group(
        f"way (default: as tuned in MODEL/{CHOICES}, else full; its options likewise, else usual ones)"
    )
    group.add_argument(
        "--strategy", choices=tuple(STRATEGIES), metavar="NAME", help=", ".join(STRATEGIES)
    )
    group.add_argument(
        "--exit-layer",
        type=int,
        dest="depth",
        metavar="N",
        help="depth of the exit (fixed, self_speculative)",
    )
    group.add_argument(
        "--exit-layers",
        type=int,
        nargs="+",
        dest="strategy_depths",
        metavar="N",
        help="depths of exits, increasing (others)",
    )
    group.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="P",
        help="how sure each of these exits must be, 0..1",
    )
    group.add_argument(
        "--measure", choices=MEASURES, metavar="NAME", help=f"of how sure: {', '.join(MEASURES)}"
    )
    group.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="tokens drafted before a verification"
    )
    for name, what in (
        ("levels", "levels"),
        ("branches", "nodes of a level that are followed"),
        ("nodes", "nodes that are verified"),
        ("candidates", "followers looked at of each; 0: as many as followed"),
    ):
        group.add_argument(f"--num-{name}", type=int, metavar="N", help=f"tree: {what}")


def add_sampling_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what says which token is taken, and return the group of these options."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0: the most likely token (default: the model's, else 0)",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the fewest tokens whose probabilities sum to P",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="F",
        help="above 1: words of the text are less likely (1)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)"
    )
    return group


def add_generation_config(group: argparse._ArgumentGroup) -> None:
    """Add whether a model's own sampling settings are taken."""
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        metavar="WHICH",
        help="auto: sample as generation_config.json says; none (%(default)s)",
    )


def add_prompt_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Add which prompts are gone on with, and how many of them by default."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="texts to go on with, one a line"
    )
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="JSON lines with question_id, category, turns (Spec-Bench)",
    )
    group.add_argument(
        "--num-prompts",
        type=int,
        default=count,
        metavar="N",
        help="that are used, evenly spread (%(default)s)",
    )


def check_prompt_options(values: argparse.Namespace) -> None:
    """Check that prompts come from one place.

    Raises:
        SettingsError: They come from two, or from none.
    """
    if (values.prompt_file is None) == (values.questions is None):
        raise SettingsError(
            "Give --prompt-file or --questions, one of them: texts like those that will be written."
        )


def usual_sampling(
    values: argparse.Namespace, writer: "TextGenerator", temperature: float
) -> SamplingParameters:
    """Return how tokens are chosen where nobody asks otherwise.

    Args:
        values: With ``generation_config``.
        writer: The model.
        temperature: Where the model's files say none.

    Raises:
        DataError: generation_config.json holds a number that means nothing.
    """
    found = writer.form.sampling_defaults() if values.generation_config == "auto" else {}
    try:
        return SamplingParameters(**{"temperature": temperature, **found})
    except SettingsError as error:
        raise DataError(
            f"{writer.form.where}/generation_config.json: {error} --generation-config none does without it."
        ) from error


def sampling_of(
    values: argparse.Namespace, usual: SamplingParameters | None = None
) -> SamplingParameters:
    """Return how tokens are chosen: as the command line says, else as usual, else the most likely ones.

    Raises:
        SettingsError: A number that means nothing.
    """
    asked = {
        name: value
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        if (value := getattr(values, name)) is not None
    }
    return replace(usual or SamplingParameters(), **asked, seed=values.seed)


def requests_strategy(values: argparse.Namespace) -> bool:
    """Return whether a way, or an option of one, is given."""
    return values.strategy is not None or any(
        _strategy_option(values, name) is not None for name in STRATEGY_OPTIONS
    )


def strategy_choice(values: argparse.Namespace) -> "StrategyChoice":
    """Return which way is asked for."""
    from megatron_sorted.decoding.choice import StrategyChoice

    given = {
        name: value
        for name in STRATEGY_OPTIONS
        if (value := _strategy_option(values, name)) is not None
    }
    return StrategyChoice(
        values.model,
        values.draft,
        values.strategy,
        {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
    )


def _strategy_option(values: argparse.Namespace, name: str) -> object:
    return getattr(values, "strategy_depths" if name == "depths" else name)


def writer_of(values: argparse.Namespace) -> "TextGenerator":
    """Return the model, and say what must be known of it.

    Raises:
        SortedError: It cannot be used.
    """
    check_positive(values, "threads")
    import torch

    from megatron_sorted.decoding.text_generator import open_writer

    own = (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    values.device = values.device or own
    if values.device.split(":")[0] not in ("cpu", own):
        raise SettingsError(f"--device: torch sees no {values.device} here. Use --device {own}.")
    if values.threads:
        torch.set_num_threads(values.threads)
    writer = open_writer(
        values.model,
        values.draft,
        values.depths,
        values.tokenizer,
        getattr(torch, values.dtype),
        values.device,
        values.prompt_template,
    )
    for line in writer.notes:
        print(f"note: {printable(line)}", file=sys.stderr)
    return writer
