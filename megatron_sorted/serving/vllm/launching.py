"""The command line that starts vLLM on a nested model, with vLLM's own options checked first.

vLLM itself is not imported: it takes half a minute, and a mistake is reported at once.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.errors import CheckpointError, SettingsError
from megatron_sorted.installation import IS_CHECKOUT, ROOT
from megatron_sorted.reading.shown import shown
from megatron_sorted.serving.vllm.installed import InstalledVllm
from megatron_sorted.serving.vllm.options import (
    EngineOptions,
    command_line,
    engine_arguments,
    environment,
)
from megatron_sorted.settings.yaml_file import read_yaml

CONFIG_FILE = "config.json"
PIPELINE = "--pipeline-parallel-size"
SHORT = {"-pp": PIPELINE, "-tp": "--tensor-parallel-size", "-sc": "--speculative-config"}
"""Short names of vLLM's options that matter here."""


@dataclass(frozen=True)
class Launch:
    """A command and the variables that it needs beside those of the environment.

    Attributes:
        line: The command.
        variables: The variables, {name: value}.
        hidden: Variables whose value is not printed, {name: the variable that holds it}.
    """

    line: list[str]
    variables: dict[str, str]
    hidden: dict[str, str]

    def __str__(self) -> str:
        """Return the line that a shell runs."""
        shown_values = {name: shlex.quote(value) for name, value in self.variables.items()}
        shown_values |= {name: f'"${source}"' for name, source in self.hidden.items()}
        variables = [f"{name}={value}" for name, value in shown_values.items()]
        return " ".join([*variables, shlex.join(self.line)])

    def environment(self, current: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the command."""
        secrets = {name: current[source] for name, source in self.hidden.items()}
        return {**current, **self.variables, **secrets}


def launch(
    installed: InstalledVllm,
    model: Path,
    options: EngineOptions,
    ours: Sequence[str],
    own: Sequence[str],
    current: Mapping[str, str],
) -> Launch:
    """Return the command that serves a model.

    Args:
        installed: The installed vLLM.
        model: The exported directory.
        options: How it is decoded.
        ours: vLLM's options that this program's options ask for; those of ``own`` win.
        own: vLLM's own options, as the user gave them.
        current: The environment.

    Raises:
        SortedError: The model does not support the options, or vLLM's own options contradict them.
    """
    if not (model / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{shown(model)}: no directory with {CONFIG_FILE}. Give an exported model: "
            "megatron-sorted convert export CHECKPOINT DIRECTORY."
        )
    arguments = engine_arguments(model, options)
    check_own(own, arguments)
    model_word, *line = command_line(arguments)
    variables = environment(options)
    if IS_CHECKOUT:  # vLLM's processes import the plug-in
        paths = [path for path in current.get("PYTHONPATH", "").split(os.pathsep) if path]
        if str(ROOT) not in paths:
            variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    variables |= _plug_ins(options, current)
    given = set(_flags(own))
    start = [*installed.start, model_word, *_without(ours, given), *line, *own]
    return Launch(start, variables, {})


def _plug_ins(options: EngineOptions, current: Mapping[str, str]) -> dict[str, str]:
    """Return VLLM_PLUGINS with this plug-in, where the user names those to load."""
    named = current.get("VLLM_PLUGINS")
    if named is None or options.strategy != "fixed" or "megatron_sorted" in named.split(","):
        return {}
    return {"VLLM_PLUGINS": ",".join([*filter(None, named.split(",")), "megatron_sorted"])}


def check_own(own: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Check vLLM's own options against those that a strategy needs.

    Args:
        own: The options as the user gave them, also those of a file named by ``--config``.
        arguments: What `engine_arguments` returns.

    Raises:
        SettingsError: One of them is set by this program, or cannot work with a strategy.
    """
    given = {**_config_file(own), **_flags(own)}
    if "--model" in given:
        raise SettingsError(
            "--model after --: the model is the argument MODEL before it. Leave it out."
        )
    if "speculative_config" not in arguments and "worker_cls" not in arguments:
        return
    stages = given.get(PIPELINE)
    if stages not in (None, "1"):
        raise SettingsError(
            f"{PIPELINE} {shown(stages, 40)}: exits draft with the first layers, which another "
            "stage of the pipeline would hold. Leave it out, and divide the model by "
            "--tensor-parallel-size."
        )
    if "--enable-lora" in given and "speculative_config" in arguments:
        raise SettingsError(
            "--enable-lora after --: drafted tokens would take other texts' adapters. Leave it "
            "out, or merge the adapter into the model."
        )
    for name in (*arguments, "speculative_config"):
        flag = "--" + name.replace("_", "-")
        if flag in given and name != "model":
            remedy = (
                "Give --strategy, --exit-layer and --num-draft-tokens before --"
                if name == "speculative_config"
                else "Leave it out, or serve with --strategy full"
            )
            raise SettingsError(
                f"{flag} after --: this program sets it for the strategy. {remedy}."
            )


def _flags(line: Sequence[str]) -> dict[str, str]:
    """Return the options on a line by vLLM's full names, with their values.

    vLLM takes ``--a-b c``, ``--a_b c``, ``--a-b=c``, parts of an object (``--a.key c``), and the
    beginning of a name that no other option shares.

    >>> _flags(["-pp", "2", "--tensor_parallel_size=4", "--hf-overrides.rope_theta", "1"])
    {'--pipeline-parallel-size': '2', '--tensor-parallel-size': '4', '--hf-overrides': '1'}
    """
    flags = {}
    for place, word in enumerate(line):
        if not word.startswith("-") or len(word) < 2:
            continue
        name, is_joined, value = word.partition("=")
        name = SHORT.get(name, name.partition(".")[0].replace("_", "-"))
        if PIPELINE.startswith(name) and len(name) > len("--p"):
            name = PIPELINE
        following = line[place + 1] if place + 1 < len(line) else ""
        flags[name] = value if is_joined else following
    return flags


def _config_file(line: Sequence[str]) -> dict[str, str]:
    """Return the options of the YAML file that ``--config`` names; none without one."""
    name = _flags(line).get("--config")
    if name is None:
        return {}
    return {f"--{entry.key.replace('_', '-')}": str(entry.value) for entry in read_yaml(name)}


def _without(line: Sequence[str], given: set[str]) -> list[str]:
    """Return the options on a line, each with at most one value, that are not ``given``.

    >>> _without(["--host", "127.0.0.1", "--port", "8000", "--no-x"], {"--host"})
    ['--port', '8000', '--no-x']
    """
    kept, keeps = [], True
    for word in line:
        if word.startswith("--"):
            keeps = word not in given
        if keeps:
            kept.append(word)
    return kept
