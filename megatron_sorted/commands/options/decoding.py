"""Options shared by the commands that decode (model, strategy, sampling, prompts), as objects."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sorted.confidence import MEASURES
from megatron_sorted.conversion.hugging_face.families import DTYPES
from megatron_sorted.decoding.native import CHOICES
from megatron_sorted.decoding.strategies import STRATEGIES, SamplingParameters
from megatron_sorted.decoding.tuning.tuned_options import TUNED_FILE, tuned_dtype
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.reading.shown import printable

if TYPE_CHECKING:  # it loads torch
    from megatron_sorted.decoding.requested_strategy import RequestedStrategy
    from megatron_sorted.decoding.text_generator import TextGenerator

DECODED_DTYPES = (*DTYPES, "int8")
"""Kinds of weights with which models are decoded."""
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
"""Options of strategies. The values of --exit-layers stand in ``strategy_depths``, since ``depths``
are the model's."""


def check_positive(values: argparse.Namespace, *names: str) -> None:
    """Check that each of these options is at least 1 if it is given.

    Raises:
        SettingsError: An option is below 1.
    """
    for name in names:
        if (value := getattr(values, name)) is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is not 1 or more. Change it.")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model, its device and its number format."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Hugging Face directory (llama, mistral, qwen2, qwen3) or checkpoints",
    )
    group.add_argument(
        "--draft", type=Path, metavar="MODEL", help="separate draft model with the same vocabulary"
    )
    group.add_argument(
        "--depths",
        nargs="+",
        type=int,
        metavar="N",
        help="exits to use (default: those in config.json)",
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
        help="plain, alpaca, chat or chat:NAME (default: as in training)",
    )
    group.add_argument(
        "--dtype",
        choices=DECODED_DTYPES,
        metavar="KIND",
        help=f"{', '.join(DECODED_DTYPES)} (CPUs) (default: as tuned, else float32)",
    )
    group.add_argument(
        "--device", help="cpu, or torch's name of a device (default: the accelerator)"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="number of CPU threads (default: torch's choice)"
    )
    group.add_argument(
        "--native",
        choices=CHOICES,
        default="auto",
        metavar="WHEN",
        help="decode on CPUs by a compiled library: auto, on, off (default: %(default)s)",
    )


def add_strategy_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a decoding strategy; a strategy ignores other strategies'."""
    group = parser.add_argument_group(
        f"decoding strategy (defaults: as tuned in MODEL/{TUNED_FILE}, else full)"
    )
    group.add_argument(
        "--strategy", choices=tuple(STRATEGIES), metavar="NAME", help=", ".join(STRATEGIES)
    )
    group.add_argument(
        "--exit-layer",
        type=int,
        dest="depth",
        metavar="N",
        help="depth of the exit, for fixed and self_speculative",
    )
    group.add_argument(
        "--exit-layers",
        type=int,
        nargs="+",
        dest="strategy_depths",
        metavar="N",
        help="depths of the exits, increasing, for the others",
    )
    group.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="P",
        help="confidence that each of these exits needs, 0..1",
    )
    group.add_argument(
        "--measure",
        choices=MEASURES,
        metavar="NAME",
        help=f"measure of confidence: {', '.join(MEASURES)}",
    )
    group.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="tokens drafted before each verification"
    )
    for name, what in (
        ("levels", "number of levels"),
        ("branches", "nodes of each level that get children"),
        ("nodes", "nodes to verify"),
        ("candidates", "children considered for each node; 0: as many as branches"),
    ):
        group.add_argument(f"--num-{name}", type=int, metavar="N", help=f"tree: {what}")


def add_sampling_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that control sampling, and return their group."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the most likely token (default: the model's, else 0)",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the fewest tokens whose probabilities sum to P",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="F",
        help="above 1: tokens of the text become less likely (default: 1)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    return group


def add_generation_config(group: argparse._ArgumentGroup) -> None:
    """Add the option that chooses whether a model's own sampling settings apply."""
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        metavar="WHICH",
        help="use generation_config.json: auto or none (default: %(default)s)",
    )


def add_prompt_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Add the options that choose prompts; ``count`` is how many are used by default."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompts, one on each line")
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
        help="number of prompts to use, evenly spread (default: %(default)s)",
    )


