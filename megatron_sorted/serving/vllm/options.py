"""What the plug-in is asked to do, and the arguments with which vLLM is started. Needs no vLLM."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.confidence import MAX_DRAFT_TOKENS, MEASURES
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving.vllm.exits import EXITS_FILE, Exits, read_exits_of

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
        for row in self.draft_schedule:
            _require(
                len(row) == 3,
                f"draft_schedule: {row} is not a row of three numbers. Give the first and last "
                "batch size and the number of tokens to draft.",
            )
        for drafted, low in (
            (self.num_draft_tokens, 1),
            *((row[2], 0) for row in self.draft_schedule),
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
        """Return the options as values that JSON can hold; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> "EngineOptions":
        """Return the options that JSON values describe.

        Raises:
            SettingsError: A key is unknown, or a value has another type or is out of range.
        """
        _require(
            isinstance(values, Mapping),
            f"--additional-config: {KEY} is {values!r}, not an object with some of "
            f"{', '.join(_FORMS)}. Give the one that megatron-sorted serve --engine vllm prints.",
        )
        for key in values:
            _require(
                key in _FORMS,
                f"--additional-config: {KEY} has {key!r}, which is no option. Use some of "
                f"{', '.join(_FORMS)}.",
            )
        return cls(**{key: _typed(key, _FORMS[key], value) for key, value in values.items()})


# a list for values of one form
_FORMS: dict[str, Any] = {
    "strategy": str,
    "depths": [int],
    "thresholds": [float],
    "measure": str,
    "num_draft_tokens": int,
    "draft_schedule": [[int]],
}
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
    # with such a file beside it the worker sets right what vLLM takes the model's head to be
    if options.strategy == "full" and not (Path(model) / EXITS_FILE).is_file():
        return arguments
    exits = read_exits_of(Path(model))
    check_options(options, exits)
    arguments |= {"worker_cls": WORKER, "additional_config": {KEY: options.to_json()}}
    if options.strategy == "fixed":
        arguments["hf_overrides"] = exits.overrides_at(options.depths[0])
    if not options.drafts:
        return arguments
    arguments["speculative_config"] = {
        "method": "draft_model",
        "model": str(model),
        "num_speculative_tokens": options.num_draft_tokens,
    }
    if options.draft_schedule:
        arguments["speculative_config"]["num_speculative_tokens_per_batch_size"] = [
            list(row) for row in options.draft_schedule
        ]
    if options.strategy == "sorted_speculative":
        # drafts of several lengths reach the scheduler as lists of the host
        arguments["async_scheduling"] = False
    return arguments


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Return `engine_arguments` as those of ``vllm serve``, which follow these two words.

    >>> command_line({"model": "m", "worker_cls": "a.B", "async_scheduling": False})
    ['m', '--worker-cls', 'a.B', '--no-async-scheduling']
    """
    line = [arguments["model"]]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "model":
            line += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return line


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
            not (options.strategy == "fixed" and exits.block and exits.adapter_rank)
            or depth == exits.depths[-1],
            f"depths: exit {depth} of {exits.directory} has an adapter before its block, which no "
            "layer of vLLM has. Serve it with megatron-sorted serve --strategy fixed.",
        )
        _require(
            not (options.drafts and exits.block),
            f"depths: exit {depth} of {exits.directory} has a block of its own, which would need "
            "keys and values of its own for every token. Extract it (megatron-sorted extract "
            f"--depth {depth}) and let vLLM draft with that directory: --speculative-config "
            '\'{"method": "draft_model", "model": DIRECTORY, "num_speculative_tokens": 4}\'.',
        )


def _typed(key: str, form: Any, value: object) -> Any:
    """Return a value of JSON in its form, lists as tuples."""
    if isinstance(form, list):
        _require(isinstance(value, list | tuple), f"{key}: {value!r} is not a list. Give one.")
        return tuple(_typed(key, form[0], one) for one in value)
    kinds = (int, float) if form is float else form
    _require(
        isinstance(value, kinds) and not isinstance(value, bool),
        f"{key}: {value!r} is not of the kind {form.__name__}. Correct --additional-config.",
    )
    return form(value)


def _one_of(value: object, names: Sequence[str], what: str) -> None:
    _require(value in names, f"{what}: {value!r} is unknown here. Use one of {', '.join(names)}.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)
