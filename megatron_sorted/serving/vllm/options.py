"""What the plug-in is asked to do, and the arguments with which vLLM is started. Needs no vLLM."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sorted.confidence import MAX_DRAFT_TOKENS, MEASURES
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving.vllm.exits import Exits, read_exits_of

KEY = "megatron_sorted"
"""The key of our options in vLLM's --additional-config."""
STRATEGIES = ("full", "fixed", "self_speculative", "sorted_speculative")
"""Decoding strategies, named as in ``decoding/strategies.py``; vLLM has no tree, no early exit."""
WORKER = "megatron_sorted.serving.vllm.worker.NestedWorker"


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM decodes a nested model.

    Attributes:
        strategy: full, fixed (the model of one exit), self_speculative (one exit drafts) or
            sorted_speculative (several draft, each token by the first that is confident).
        depths: Depths of the exits: none, one, one, or one or more in increasing order.
        thresholds: Confidence that each exit needs, for sorted_speculative.
        measure: Measure of confidence, for sorted_speculative.
        num_draft_tokens: Largest number of tokens drafted before a verification.
        draft_schedule: Rows (first batch size, last batch size, number of draft tokens), for vLLM's
            num_speculative_tokens_per_batch_size; without any it always is num_draft_tokens.
    """

    strategy: str = "full"
    depths: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    measure: str = "probability"
    num_draft_tokens: int = 4
    draft_schedule: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            SettingsError: An option is unknown or out of range, or does not fit the strategy.
        """
        _one_of(self.strategy, STRATEGIES, "strategy")
        _one_of(self.measure, MEASURES, "measure")
        _require(
            list(self.depths) == sorted(set(self.depths)),
            f"depths: {_listed(self.depths)} do not increase. Sort them.",
        )
        fitting = {"full": not self.depths, "sorted_speculative": bool(self.depths)}
        _require(
            fitting.get(self.strategy, len(self.depths) == 1),
            f"depths: {_listed(self.depths) or 'none'} for the strategy {self.strategy}, which "
            f"takes {_WANTED[self.strategy]}. Change them, or the strategy.",
        )
        wanted = len(self.depths) if self.strategy == "sorted_speculative" else 0
        _require(
            len(self.thresholds) == wanted,
            f"thresholds: {len(self.thresholds)} values for the strategy {self.strategy} with "
            f"{len(self.depths)} exits. Give {wanted or 'none'}"
            f"{', one for each exit' if wanted else ''}.",
        )
        for threshold in self.thresholds:
            _require(
                0 <= threshold <= 1,
                f"thresholds: {threshold} is not in 0..1. Give the confidence that an exit needs.",
            )
        for drafted, low in (
            (self.num_draft_tokens, 1),
            *((n, 0) for *_, n in self.draft_schedule),
        ):
            _require(
                low <= drafted <= MAX_DRAFT_TOKENS,
                f"num_draft_tokens: {drafted} is not in {low}..{MAX_DRAFT_TOKENS}. Change it.",
            )

    @property
    def drafts(self) -> bool:
        """Return whether exits draft."""
        return self.strategy in ("self_speculative", "sorted_speculative")

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; `from_json` reads them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: object) -> "EngineOptions":
        """Return the options that JSON values describe.

        Raises:
            SettingsError: A key is unknown, or a value has another type or is out of range.
        """
        known = {one.name: one.type for one in fields(cls)}
        if not isinstance(values, Mapping):
            raise SettingsError(
                f"{KEY}: {values!r} is no object. Give {{...}} with {_keys(known)}."
            )
        for key in values:
            _require(key in known, f"{KEY}: {key!r} is no option. Use {_keys(known)}.")
        try:
            return cls(**{key: _typed(key, value) for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{KEY}: {error}. Correct --additional-config.") from None


_WANTED = {
    "full": "none",
    "fixed": "one",
    "self_speculative": "one",
    "sorted_speculative": "one or more",
}


def engine_arguments(model: str | Path, options: EngineOptions) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's ``LLM`` that these options need.

    Those of ``vllm serve`` are the same; see `command_line`.

    Args:
        model: The exported directory.
        options: The options.

    Raises:
        CheckpointError: The directory is no model with exits.
        SettingsError: The model does not support the options.
    """
    arguments: dict[str, Any] = {"model": str(model)}
    if options.strategy == "full":
        return arguments
    exits = read_exits_of(Path(model))
    check_options(options, exits)
    arguments |= {"worker_cls": WORKER, "additional_config": {KEY: options.to_json()}}
    if not options.drafts:
        arguments["hf_overrides"] = exits.overrides_at(options.depths[0])
        return arguments
    arguments["speculative_config"] = {
        "method": "draft_model",
        "model": str(model),
        "num_speculative_tokens": options.num_draft_tokens,
    }
    if options.draft_schedule:
        rows = [list(row) for row in options.draft_schedule]
        arguments["speculative_config"]["num_speculative_tokens_per_batch_size"] = rows
    if options.strategy == "sorted_speculative":
        # drafts of several lengths reach the scheduler as lists of the host
        arguments["async_scheduling"] = False
    return arguments


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Return `engine_arguments` as those of ``vllm serve``, which follow these two words.

    >>> command_line({"model": "m", "worker_cls": "a.B", "async_scheduling": False})
    ['m', '--worker-cls', 'a.B', '--no-async-scheduling']
    """
    words = [arguments["model"]]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "model":
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return words


def environment(options: EngineOptions) -> dict[str, str]:
    """Return the environment variables with which vLLM must be started."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"} if options.drafts else {}


def check_options(options: EngineOptions, exits: Exits) -> None:
    """Check that a model supports the options.

    Raises:
        SettingsError: A depth is no exit, or the exit has parts that the strategy cannot use.
    """
    for depth in options.depths:
        usable = exits.depths[:-1] if options.drafts else exits.depths
        _require(
            depth in usable,
            f"depths: {depth} is no exit of {exits.directory} "
            f"{'below its last layer' if options.drafts else 'that can be served'}. Use "
            f"{_listed(usable)}.",
        )
        _require(
            not (options.drafts and exits.block),
            f"depths: exit {depth} of {exits.directory} has a block of its own, which would need "
            "keys and values of its own for every token. Extract it (megatron-sorted extract "
            f"--depth {depth}) and let vLLM draft with that directory: --speculative-config "
            '\'{"method": "draft_model", "model": DIRECTORY, "num_speculative_tokens": 4}\'.',
        )


def _typed(key: str, value: object) -> object:
    if key in ("strategy", "measure"):
        kind, wanted = str, "a name"
    elif key == "num_draft_tokens":
        kind, wanted = int, "a whole number"
    else:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{key} is {value!r}, not a list")
        if key == "draft_schedule":
            rows = [_tuple(row, int, key) for row in value]
            if any(len(row) != 3 for row in rows):
                raise TypeError(f"{key} is {value!r}, not a list of three numbers each")
            return tuple(rows)
        return _tuple(value, int if key == "depths" else float, key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not {wanted}")
    return value


def _tuple(values: object, kind: type, key: str) -> tuple:
    numbers = (int,) if kind is int else (int, float)
    if not isinstance(values, Sequence) or any(
        not isinstance(one, numbers) or isinstance(one, bool) for one in values
    ):
        raise TypeError(f"{key} is {values!r}, not a list of numbers")
    return tuple(kind(one) for one in values)


def _one_of(value: object, names: Sequence[str], what: str) -> None:
    _require(value in names, f"{what}: {value!r} is unknown here. Use one of {', '.join(names)}.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _keys(known: Mapping[str, object]) -> str:
    return ", ".join(known)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)
