"""The data, the start and the recipe of the two comparisons."""

import json
from dataclasses import replace
from pathlib import Path

from lab.demo import CONFIG, QUESTIONS
from lab.results.recipe import Recipe, prefix, prepare_step
from lab.results.steps import OURS, PYTHON, Step
from megatron_sorted.errors import DataError
from megatron_sorted.exported.checkpoint_as_directory import as_hugging_face_directory
from megatron_sorted.installation import ROOT


def make_quick(recipe: Recipe) -> Recipe:
    """Return the recipe with few steps and one rate a method, to see that everything runs."""
    rates = {method: rates[:1] for method, rates in recipe.rates.items()}
    return replace(
        recipe,
        num_steps=3,
        num_sweep_steps=2,
        warmup=1,
        rates=rates,
        flags=(*recipe.flags, "--no-async-save"),
    )


def stories(
    folder: Path,
    model: Path,
    text: Path,
    separator: str,
    kept: tuple[int, int],
    quick: bool = False,
    seq_length: int = 256,
) -> tuple[Recipe, list[Step]]:
    """Return recipe and data steps for a given model and a text of many documents.

    ``kept`` is the number of documents that are held out, and that of those that rates are chosen
    by. Every intermediate depth but the first becomes an exit: one layer of such a model predicts
    little.

    Raises:
        DataError: The text is missing, or the model has too few layers or no sentencepiece file.
        CheckpointError: The directory holds no model.
    """
    if not text.is_file():
        raise DataError(f"--text: {text}: no such file. Give a text file.")
    num_layers = json.loads(
        (as_hugging_face_directory(model) / "config.json").read_text(encoding="utf-8")
    )["num_hidden_layers"]
    if num_layers < 3:
        raise DataError(
            f"--model: {model} has {num_layers} layers, no depth between the first and the last."
            " Give one with at least 3."
        )
    if not (model / "tokenizer.model").is_file():
        raise DataError(
            f"--model: {model} has no tokenizer.model. Give a directory with a sentencepiece file."
        )
    data = folder / "data"
    recipe = Recipe(
        folder,
        model,
        tuple(range(2, num_layers)),
        tuple(range(1, num_layers + 1)),
        seq_length=seq_length,
        num_steps=800,
        num_sweep_steps=150,
        warmup=10,
        held_out=(prefix(folder, "held_out"),),
        head_batch_size=10,
        rates={
            "ordinary": ("1e-4", "3e-4", "1e-3", "3e-3"),
            "nested": ("3e-4", "1e-3", "3e-3", "1e-2"),
            "heads": ("5e-3", "1.5e-2", "5e-2", "1.5e-1"),
        },
        evaluate=("--text", str(data / "held_out.jsonl")),
    )
    recipe = make_quick(recipe) if quick else recipe
    split = _split_step(
        recipe,
        text,
        kept[1],
        ("--separator", separator, "--num-held-out", str(kept[0])),
        model,
        (text,),
        (),
    )
    names = ("train", "tuning", "held_out")
    prepared = [
        prepare_step(
            folder,
            name,
            recipe.seq_length,
            ("--tokenizer-model", str(model / "tokenizer.model")),
            ("split",),
        )
        for name in names
    ]
    return replace(recipe, data_steps=tuple(step.name for step in prepared)), [split, *prepared]


