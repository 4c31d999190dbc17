"""README.md of a model whose exits have parts of their own, and of a sub-model cut out of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted import __version__
from megatron_sorted.conversion.hugging_face.families import EXITS_FILE, family_of_settings
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.settings.costs import forward_flops_per_token, sub_model_parameters
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings

MODULE = "nested_exits.py"
# {measure: title} of the numbers on a card; an evaluation file holds more.
TITLES = {
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "agreement": "agrees with the full model",
    "token_accuracy": "tokens right",
    "exact_match": "exact match",
    "f1": "F1",
    "exact_match_with_case": "exact match with case",
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised",
}
SHARES = {
    "agreement",
    "token_accuracy",
    "exact_match",
    "f1",
    "exact_match_with_case",
    "acc",
    "acc_norm",
}


@dataclass(frozen=True)
class Quality:
    """Measured numbers of one model.

    Attributes:
        source: The name of the evaluation file.
        sets: {data set: {measure: {depth: value}}}.
    """

    source: str
    sets: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)


def read_quality(path: Path, model: str | None = None) -> Quality:
    """Read what was measured of a model from an evaluation.json.

    Args:
        path: The file, written by megatron-sorted evaluate or by a training run.
        model: The model, if the file compares several; by default the only one that is no baseline.

    Raises:
        DataError: The file is none, or it holds several models and ``model`` names none of them.
    """
    try:
        content = read_json_object(
            path, "Give an evaluation file, one of megatron-sorted evaluate."
        )
        if "sets" in content:  # written by a training run
            by_set = {
                name.removesuffix("_text_document"): exits
                for name, exits in content["sets"].items()
            }
        else:
            by_set = _of_models(content, model, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not an evaluation file ({type(error).__name__}: {error}). "
            "Give one of megatron-sorted evaluate."
        ) from error
    sets: dict[str, dict[str, dict[int, float]]] = {}
    for name, exits in by_set.items():
        for depth, values in exits.items():
            for measure, value in values.items():
                value = value.get("value") if isinstance(value, dict) else value
                if measure in TITLES and isinstance(value, int | float):
                    sets.setdefault(name, {}).setdefault(measure, {})[int(depth)] = float(value)
    return Quality(path.name, sets)


def _of_models(content: Mapping[str, Any], model: str | None, path: Path) -> dict[str, Any]:
    """Return the exits of one model from a file of megatron-sorted evaluate, by data set."""
    names = list(content["models"])
    if model is None:
        own = [name for name in names if not content["models"][name]["is_baseline"]]
        if len(own) != 1:
            raise DataError(
                f"{path}: holds {', '.join(names)}. Name the one of this model with "
                "--evaluation-name."
            )
        model = own[0]
    if model not in names:
        raise DataError(f"{path}: holds no {model!r} but {', '.join(names)}.")
    return {
        name: one["models"][model]["exits"]
        for section in ("texts", "questions", "tasks")
        for name, one in content.get(section, {}).items()
    }


def _shown(measure: str, value: float) -> str:
    return f"{100 * value:.1f} %" if measure in SHARES else f"{value:.4g}"


def _quality_lines(quality: Quality | None, depth: int, num_layers: int) -> list[str]:
    """Return the table of measured quality, or a line that explains how to measure it."""
    sets = (
        {}
        if quality is None
        else {
            name: values
            for name, values in quality.sets.items()
            if any(depth in by for by in values.values())
        }
    )
    if not sets:
        return [
            "Not measured. `megatron-sorted evaluate` measures loss, questions and tasks at every "
            "exit; `megatron-sorted extract --evaluation evaluation.json` puts the figures here."
        ]
    lines = [f"| measured on | | this model | all {num_layers} layers |", "|---|---|---:|---:|"]
    for name, values in sets.items():
        for measure, by_depth in values.items():
            if depth in by_depth:
                full = _shown(measure, by_depth[num_layers]) if num_layers in by_depth else ""
                lines.append(
                    f"| {name} | {TITLES[measure]} | {_shown(measure, by_depth[depth])} | {full} |"
                )
    return [*lines, "", f"From `{quality.source}`."]


@dataclass(frozen=True)
class Origin:
    """The model that a sub-model was cut out of.

    Attributes:
        name: The name of the model.
        settings: The settings of the model.
        step: The training step at which it was saved; None if unknown.
    """

    name: str
    settings: Settings
    step: int | None = None


def _heading(name: str) -> list[str]:
    """Return the front matter and title of a card."""
    tags = ["---", "library_name: transformers", "tags: [nested, early-exit]", "---", ""]
    return [*tags, f"# {name}", ""]


def model_card(
    name: str,
    origin: Origin,
    submodel: Settings,
    quality: Quality | None,
    has_tokenizer: bool = True,
    exit_depth: int | None = None,
) -> str:
    """Return the README.md of a sub-model.

    Args:
        name: The name of the directory.
        origin: The model that the sub-model was cut out of.
        submodel: The settings of the sub-model.
        quality: What was measured of the model, if anything.
        has_tokenizer: Whether the directory holds a tokenizer.
        exit_depth: The depth of the exit in the full model, if the sub-model has one layer more.
    """
    full, step = origin.settings, origin.step
    depth, layers, vocabulary = exit_depth or submodel.num_layers, full.num_layers, full.vocab_size
    length = min(submodel.seq_length, 2048)
    (parameters, flops), (full_parameters, full_flops) = (
        (
            sub_model_parameters(settings, vocabulary)[settings.num_layers],
            forward_flops_per_token(settings, vocabulary, length)[settings.num_layers],
        )
        for settings in (submodel, full)
    )
    nested, inner = exit_depths(full), exit_depths(submodel)[:-1]
    if len(nested) > 1:
        kind = f"one of its exits ({', '.join(map(str, nested))})"
    else:
        kind = "an ordinary model" + " that was not trained to stop there" * (depth != layers)
    own_part = hint = ""
    if depth < submodel.num_layers and full.use_exit_block:
        own_part = "the layer of its own before the norm, "
    elif depth < submodel.num_layers:
        own_part = (
            "the MLP of its own as one more layer (whose attention adds nothing: its `o_proj` is "
            "zero), "
        )
    if not (full.use_exit_norm or full.untie_exit_output_weights or part_names(full)):
        hint = (
            " In the full model's own directory the same layers are "
            f"`assistant_early_exit={depth}`."
        )
    family = family_of_settings(submodel)
    lines = [
        *_heading(name),
        f"The first {depth} of {layers} layers of "
        f"`{origin.name}`{'' if step is None else f' (training step {step:,})'}, {kind}, with "
        f"{own_part}the norm and head that read it. An ordinary `{family.architecture}` of "
        f"{submodel.num_layers} layers.",
        "",
        "| | this model | all layers | share |",
        "|---|---:|---:|---:|",
        f"| layers | {submodel.num_layers} | {layers} | "
        f"{100 * submodel.num_layers / layers:.0f} % |",
        f"| parameters | {parameters:,} | {full_parameters:,} | "
        f"{100 * parameters / full_parameters:.0f} % |",
        f"| FLOPs per token (forward, {length} tokens) | {flops:.3g} | {full_flops:.3g} | "
        f"{100 * flops / full_flops:.0f} % |",
        "",
        "## Measured quality",
        "",
        *_quality_lines(quality, depth, layers),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import "
        f"AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if has_tokenizer else []),
        "```",
        "",
        "It drafts for the full model, whose vocabulary it shares: `full.generate(..., "
        "assistant_model=model)` in transformers, or as the draft model of vLLM or "
        f"SGLang.{hint}",
    ]
    if inner:
        lines += [
            "",
            f"Its own exits are {', '.join(map(str, inner))} (`exit_layer_indices` in "
            "config.json).",
        ]
        if own := part_names(submodel):
            lines += [
                "",
                f"Each of them has {', '.join(own)} of its own, in `{EXITS_FILE}`. "
                f"{use_of_exits(name, inner[0])[0]}",
                *use_of_exits(name, inner[0])[1:],
            ]
    return "\n".join([*lines, "", f"Cut out with megatron_sorted {__version__}.", ""])


def part_names(settings: Settings) -> list[str]:
    """Describe the parts between an intermediate exit's hidden state and its norm, in order."""
    if len(exit_depths(settings)) == 1:
        return []
    return [
        what
        for has, what in (
            (settings.exit_adapter_rank, f"a low-rank adapter (rank {settings.exit_adapter_rank})"),
            (settings.use_exit_block, "a layer (block)"),
            (settings.use_exit_mlp, "a normed MLP"),
        )
        if has
    ]


