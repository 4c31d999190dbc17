"""One comparison of methods as steps.

Rates are chosen on samples kept for that, then each method trains for the same number of steps, and
every depth is measured.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.results.steps import OURS, PYTHON, Step
from megatron_sorted.installation import ROOT

METHODS = {
    "ordinary": "ordinary fine-tuning",
    "nested": "nested fine-tuning",
    "nested-linear": "nested, loss weights linear in depth",
}
HEADS = "ordinary+ICT"
"""Name that ``megatron-sorted evaluate`` gives the ordinary model with trained heads."""


@dataclass(frozen=True)
class Recipe:
    """What all methods share, and the rates among which each may choose.

    Attributes:
        folder: The folder that everything is written to; its ``data`` holds samples and tokens.
        model: Hugging Face directory that every method starts from.
        exit_depths: Intermediate depths that nested training trains.
        measured: All depths that are measured.
        held_out: Prefixes of token files that the trainer evaluates too, in packed windows.
        rates: Learning rates to choose from for ``ordinary``, ``nested`` and ``heads``.
        flags: More flags of training, the same for all.
        evaluate: More flags of megatron-sorted evaluate: texts and questions.
        append_eos: Whether the end of a text or response is counted in the measures.
        data_steps: Names of the steps that make data and model.
    """

    folder: Path
    model: Path
    exit_depths: tuple[int, ...]
    measured: tuple[int, ...]
    seq_length: int
    num_steps: int
    num_sweep_steps: int
    warmup: int
    rates: dict[str, tuple[str, ...]]
    held_out: tuple[Path, ...]
    evaluate: tuple[str, ...]
    head_batch_size: int
    flags: tuple[str, ...] = ()
    append_eos: bool = False
    batch_size: int = 8
    data_steps: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that each method trains on."""
        return self.num_steps * self.batch_size * self.seq_length

    @property
    def num_sweep_tokens(self) -> int:
        """Return the number of tokens of a run that tries a rate."""
        return self.num_sweep_steps * self.batch_size * self.seq_length


def prefix(folder: Path, name: str) -> Path:
    """Return the prefix of the token files of one set."""
    return folder / "data" / f"{name}_text_document"


def prepare_step(
    folder: Path,
    name: str,
    seq_length: int,
    source: tuple[str, ...],
    needs: tuple[str, ...],
    where: Path | None = None,
) -> Step:
    """Return the step that turns NAME.jsonl in ``where`` (or ``data``) into token files.

    ``source`` holds the flags of the tokenizer.
    """
    data = folder / "data"
    command = (
        *OURS,
        "prepare",
        "--input",
        str((where or data) / f"{name}.jsonl"),
        "--output-prefix",
        str(data / name),
        *source,
        *f"--seq-length {seq_length} --workers 1 --overwrite".split(),
    )
    made = tuple(data / f"{name}_text_document{ending}" for ending in (".bin", ".idx"))
    return Step(f"prepare-{name}", f"Turn {name}.jsonl into tokens", command, made, needs=needs)


def method_flags(recipe: Recipe, method: str) -> tuple[str, ...]:
    """Return the flags in which a method differs from uniform nested training."""
    if method == "ordinary":
        return ("--exit-layer-weight", *["0"] * len(recipe.exit_depths))
    return ("--exit-layer-weight-rule", "linear") if method == "nested-linear" else ()


def sweep_folder(recipe: Recipe, method: str, rate: str) -> Path:
    """Return the folder of the run (or evaluation) that tries a rate."""
    return recipe.folder / "rates" / f"{method}-{rate}"


def sweep_steps(recipe: Recipe) -> list[Step]:
    """Return a short training for each method and rate, unless there is only one rate."""
    return [
        _train(recipe, method, rate, recipe.num_sweep_steps, sweep_folder(recipe, method, rate))
        for method in ("ordinary", "nested")
        if len(recipe.rates[method]) > 1
        for rate in recipe.rates[method]
    ]


def final_folder(recipe: Recipe, method: str, seed: int) -> Path:
    """Return the Hugging Face directory of a fine-tuned model."""
    return recipe.folder / "models" / f"{method}-{seed}"


def final_step(recipe: Recipe, method: str, rate: str, seed: int) -> Step:
    """Return the fine-tuning of full length, which exports its model."""
    return _train(
        recipe,
        method,
        rate,
        recipe.num_steps,
        recipe.folder / "runs" / f"{method}-{seed}",
        seed,
        final_folder(recipe, method, seed),
    )


def head_sweep_steps(recipe: Recipe) -> list[Step]:
    """Return a short training of heads on the first ordinary model for each rate."""
    if len(recipe.rates["heads"]) == 1:
        return []
    steps = []
    for rate in recipe.rates["heads"]:
        output = sweep_folder(recipe, "heads", rate)
        command = (
            *OURS,
            "evaluate",
            f"ordinary={final_folder(recipe, 'ordinary', 1)}",
            *_heads(recipe, rate, 1, recipe.num_sweep_tokens),
            *_measure(recipe),
            "--text",
            str(recipe.folder / "data" / "tuning.jsonl"),
            "--output",
            str(output),
        )
        steps.append(
            Step(
                f"rate-heads-{rate}",
                "Train heads on the frozen, ordinarily fine-tuned layers at one rate",
                command,
                (output / "evaluation.json",),
                needs=("train-ordinary-1",),
            )
        )
    return steps


