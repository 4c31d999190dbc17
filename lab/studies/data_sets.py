"""The data sets of the study: those of lab/first_results.py, and instructions in many languages."""

from dataclasses import replace
from pathlib import Path

from lab.results.experiments import cldr, make_quick, stories
from lab.results.recipe import Recipe, prefix
from lab.results.steps import OURS, PYTHON, Step
from lab.studies.plan import StudyPlan
from megatron_sorted.errors import DataError

RATES = {
    "ordinary": ("1e-3", "3e-3", "1e-2"),
    "nested": ("1e-3", "3e-3", "1e-2"),
    "heads": ("1e-2",),
}


def plan_stories(
    folder: Path, model: Path, text: Path, quick: bool, num_steps: int = 400, seq_length: int = 128
) -> StudyPlan:
    """Return the study of a given model on a given text of documents."""
    recipe, steps = stories(
        folder, model, text, "<|endoftext|>", kept=(200, 100), quick=quick, seq_length=seq_length
    )
    if not quick:
        recipe = replace(recipe, rates=RATES, num_steps=num_steps, num_sweep_steps=100)
    return StudyPlan(recipe, steps)


def plan_cldr(folder: Path, quick: bool) -> StudyPlan:
    """Return the study of the demo's questions; it makes data and ordinary model first."""
    recipe, steps = cldr(folder, quick)
    return StudyPlan(recipe, steps, held_out="phrasing")


def plan_instructions(
    folder: Path, train: Path, valid: Path, quick: bool, original_steps: int = 4000
) -> StudyPlan:
    """Return the study of instruction samples in many languages.

    Tokenizer and ordinary model are trained on them first, the model for ``original_steps``.

    Raises:
        DataError: A file is missing.
    """
    for path in (train, valid):
        if not path.is_file():
            raise DataError(
                f"--train, --valid: {path}: no such file."
                " Give JSON lines with instruction, input and output."
            )
    data, original = folder / "data", folder / "original"
    recipe = Recipe(
        folder,
        original,
        (2, 4, 6),
        (2, 4, 6, 8),
        seq_length=128,
        num_steps=400,
        num_sweep_steps=100,
        warmup=10,
        held_out=(prefix(folder, "held_out"),),
        head_batch_size=8,
        rates=RATES,
        evaluate=(),
        flags=("--adam-beta2", "0.95"),
    )
    recipe = make_quick(recipe) if quick else recipe
    limit, vocabulary, steps = (
        ("300", "600", "3") if quick else ("30000", "1500", str(original_steps))
    )
    prepare = "--seq-length 128 --workers 1 --overwrite"
    learn = (
        *(*OURS, "prepare", "--input", str(train), "--output-prefix", str(data / "train")),
        *f"--train-tokenizer {vocabulary} --limit {limit} --valid-fraction 0.02".split(),
        *prepare.split(),
    )
    tokenizer = data / "train_tokenizer.model"
    made = tuple(data / f"train_{part}text_document.bin" for part in ("", "valid_"))
    tokens = Step(
        "prepare-train",
        "Train a tokenizer on the samples, and turn them into tokens",
        learn,
        (tokenizer, *made),
        reads=(train,),
    )
    measure = (
        *(*OURS, "prepare", "--input", str(valid), "--output-prefix", str(data / "held_out")),
        *("--tokenizer-model", str(tokenizer), "--limit", "100" if quick else "700"),
        *prepare.split(),
    )
    held_out = Step(
        "prepare-held_out",
        "Turn the held-out samples into tokens",
        measure,
        (data / "held_out_text_document.bin",),
        needs=("prepare-train",),
        reads=(valid,),
    )
    save = folder / "runs" / "original"
    train_one = (
        *(PYTHON, "pretrain_sorted.py", "--num-layers", "8", "--hidden-size", "64"),
        *("--ffn-hidden-size", "192", "--num-attention-heads", "4", "--init-method-std", "0.1"),
        *("--seq-length", "128", "--tokenizer-model", str(tokenizer)),
        *("--data-path", str(prefix(folder, "train"))),
        *("--valid-data-path", str(prefix(folder, "held_out")), "--full-validation"),
        *("--device", "cpu", "--micro-batch-size", "8", "--train-iters", steps),
        *("--lr", "4e-3", "--min-lr", "4e-4", "--lr-warmup-iters", "2" if quick else "50"),
        *("--adam-beta2", "0.95", "--log-interval", "100"),
        *("--save", str(save), "--save-hf", str(original)),
    )
    base = Step(
        "train-original",
        "Train an ordinary model from scratch; all methods start from it",
        train_one,
        (save / "evaluation.json", original / "config.json"),
        (save, original),
        ("prepare-train", "prepare-held_out"),
    )
    return StudyPlan(
        replace(recipe, data_steps=("train-original",)),
        [tokens, held_out, base],
        tuning="train_valid",
    )
