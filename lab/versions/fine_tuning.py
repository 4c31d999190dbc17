"""One fine-tuning of a trained model under each megatron-core: losses, norms and exported bytes."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from lab.reliability.processes import environment, torchrun
from lab.reliability.task import write_task
from lab.versions.records import Records
from lab.versions.training import Run, train
from megatron_sorted.errors import DataError
from megatron_sorted.installation import ROOT
from megatron_sorted.monitoring.json_lines import read_json_lines
from megatron_sorted.reading.json_text import read_json_object

STEPS, SEQ_LENGTH, DOCUMENTS = 20, 128, 1000
LAYOUT = "tp 2, dp 2, distributed optimizer"
FLAGS = (
    *("--train-iters", str(STEPS), "--seq-length", str(SEQ_LENGTH), "--split", "100,0"),
    *("--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--device", "cpu"),
    *("--micro-batch-size", "4", "--global-batch-size", "16", "--seed", "1", "--lr", "1e-3"),
    *("--lr-decay-style", "constant", "--eval-interval", "none", "--log-interval", "1"),
    *("--metrics-file", "metrics.jsonl", "--save", "save", "--save-hf", "exported"),
)
OWN_STEPS = 100
"""Training of the model that is made here where none is given."""


def _call(*arguments: object, folder: Path) -> None:
    ended = subprocess.run(
        list(map(str, arguments)),
        cwd=folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}:\n{ended.stdout[-3000:]}")


def make_model(folder: Path) -> tuple[Path, Path]:
    """Return a model that is trained here on sums for a minute, and its data in JSON lines."""
    model, data = folder / "model", folder / "task.jsonl"
    if not (model / "tokenizer.model").is_file():
        write_task(folder)
        _call(
            *(*torchrun(2), ROOT / "pretrain_sorted.py", "--config", "run.yaml"),
            *("--train-iters", OWN_STEPS, "--save", "trained", "--save-hf", model),
            *("--exit-layer-nums", "--exit-sampling", "all"),
            folder=folder,
        )
        tokenizer = (folder / "data" / "task_tokenizer.model").read_bytes()
        (model / "tokenizer.model").write_bytes(tokenizer)
    return model, data


def write_documents(text: Path, separator: str, data: Path) -> None:
    """Write the first documents of a text as JSON lines.

    Raises:
        DataError: There is no such file.
    """
    if not text.is_file():
        raise DataError(f"--text: {text}: no such file. Give a text file.")
    documents = [part.strip() for part in text.read_text(encoding="utf-8").split(separator)]
    lines = [json.dumps({"text": part}) + "\n" for part in documents if part][:DOCUMENTS]
    data.write_text("".join(lines), encoding="utf-8")


def prepare_task(folder: Path, model: Path | None, text: Path | None, separator: str) -> dict:
    """Return model, token files and exits of the fine-tuning; without a model one is trained.

    Raises:
        DataError: The model has no tokenizer or too few layers, or there is no text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model is None:
        model, data = make_model(folder)
    else:
        model, data = model.absolute(), folder / "text.jsonl"
        if text is None:
            raise DataError("--model: needs --text, the text to fine-tune on. Give both.")
        write_documents(text, separator, data)
    if not (model / "tokenizer.model").is_file():
        raise DataError(
            f"--model: {model} has no tokenizer.model. Give a directory with a sentencepiece file."
        )
    num_layers = read_json_object(model / "config.json")["num_hidden_layers"]
    if num_layers < 3:
        raise DataError(f"--model: {model} has {num_layers} layers. Give one with at least 3.")
    _call(
        *(sys.executable, "-m", "megatron_sorted", "prepare", "--input", data, "--overwrite"),
        *("--output-prefix", folder / "text", "--seq-length", SEQ_LENGTH),
        *("--tokenizer-model", model / "tokenizer.model"),
        folder=folder,
    )
    return {
        "model": str(model),
        "data": str(folder / "text_text_document"),
        "exits": [str(depth) for depth in range(2, num_layers)],
    }


def _fine_tune(python: Path, folder: Path, task: dict) -> dict:
    """Return losses and gradient norms of every step, and the hash of the exported weights."""
    flags = (
        *("--load", task["model"], "--data-path", task["data"]),
        *("--tokenizer-model", f"{task['model']}/tokenizer.model"),
        *("--exit-layer-nums", *task["exits"]),
    )
    train(python, [Run("fine-tuning", 4, (*FLAGS, *flags), str(folder))])
    steps = [
        {
            "losses": {depth: exit_["loss"] for depth, exit_ in line["exits"].items()},
            "gradient norm": line["grad_norm"],
        }
        for line in read_json_lines(folder / "metrics.jsonl")
        if line["kind"] == "train"
    ]
    exported = (folder / "exported" / "model.safetensors").read_bytes()
    return {"steps": steps, "sha256": hashlib.sha256(exported).hexdigest()}


def run_fine_tuning(
    pythons: dict[str, Path], folder: Path, records: Records, model: Path | None, text: Path | None,
    separator: str,
) -> dict:  # fmt: skip
    """Return the name of the model and the results by version; what has a record is kept.

    Raises:
        DataError: Model or text will not do.
    """
    folder = folder.absolute() / "fine_tuning"
    name = model.name if model else "own"
    kept = {v: records.get(f"fine-tuning/{name}/{v}") for v in pythons}
    if None in kept.values():
        task = prepare_task(folder, model, text, separator)
    for version, results in kept.items():
        if results is None:
            print(f"fine-tuning of {name}: {version}", flush=True)
            place = folder / version
            shutil.rmtree(place, ignore_errors=True)
            kept[version] = _fine_tune(pythons[version], place, task)
            records.put(f"fine-tuning/{name}/{version}", kept[version])
    return {"model": model and name, "versions": kept}
