"""What ``serve --engine vllm`` and ``tune --engine vllm`` make of options and decoding.json."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sorted.decoding.strategies import STRATEGIES
from megatron_sorted.decoding.tuning.tuned_options import (
    TUNED_FILE,
    read_draft_schedule,
    read_tuned_options,
    scheduled_exit,
)
from megatron_sorted.errors import SettingsError
from megatron_sorted.reading.shown import shown

if TYPE_CHECKING:  # --help does not need them
    from megatron_sorted.serving.vllm.launching import Launch
    from megatron_sorted.serving.vllm.options import EngineOptions

ENGINES = ("own", "vllm")
KEY_VARIABLE, VLLM_KEY_VARIABLE = "MEGATRON_SORTED_API_KEY", "VLLM_API_KEY"
GIGABYTE = 10**9
UNUSABLE = {
    "draft": 'Give the draft model to vLLM after --: --speculative-config \'{"method": '
    '"draft_model", "model": DIRECTORY, "num_speculative_tokens": 4}\' with --strategy full',
    "depths": "vLLM takes the exits that config.json names (exit_layer_indices)",
    "prompt_template": "vLLM takes the chat template in tokenizer_config.json, or its own option "
    "--chat-template after --",
    "device": "vLLM runs on the device that its build is for",
    "native": "vLLM has kernels of its own",
    "num_levels": "vLLM has no trees of drafts",
    "num_branches": "vLLM has no trees of drafts",
    "num_nodes": "vLLM has no trees of drafts",
    "num_candidates": "vLLM has no trees of drafts",
    "max_wait": "vLLM's queue has no limit of time",
    "prefill_tokens": "vLLM's own option --max-num-batched-tokens after -- has a similar effect",
    "share_prefixes": "vLLM always shares them; its requests may carry a cache_salt",
    "api_key_file": f"vLLM takes one key: set {KEY_VARIABLE}, or give --api-key after --",
    "request_log": "vLLM's own option --disable-uvicorn-access-log after -- does that",
    "adapt": "vLLM keeps to one strategy",
    "adapt_file": "vLLM keeps to one strategy",
}
"""{option that has no meaning for vLLM: what to do instead}."""


def add_engine_option(group: argparse._ArgumentGroup, purpose: str) -> None:
    """Add the option that chooses the engine."""
    group.add_argument(
        "--engine", choices=ENGINES, default="own", metavar="NAME", help=f"own or vllm: {purpose}"
    )


def split_line(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return a command line's words before and after the first ``--``.

    >>> split_line(["model", "--engine", "vllm", "--", "-tp", "8"])
    (['model', '--engine', 'vllm'], ['-tp', '8'])
    """
    line = list(sys.argv[1:] if arguments is None else arguments)
    end = line.index("--") if "--" in line else len(line)
    return line[:end], line[end + 1 :]


def given_options(parser: argparse.ArgumentParser, line: Sequence[str]) -> dict[str, Any]:
    """Return the options that a command line gives, without those that keep their defaults."""
    unset = object()
    empty = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    values = vars(parser.parse_args(line, empty))
    return {name: value for name, value in values.items() if value is not unset}


def check_engine(engine: str, own: Sequence[str]) -> None:
    """Check that options after ``--`` have an engine that takes them.

    Raises:
        SettingsError: They have none.
    """
    if own and engine == "own":
        raise SettingsError(
            f"{shown(own[0], 60)} after --: only another engine takes options of its own. Add "
            "--engine vllm, or leave out --."
        )


def check_usable(given: Mapping[str, Any]) -> None:
    """Check that every given option has a meaning for vLLM.

    Raises:
        SettingsError: One has none; says what to do instead.
    """
    for name, remedy in UNUSABLE.items():
        if name in given:
            option = "--no-request-log" if name == "request_log" else _flag(name)
            raise SettingsError(
                f"{option}: it has no effect with --engine vllm. Leave it out: {remedy}."
            )
    if given.get("dtype") == "int8":
        raise SettingsError(
            "--dtype int8: these weights are our own decoder's. Leave it out, or let vLLM quantize "
            "by its own option --quantization after --."
        )


def vllm_options(model: Path, given: Mapping[str, Any]) -> list[str]:
    """Return vLLM's options for those of our server that it has too.

    Defaults that matter to clients are our server's: the model's name, and that only this machine
    can connect.
    """
    line = ["--host", given.get("host", "127.0.0.1"), "--port", str(given.get("port", 8000))]
    line += ["--served-model-name", given.get("served_name") or model.resolve().name]
    for name, flag in (
        ("max_num_seqs", "--max-num-seqs"),
        ("dtype", "--dtype"),
        ("tokenizer", "--tokenizer"),
    ):
        if name in given:
            line += [flag, str(given[name])]
    if "cache_memory" in given:
        line += ["--kv-cache-memory-bytes", str(round(given["cache_memory"] * GIGABYTE))]
    if "shutdown_timeout" in given:
        line += ["--shutdown-timeout", str(round(given["shutdown_timeout"]))]
    if given.get("generation_config") == "none":
        line += ["--generation-config", "vllm"]
    if "prefix_caching" in given:
        line.append(f"--{'' if given['prefix_caching'] == 'on' else 'no-'}enable-prefix-caching")
    return line