def nested_files(name: str, settings: Settings) -> dict[str, str]:
    """Return {name: text} of files to write beside a model; empty if its exits have no parts."""
    if not part_names(settings):
        return {}
    return {
        MODULE: Path(__file__).with_name(MODULE).read_text(encoding="utf-8"),
        "README.md": _card(name, settings),
    }


def use_of_exits(name: str, depth: int) -> list[str]:
    """Return the lines of a card that explain how to run exits."""
    return [
        f"Exits run with `{MODULE}` of this directory, a small module of megatron_sorted "
        "(Apache-2.0) that needs torch, safetensors and transformers; nothing here asks for "
        f"`trust_remote_code`. Copy it beside your program (`cp {name}/{MODULE} .`) and import it:",
        "",
        "```python",
        "from nested_exits import load_nested_exits",
        "",
        f'model = load_nested_exits("{name}")',
        f"logits = model(input_ids, depth={depth})",
        f"tokens = model.generate(input_ids, depth={depth}, max_new_tokens=32)",
        "```",
    ]


def _card(name: str, settings: Settings) -> str:
    """Return the README.md of a nested model whose exits have parts of their own."""
    depths, vocabulary, length = (
        exit_depths(settings),
        settings.vocab_size,
        min(settings.seq_length, 2048),
    )
    family, last = family_of_settings(settings), depths[-1]
    parameters, flops = (
        sub_model_parameters(settings, vocabulary),
        forward_flops_per_token(settings, vocabulary, length),
    )
    own = [
        *part_names(settings),
        *["a norm"] * settings.use_exit_norm,
        *["a head"] * settings.untie_exit_output_weights,
    ]
    shared = [
        what
        for is_own, what in (
            (settings.use_exit_norm, "norm"),
            (settings.untie_exit_output_weights, "head"),
        )
        if not is_own
    ]
    lines = [
        *_heading(name),
        f"A nested `{family.architecture}` of {last} layers. Plain transformers loads it as the "
        f'ordinary full model: `AutoModelForCausalLM.from_pretrained("{name}")`. It also predicts '
        f"after {', '.join(map(str, depths[:-1]))} layers. Each of these exits has "
        f"{', '.join(own)} of its own, in `{EXITS_FILE}`"
        f"{', and shares ' + ' and '.join(shared) if shared else ''}.",
        "",
        f"| exit | parameters | share | FLOPs per token (forward, {length} tokens) | share |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {depth} | {parameters[depth]:,} | "
            f"{100 * parameters[depth] / parameters[last]:.0f} % | {flops[depth]:.3g} | "
            f"{100 * flops[depth] / flops[last]:.0f} % |"
            for depth in depths
        ),
        "",
        "## Use of the exits",
        "",
        *use_of_exits(name, depths[0]),
        "",
    ]
    if settings.exit_adapter_rank:
        lines += ["An exit with an adapter is no ordinary model, so it cannot be cut out as one."]
    else:
        lines += [
            "`megatron-sorted extract` of megatron_sorted cuts each exit out as an ordinary model "
            "that needs no such module."
        ]
    return "\n".join([*lines, "", f"Written by megatron_sorted {__version__}.", ""])