def check_prompt_options(values: argparse.Namespace) -> None:
    """Check that prompts come from exactly one source.

    Raises:
        SettingsError: Both sources or neither are given.
    """
    if (values.prompt_file is None) == (values.questions is None):
        raise SettingsError(
            "Give one of --prompt-file and --questions, with texts like those that will be written."
        )


def default_sampling(
    values: argparse.Namespace, generator: "TextGenerator", temperature: float
) -> SamplingParameters:
    """Return the sampling parameters for what the user does not set.

    Args:
        values: The options, with ``generation_config``.
        generator: The model.
        temperature: The temperature if the model's files name none.

    Raises:
        DataError: generation_config.json holds an impossible number.
    """
    stored = generator.form.sampling_defaults() if values.generation_config == "auto" else {}
    try:
        return SamplingParameters(**{"temperature": temperature, **stored})
    except SettingsError as error:
        raise DataError(
            f"{generator.form.where}/generation_config.json: {error} "
            "--generation-config none does without it."
        ) from error


def sampling_of(
    values: argparse.Namespace, defaults: SamplingParameters | None = None
) -> SamplingParameters:
    """Return the sampling parameters: the command line's, else ``defaults``, else greedy ones.

    Raises:
        SettingsError: An option has an impossible value.
    """
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        if (value := getattr(values, name)) is not None
    }
    return replace(defaults or SamplingParameters(), **given, seed=values.seed)


def requests_strategy(values: argparse.Namespace) -> bool:
    """Return whether a strategy or an option of one is given."""
    return values.strategy is not None or any(
        _strategy_option(values, name) is not None for name in STRATEGY_OPTIONS
    )


def requested_strategy(values: argparse.Namespace) -> "RequestedStrategy":
    """Return the choice of a strategy that the command line makes."""
    from megatron_sorted.decoding.requested_strategy import RequestedStrategy

    given = {
        name: value
        for name in STRATEGY_OPTIONS
        if (value := _strategy_option(values, name)) is not None
    }
    return RequestedStrategy(
        values.model,
        values.draft,
        values.strategy,
        {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
    )


def _strategy_option(values: argparse.Namespace, name: str) -> object:
    return getattr(values, "strategy_depths" if name == "depths" else name)


def _tuned_dtype(values: argparse.Namespace) -> str:
    """Return the kind of weights with which the model was tuned, where it can be used here.

    Raises:
        DataError: decoding.json is damaged.
    """
    from megatron_sorted.decoding.native.compiler import NativeError
    from megatron_sorted.decoding.native.library import native_library

    tuned = tuned_dtype(values.model / TUNED_FILE) if values.device == "cpu" else None
    if tuned == "int8":
        try:
            if values.native == "off":
                return "float32"
            native_library()
        except NativeError:  # the reason is printed when the network falls back to torch
            return "float32"
    return tuned or "float32"


def open_generator(values: argparse.Namespace, as_tuned: bool = True) -> "TextGenerator":
    """Open the model and print its notes.

    ``values.device`` and ``values.dtype`` become those that are chosen.

    Args:
        values: The options.
        as_tuned: Whether the kind of weights is by default that of decoding.json.

    Raises:
        SortedError: The model cannot be used.
    """
    check_positive(values, "threads")
    import torch

    from megatron_sorted.decoding.native.choice import native_kind
    from megatron_sorted.decoding.open_model import open_text_generator

    accelerator = (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    values.device = values.device or accelerator
    if values.device.split(":")[0] not in ("cpu", accelerator):
        raise SettingsError(
            f"--device: torch sees no {values.device} here. Use --device {accelerator}."
        )
    if values.threads:
        torch.set_num_threads(values.threads)
    values.dtype = values.dtype or (_tuned_dtype(values) if as_tuned else "float32")
    # before a checkpoint is exported or a model read, which may take minutes
    native_kind(values.native, getattr(torch, values.dtype), values.device)
    generator = open_text_generator(
        values.model,
        values.draft,
        values.depths,
        values.tokenizer,
        getattr(torch, values.dtype),
        values.device,
        values.prompt_template,
        values.native,
    )
    for line in generator.notes:
        print(f"note: {printable(line)}", file=sys.stderr)
    return generator
