"""One comparison as steps: rates are chosen on samples kept for that, then each method trains equally long and every depth is measured."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from lab.results.steps import OURS, PYTHON, Step
from megatron_sorted.command_line import ROOT

METHODS = {
    "ordinary": "ordinary fine-tuning",
    "nested": "nested fine-tuning",
    "nested-linear": "nested, loss weights linear in depth",
}
HEADS = "ordinary+ICT"
"""What megatron-sorted evaluate calls the ordinarily fine-tuned model with trained heads."""


@dataclass(frozen=True)
class Recipe:
    """What all methods share, and what each may choose.

    Attributes:
        folder: Everything is written here; ``data`` in it holds the files of ``split_text.py`` and their tokens.
        model: Hugging Face directory every method starts from.
        exit_depths: Intermediate depths that nested training trains.
        measured: All depths that are measured.
        held_out: Prefixes of token files that the trainer evaluates too; it sees them in packed windows.
        rates: Learning rates to choose from, for ``ordinary``, ``nested`` and ``heads``.
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
        """Return on how many tokens each method trains."""
        return self.num_steps * self.batch_size * self.seq_length

    @property
    def num_sweep_tokens(self) -> int:
        """Return the same for a run that tries a rate."""
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
    """Return the step that turns NAME.jsonl in ``where`` (or ``data``) into token files; ``source``: where the tokenizer comes from."""
    data = folder / "data"
    command = (
        *OURS,
        "prepare",
        "--input",
        str((where or data) / f"{name}.jsonl"),
        "--output-prefix",
        str(data / name),
        *source,
        "--seq-length",
        str(seq_length),
        "--workers",
        "1",
        "--overwrite",
    )
    made = tuple(data / f"{name}_text_document{ending}" for ending in (".bin", ".idx"))
    return Step(f"prepare-{name}", f"Turn {name}.jsonl into tokens", command, made, needs=needs)


def method_flags(recipe: Recipe, method: str) -> tuple[str, ...]:
    """Return the flags in which a method differs from uniform nested training."""
    if method == "ordinary":
        return ("--exit-layer-weight", *["0"] * len(recipe.exit_depths))
    return ("--exit-layer-weight-rule", "linear") if method == "nested-linear" else ()


def sweep_folder(recipe: Recipe, method: str, rate: str) -> Path:
    """Return where the run (or evaluation) that tries a rate writes."""
    return recipe.folder / "rates" / f"{method}-{rate}"


def sweep_steps(recipe: Recipe) -> list[Step]:
    """Return a short training for each method and rate, evaluated on the samples kept for choosing; none where there is no choice."""
    return [
        _train(recipe, method, rate, recipe.num_sweep_steps, sweep_folder(recipe, method, rate))
        for method in ("ordinary", "nested")
        if len(recipe.rates[method]) > 1
        for rate in recipe.rates[method]
    ]


def final_folder(recipe: Recipe, method: str, seed: int) -> Path:
    """Return where the Hugging Face directory of a fine-tuned model lies."""
    return recipe.folder / "models" / f"{method}-{seed}"


def final_step(recipe: Recipe, method: str, rate: str, seed: int) -> Step:
    """Return the fine-tuning of full length, exported at its end."""
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
    """Return a short training of heads on the first ordinarily fine-tuned model for each rate, measured as rates are chosen."""
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
    """Return where the final measures of a seed lie."""
    return recipe.folder / "evaluation" / str(seed)


def evaluate_step(recipe: Recipe, methods: tuple[str, ...], head_rate: str, seed: int) -> Step:
    """Return the measuring of every depth of all models of a seed: with SFT+ICT, and for seed 1 with the model before fine-tuning."""
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


def _train(
    recipe: Recipe,
    method: str,
    rate: str,
    num_steps: int,
    save: Path,
    seed: int = 1,
    export: Path | None = None,
) -> Step:
    """Return a training; one that is exported is measured on what is held out, another one on what rates are chosen by."""
    name, valid = f"train-{method}-{seed}", recipe.held_out
    if export is None:
        name, valid = f"rate-{method}-{rate}", (prefix(recipe.folder, "tuning"),)
    command = (
        PYTHON,
        "pretrain_sorted.py",
        "--load",
        str(recipe.model),
        "--exit-layer-nums",
        *map(str, recipe.exit_depths),
        "--seq-length",
        str(recipe.seq_length),
        "--data-path",
        str(prefix(recipe.folder, "train")),
        "--valid-data-path",
        *map(str, valid),
        "--device",
        "cpu",
        "--micro-batch-size",
        str(recipe.batch_size),
        "--lr-warmup-iters",
        str(recipe.warmup),
        *recipe.flags,
        "--full-validation",
        "--log-interval",
        "50",
        "--seed",
        str(seed),
        "--train-iters",
        str(num_steps),
        "--lr",
        rate,
        "--save",
        str(save),
        *(("--save-hf", str(export)) if export else ()),
        *method_flags(recipe, method),
    )
    purpose = f"{METHODS[method][0].upper()}{METHODS[method][1:]}, {num_steps} steps at learning rate {rate}, seed {seed}"
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
    """Return the step's command as a page shows it: files from outside by name alone, on lines of readable length."""
    names = {str(recipe.model): recipe.model.name} if recipe.model.is_absolute() else {}
    names |= {
        str(path): path.name
        for path in step.reads
        if path.is_absolute() and not path.is_relative_to(ROOT)
    }
    words = []
    for word in step.command:
        for path, name in names.items():
            word = word.replace(path, name)
        words.append(shlex.quote(word) if word != PYTHON else word)
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 126:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f"{' ' if lines[-1].strip() else ''}{word}"
    return "\n".join(f"    {line}" for line in lines)