def cldr(folder: Path, quick: bool = False) -> tuple[Recipe, list[Step]]:
    """Return recipe and data steps for the demo's questions.

    The ordinary model that all start from is trained on them from scratch first.
    """
    data, questions, original = folder / "data", folder / "questions", folder / "original"
    tokenizer, sets = data / "all_tokenizer.model", ("phrasing", "unseen")
    files = tuple(str(questions / f"{name}.jsonl") for name in sets)
    num_facts, num_questions, vocabulary = ("40", "40", "600") if quick else ("500", "1000", "1500")
    recipe = Recipe(
        folder,
        original,
        (1, 2, 3, 4),
        (1, 2, 3, 4, 6),
        seq_length=128,
        num_steps=250,
        num_sweep_steps=100,
        warmup=10,
        held_out=tuple(prefix(folder, name) for name in sets),
        head_batch_size=64,
        append_eos=True,
        flags=("--adam-beta2", "0.95", "--weight-decay", "1.0"),
        rates={
            "ordinary": ("4e-4", "1.2e-3", "4e-3"),
            "nested": ("4e-4", "1.2e-3", "4e-3"),
            "heads": ("5e-3", "1.5e-2", "5e-2"),
        },
        evaluate=(
            "--text",
            *files,
            "--questions",
            *files,
            *("--shots", "0", "--question-template", "{question}\\n", "--batch-size", "100"),
            *(("--num-questions", "10") if quick else ()),
        ),
    )
    recipe = make_quick(recipe) if quick else recipe
    ask = Step(
        "questions",
        "Write questions such as `How do you say Monday in Finnish?`, with true answers from"
        " Unicode CLDR",
        (
            *(PYTHON, "-m", "lab.make_cldr_questions", "--output", str(questions), *QUESTIONS),
            *f"--max-facts {num_facts} --num-eval-samples {num_questions}".split(),
        ),
        tuple(questions / f"{name}.jsonl" for name in ("train", *sets)),
    )
    learn_tokens = (
        *(*OURS, "prepare", "--input", str(questions / "train.jsonl")),
        *("--output-prefix", str(data / "all"), "--train-tokenizer", vocabulary),
        *f"--seq-length {recipe.seq_length} --workers 1 --overwrite".split(),
    )
    learn = Step(
        "tokenizer",
        "Train a tokenizer on the questions",
        learn_tokens,
        (tokenizer,),
        needs=("questions",),
    )
    split = _split_step(
        recipe, questions / "train.jsonl", 30 if quick else 300, (), tokenizer, (), ("tokenizer",)
    )
    source = ("--tokenizer-model", str(tokenizer))
    prepared = [
        prepare_step(folder, name, recipe.seq_length, source, ("split",))
        for name in ("train", "tuning")
    ]
    prepared += [
        prepare_step(folder, name, recipe.seq_length, source, ("tokenizer",), questions)
        for name in sets
    ]
    save = folder / "runs" / "original"
    few_steps = ("--train-iters", "3", "--lr-warmup-iters", "1") if quick else ()
    train = (
        *f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2".split(),
        *("pretrain_sorted.py", "--config", str(CONFIG.relative_to(ROOT))),
        *("--exit-layer-weight", "0", "0", "0", "0"),
        *("--data-path", str(prefix(folder, "train"))),
        *("--valid-data-path", *(str(prefix(folder, name)) for name in sets)),
        *("--tokenizer-model", str(tokenizer), "--save", str(save), "--save-hf", str(original)),
        *few_steps,
    )
    learned = Step(
        "train-original",
        "Train an ordinary model from scratch, as the demo does; all methods start from it",
        train,
        (save / "evaluation.json", original / "config.json"),
        (save, original),
        tuple(step.name for step in prepared),
        (CONFIG,),
    )
    return replace(recipe, data_steps=("train-original",)), [ask, learn, split, *prepared, learned]


def _split_step(
    recipe: Recipe,
    text: Path,
    num_tuning: int,
    flags: tuple[str, ...],
    tokenizer: Path,
    reads: tuple[Path, ...],
    needs: tuple[str, ...],
) -> Step:
    data = recipe.folder / "data"
    numbers = dict.fromkeys((recipe.num_tokens, recipe.num_sweep_tokens))
    command = (
        *(*OURS, "split", "--input", str(text), *flags, "--num-tuning", str(num_tuning)),
        *("--output", str(data), "--tokenizer", str(tokenizer)),
        *("--num-tokens", *map(str, numbers)),
    )
    names = ("train", "tuning", *(f"train_{number}" for number in numbers))
    return Step(
        "split",
        "Keep samples to measure on and to choose learning rates by; train on the rest",
        command,
        (data / "split.json", *(data / f"{name}.jsonl" for name in names)),
        needs=needs,
        reads=reads,
    )