def engine_options(model: Path, given: Mapping[str, Any]) -> "EngineOptions":
    """Return how vLLM decodes: by the command line, else decoding.json, else the full model.

    Where ``tune --engine vllm`` has measured an exit, that one drafts, by its schedule unless a
    length is given.

    Raises:
        SettingsError: The strategy is not one that vLLM can run, or has no such option.
        DataError: decoding.json is damaged.
    """
    from megatron_sorted.serving.vllm.options import EngineOptions

    path = model / TUNED_FILE
    tuned = read_tuned_options(path)
    scheduled = scheduled_exit(path, "vllm")
    name = given.get("strategy") or (
        _tuned_strategy(tuned, path) if scheduled is None else "self_speculative"
    )
    if name in ("early_exit", "tree"):
        raise SettingsError(
            f"--strategy {name}: vLLM runs every row of a batch through the same layers. Use full, "
            "fixed, self_speculative or sorted_speculative, or serve without --engine."
        )
    options = dict(tuned.get("strategies", {}).get(name, {}))
    if name == "self_speculative" and scheduled is not None:
        options["depth"] = scheduled  # measured in vLLM itself
    requested = {
        option: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for option in ("depth", "strategy_depths", "thresholds", "measure", "num_draft_tokens")
        if (value := given.get(option)) is not None
    }
    if "strategy_depths" in requested:
        requested["depths"] = requested.pop("strategy_depths")
        if "thresholds" not in requested and name == "sorted_speculative":
            requested["thresholds"] = [0.5] * len(requested["depths"])
    known = STRATEGIES[name].__dataclass_fields__
    for option in requested:
        if option not in known:
            raise SettingsError(
                f"--strategy {name} does not take {option.replace('_', ' ')}; it takes "
                f"{', '.join(sorted(known)) or 'nothing'}. Leave it out, or use another strategy."
            )
    options |= requested
    if name != "full" and "depth" not in options and "depths" not in options:
        option = "--exit-layers and --thresholds" if "depths" in known else "--exit-layer"
        raise SettingsError(
            f"--strategy {name}: {shown(path)} names no exit for it. Give {option}, or tune the "
            f"model: megatron-sorted tune {shown(model)}."
        )
    if "depth" in options:
        options["depths"] = [options.pop("depth")]
    schedule = (
        read_draft_schedule(path, "vllm", options["depths"][0]).get("schedule", ())
        if name == "self_speculative" and "num_draft_tokens" not in requested
        else ()
    )
    options.pop("seed", None)
    if longest := max((row[2] for row in schedule), default=0):
        options |= {"num_draft_tokens": longest, "draft_schedule": schedule}
    elif schedule:
        print(
            f"note: {shown(path)} says that drafts never pay in vLLM, so the full model decodes "
            "alone. Give --num-draft-tokens to draft all the same",
            file=sys.stderr,
        )
        return EngineOptions()
    return EngineOptions.from_json({"strategy": name, **options})


def _tuned_strategy(tuned: Mapping[str, Any], path: Path) -> str:
    """Return the tuned strategy, or the speculative one nearest to it that vLLM has."""
    best = tuned.get("best", "full")
    if best != "tree":
        return best
    print(
        f"note: {shown(path)} prefers tree, which vLLM has not: it runs self_speculative",
        file=sys.stderr,
    )
    return "self_speculative"


def open_launch(
    model: Path,
    given: Mapping[str, Any],
    own: Sequence[str],
    current: Mapping[str, str] = os.environ,
) -> "Launch":
    """Return the command that serves a model by vLLM, and print notes about it.

    Args:
        model: The exported directory.
        given: The given options of our server.
        own: vLLM's own options.
        current: The environment.

    Raises:
        SortedError: Something in them cannot work.
    """
    from megatron_sorted.serving.vllm.installed import installed_vllm
    from megatron_sorted.serving.vllm.launching import launch

    check_usable(given)
    options = engine_options(model, given)
    installed = installed_vllm()
    if options.strategy != "full" and (note := installed.check_version()):
        print(f"note: {note}", file=sys.stderr)
    installed.check_device()
    started = launch(installed, model, options, vllm_options(model, given), own, current)
    started.variables.update(thread_variables(given.get("threads"), installed.is_for_cpus))
    if KEY_VARIABLE in current and VLLM_KEY_VARIABLE not in current and "--api-key" not in own:
        if "," in current[KEY_VARIABLE]:
            raise SettingsError(
                f"{KEY_VARIABLE}: it holds several keys, and vLLM takes one. Give one, or vLLM's "
                "own option --api-key after --."
            )
        started.hidden[VLLM_KEY_VARIABLE] = KEY_VARIABLE
    _note_memory(installed.is_for_cpus, started)
    return started


def thread_variables(threads: int | None, is_for_cpus: bool) -> dict[str, str]:
    """Return the variables that make vLLM run on a number of CPU threads; none without a number.

    Raises:
        SettingsError: The number is below 1, or vLLM's build is not for CPUs.
    """
    if threads is None:
        return {}
    if threads < 1 or not is_for_cpus:
        rule = "not 1 or more. Change it" if threads < 1 else "for builds for CPUs. Leave it out"
        raise SettingsError(f"--threads: {threads} is {rule}.")
    # without nobind vLLM ties threads to cores that other programs may use
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _note_memory(is_for_cpus: bool, started: "Launch") -> None:
    """Print how much memory vLLM takes on a CPU where nothing limits it."""
    limits = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
    has_limit = any(word.startswith(limits) for word in started.line)
    if is_for_cpus and not has_limit and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        print(
            "note: vLLM takes 92 % of the memory for its cache, and does not start where that much "
            "is not free. --cache-memory GB limits it",
            file=sys.stderr,
        )


def _flag(name: str) -> str:
    return {"depth": "--exit-layer", "strategy_depths": "--exit-layers"}.get(
        name, "--" + name.replace("_", "-")
    )
