"""How an extracted sub-model drafts for the full one under llama-server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.decoding.strategies import (
    STRATEGIES,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.decoding.tuning.tuned_options import TUNED_FILE, read_tuned_options
from megatron_sorted.llama_cpp.programs import shown_command

END_KEYS = ("eos", "eot", "eom")
"""llama.cpp's places for tokens that end a text."""


@dataclass(frozen=True)
class DraftSettings:
    """Settings of a draft.

    Attributes:
        depth: Number of layers of the model that drafts; None: nothing drafts.
        num_draft_tokens: Most tokens of a draft (--spec-draft-n-max).
        least_confidence: Probability below which it ends (--spec-draft-p-min). llama.cpp's
            is that among the ten most likely tokens.
        origin: Where the settings come from, for a line.
    """

    depth: int | None
    num_draft_tokens: int = 4
    least_confidence: float = 0.0
    origin: str = ""


def draft_settings(model: Path, exits: Sequence[int]) -> DraftSettings:
    """Return the settings that decoding.json names for a model, else defaults.

    A strategy with several exits becomes its first one: llama.cpp has one model that drafts, and
    a draft of ours continues with a deeper exit where the first is not sure.

    Args:
        model: The model's directory.
        exits: Depths of its exits, the full model last.

    Raises:
        DataError: decoding.json is damaged.
    """
    shallower = list(exits)[:-1]
    if not shallower:
        return DraftSettings(None, origin="the model has no exit that could draft")
    tuned = read_tuned_options(model / TUNED_FILE)
    strategies = tuned.get("strategies", {})
    order = [tuned.get("best"), *(one.name for one in (SelfSpeculative, SortedSpeculative,
                                                       TreeSpeculative))]  # fmt: skip
    for name in order:
        chosen = _settings_of(name, strategies.get(name))
        if chosen is not None and chosen.depth in shallower:
            return chosen
    return DraftSettings(
        shallower[0],
        origin=f"defaults, since no {TUNED_FILE} names a draft: megatron-sorted tune measures one",
    )


def _settings_of(name: str | None, options: Mapping[str, Any] | None) -> DraftSettings | None:
    """Return the settings that stand for a strategy; None for one that drafts nothing."""
    if options is None:
        return None
    strategy = STRATEGIES[name](
        **{key: tuple(one) if isinstance(one, list) else one for key, one in options.items()}
    )
    origin = f"{TUNED_FILE}, {name}"
    if isinstance(strategy, SelfSpeculative):
        return DraftSettings(strategy.depth, strategy.num_draft_tokens, origin=origin)
    if isinstance(strategy, SortedSpeculative):
        is_probability = strategy.measure == "probability"
        return DraftSettings(
            strategy.depths[0],
            strategy.num_draft_tokens,
            strategy.thresholds[0] if is_probability else 0.0,
            origin + ("" if is_probability else f" without its threshold of {strategy.measure}"),
        )
    if isinstance(strategy, TreeSpeculative):
        return DraftSettings(strategy.depths[0], strategy.num_levels, origin=origin)
    return None


def serve_command(
    full: Path,
    draft: Path | None,
    settings: DraftSettings,
    ends: Sequence[int] = (),
    program: Path | str = "llama-server",
) -> str:
    """Return the command that serves a file, with the model that drafts if there is one.

    Args:
        full: The full model's file.
        draft: The file of the model that drafts; None without one.
        settings: Settings of the draft.
        ends: Tokens that end a text; the first stands in the file, the others are given here.
        program: llama-server.
    """
    command: list[object] = [program, "--model", full]
    for name, token in list(zip(END_KEYS, ends, strict=False))[1:]:
        command += ["--override-kv", f"tokenizer.ggml.{name}_token_id=int:{token}"]
    if draft is not None:
        command += [
            "--model-draft", draft, "--spec-type", "draft-simple",
            "--spec-draft-n-max", settings.num_draft_tokens,
            "--spec-draft-p-min", f"{settings.least_confidence:g}",
        ]  # fmt: skip
    return shown_command(command)