def evaluation_folder(recipe: Recipe, seed: int) -> Path:
    """Return the folder of a seed's final measurements."""
    return recipe.folder / "evaluation" / str(seed)


def evaluate_step(recipe: Recipe, methods: tuple[str, ...], head_rate: str, seed: int) -> Step:
    """Return the step that measures every depth of all models of a seed.

    SFT+ICT is among the models, and for seed 1 the model before fine-tuning.
    """
    output = evaluation_folder(recipe, seed)
    before = (f"before={recipe.model}",) if seed == 1 else ()
    nested = tuple(
        f"{method}={final_folder(recipe, method, seed)}"
        for method in methods
        if method != "ordinary"
    )
    command = (
        *OURS,
        "evaluate",
        *before,
        *nested,
        "--baseline",
        f"ordinary={final_folder(recipe, 'ordinary', seed)}",
        *_heads(recipe, head_rate, seed, recipe.num_tokens),
        *_measure(recipe),
        *recipe.evaluate,
        "--output",
        str(output),
    )
    return Step(
        f"evaluate-{seed}",
        "Train heads for SFT+ICT, and measure every depth of all models on the held-out samples",
        command,
        (output / "evaluation.json",),
        needs=tuple(f"train-{method}-{seed}" for method in methods),
    )


def train_command(recipe: Recipe, start: Path, flags: tuple[str, ...]) -> tuple[str, ...]:
    """Return the beginning of every training command: the model, ``flags`` and the data."""
    return (
        PYTHON,
        "pretrain_sorted.py",
        "--load",
        str(start),
        *flags,
        "--seq-length",
        str(recipe.seq_length),
        "--data-path",
        str(prefix(recipe.folder, "train")),
    )


def run_flags(recipe: Recipe, num_steps: int, rate: str, seed: int, save: Path) -> tuple[str, ...]:
    """Return the flags of every training command that follow its data."""
    return (
        *f"--device cpu --micro-batch-size {recipe.batch_size}".split(),
        *f"--lr-warmup-iters {recipe.warmup}".split(),
        *recipe.flags,
        *f"--full-validation --log-interval 50 --seed {seed} --train-iters {num_steps}".split(),
        *f"--lr {rate} --save".split(),
        str(save),
    )


def _train(
    recipe: Recipe,
    method: str,
    rate: str,
    num_steps: int,
    save: Path,
    seed: int = 1,
    export: Path | None = None,
) -> Step:
    """Return a training; only one that is exported is measured on held-out samples."""
    name, valid = f"train-{method}-{seed}", recipe.held_out
    if export is None:
        name, valid = f"rate-{method}-{rate}", (prefix(recipe.folder, "tuning"),)
    command = (
        *train_command(recipe, recipe.model, ("--exit-layer-nums", *map(str, recipe.exit_depths))),
        "--valid-data-path",
        *map(str, valid),
        *run_flags(recipe, num_steps, rate, seed, save),
        *(("--save-hf", str(export)) if export else ()),
        *method_flags(recipe, method),
    )
    title = f"{METHODS[method][0].upper()}{METHODS[method][1:]}"
    purpose = f"{title}, {num_steps} steps at learning rate {rate}, seed {seed}"
    made = (save / "evaluation.json", *((export / "config.json",) if export else ()))
    return Step(
        name, purpose, command, made, (save, *((export,) if export else ())), recipe.data_steps
    )


def _heads(recipe: Recipe, rate: str, seed: int, num_tokens: int) -> tuple[str, ...]:
    return (
        "--train-heads",
        str(recipe.folder / "data" / f"train_{num_tokens}.jsonl"),
        "--train-heads-lr",
        rate,
        "--train-heads-batch-size",
        str(recipe.head_batch_size),
        "--seed",
        str(seed),
    )


def _measure(recipe: Recipe) -> tuple[str, ...]:
    return (
        "--depths",
        *map(str, recipe.measured),
        "--seq-length",
        str(recipe.seq_length),
        *["--append-eos"] * recipe.append_eos,
    )


def shown(step: Step, recipe: Recipe) -> str:
    """Return the step's command as a page shows it, on lines of readable length.

    Files outside this clone are shown by their names alone.
    """
    names = {str(recipe.model): recipe.model.name} if recipe.model.is_absolute() else {}
    names |= {
        str(path): path.name
        for path in step.reads
        if path.is_absolute() and not path.is_relative_to(ROOT)
    }
    arguments = list(step.command)
    for path, name in names.items():
        arguments = [argument.replace(path, name) for argument in arguments]
    return wrap_command(arguments)


def wrap_command(arguments: Sequence[str]) -> str:
    """Return a command as a code block of Markdown, on lines of readable length."""
    lines = [""]
    for word in map(shlex.quote, arguments):
        if lines[-1] and len(lines[-1]) + len(word) > 126:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f"{' ' if lines[-1].strip() else ''}{word}"
    return "\n".join(f"    {line}" for line in lines)
