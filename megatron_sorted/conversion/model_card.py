"""The README.md of an extracted sub-model: where it comes from, how large it is, how good it was measured to be, how it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sorted import __version__
from megatron_sorted.conversion.families import EXITS, family_of_settings
from megatron_sorted.conversion.nested_card import part_names, use_of_exits
from megatron_sorted.errors import DataError
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.settings.costs import forward_flops_per_token, sub_model_parameters
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings

# {measure: title}; every other number of an evaluation file is left to that file.
TITLES = {"loss": "loss, nats per token", "bits_per_byte": "bits per byte", "perplexity": "perplexity",
          "agreement": "agrees with the full model", "token_accuracy": "tokens right",
          "exact_match": "exact match", "f1": "F1", "exact_match_with_case": "exact match with case",
          "acc": "accuracy", "acc_norm": "accuracy, normalised"}
SHARES = {"agreement", "token_accuracy", "exact_match", "f1", "exact_match_with_case", "acc", "acc_norm"}


@dataclass(frozen=True)
class Quality:
    """Measured numbers of one model: {what was read: {measure: {depth: value}}}, and which file says so."""

    source: str
    sets: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)


def read_quality(path: Path, model: str | None = None) -> Quality:
    """Returns what an evaluation.json says of a model at every depth; one of tools/evaluate.py, or of a training run.

    Args:
        path: The file.
        model: Which model of a file that compares several; by default the only one that is no baseline.

    Raises:
        DataError: It is no such file, or it holds several models and none was named.
    """
    try:
        content = read_json_object(path, "Give an evaluation file, one of tools/evaluate.py.")
        by_set = _of_a_run(content) if "sets" in content else _of_models(content, model, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an evaluation file ({type(error).__name__}: {error}). Give one of tools/evaluate.py.") from error
    sets: dict[str, dict[str, dict[int, float]]] = {}
    for name, exits in by_set.items():
        for depth, values in exits.items():
            for measure, value in values.items():
                value = value.get("value") if isinstance(value, dict) else value
                if measure in TITLES and isinstance(value, int | float):
                    sets.setdefault(name, {}).setdefault(measure, {})[int(depth)] = float(value)
    return Quality(path.name, sets)


def _of_a_run(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removesuffix("_text_document"): exits for name, exits in content["sets"].items()}


def _of_models(content: Mapping[str, Any], model: str | None, path: Path) -> dict[str, Any]:
    names = list(content["models"])
    if model is None:
        own = [name for name in names if not content["models"][name]["is_baseline"]]
        if len(own) != 1:
            raise DataError(f"{path}: holds {', '.join(names)}. Say which is this model with --evaluation-name.")
        model = own[0]
    if model not in names:
        raise DataError(f"{path}: holds no {model!r} but {', '.join(names)}.")
    return {name: one["models"][model]["exits"] for part in ("texts", "questions", "tasks")
            for name, one in content.get(part, {}).items()}


def _shown(measure: str, value: float) -> str:
    return f"{100 * value:.1f} %" if measure in SHARES else f"{value:.4g}"


def _quality_lines(quality: Quality | None, depth: int, num_layers: int) -> list[str]:
    sets = {} if quality is None else {name: values for name, values in quality.sets.items() if any(depth in by for by in values.values())}
    if not sets:
        return ["Not measured. `python tools/evaluate.py` measures loss, questions and tasks at every exit; "
                "`tools/extract_submodel.py --evaluation evaluation.json` puts the figures here."]
    lines = [f"| measured on | | this model | all {num_layers} layers |", "|---|---|---:|---:|"]
    for name, values in sets.items():
        for measure, by_depth in values.items():
            if depth in by_depth:
                full = _shown(measure, by_depth[num_layers]) if num_layers in by_depth else ""
                lines.append(f"| {name} | {TITLES[measure]} | {_shown(measure, by_depth[depth])} | {full} |")
    return [*lines, "", f"From `{quality.source}`."]


def model_card(name: str, origin: str, full: Settings, part: Settings, quality: Quality | None, step: int | None = None,
               has_tokenizer: bool = True, exit_depth: int | None = None) -> str:
    """Returns the card.

    Args:
        name: Of the directory.
        origin: Name of the model it was cut out of.
        full: Settings of that model.
        part: Settings of the sub-model.
        quality: What was measured of the model, if anything.
        step: Of training at which the model was saved, where it is known.
        has_tokenizer: Whether the directory holds one.
        exit_depth: Which exit of the full model it is, where it has other layers than that has below it.
    """
    depth, layers, vocabulary = exit_depth or part.num_layers, full.num_layers, full.vocab_size
    parameters, whole = sub_model_parameters(part, vocabulary)[part.num_layers], sub_model_parameters(full, vocabulary)[layers]
    length = min(part.seq_length, 2048)
    flops, whole_flops = (forward_flops_per_token(settings, vocabulary, length)[settings.num_layers] for settings in (part, full))
    nested, inner = exit_depths(full), exit_depths(part)[:-1]
    trained = f"one of its exits ({', '.join(map(str, nested))})"
    if len(nested) == 1:
        trained = "an ordinary model" + ("" if depth == layers else " that was not trained to stop there")
    more = ""
    if depth < part.num_layers:
        more = "the layer of its own before the norm, " if full.use_exit_block else (
            "the MLP of its own as one more layer (whose attention adds nothing: its `o_proj` is zero), ")
    in_place = "" if full.use_exit_norm or full.untie_exit_output_weights or part_names(full) else (
        f" In the full model's own directory the same layers are `assistant_early_exit={depth}`.")
    family = family_of_settings(part)
    lines = [
        "---", "library_name: transformers", "tags: [nested, early-exit]", "---", "", f"# {name}", "",
        f"The first {depth} of {layers} layers of `{origin}`{'' if step is None else f' (training step {step:,})'}, "
        f"{trained}, with {more}the norm and head that read it. An ordinary `{family.architecture}` of {part.num_layers} layers.", "",
        "| | this model | all layers | share |", "|---|---:|---:|---:|",
        f"| layers | {part.num_layers} | {layers} | {100 * part.num_layers / layers:.0f} % |",
        f"| parameters | {parameters:,} | {whole:,} | {100 * parameters / whole:.0f} % |",
        f"| FLOPs per token (forward, {length} tokens) | {flops:.3g} | {whole_flops:.3g} | {100 * flops / whole_flops:.0f} % |", "",
        "## Measured quality", "", *_quality_lines(quality, depth, layers), "",
        "## Use", "", "```python", f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if has_tokenizer else []), "```", "",
        "It drafts for the full model, whose vocabulary it shares: `full.generate(..., assistant_model=model)` in transformers, or as the "
        f"draft model of vLLM or SGLang.{in_place}",
    ]
    if inner:
        lines += ["", f"Its own exits are {', '.join(map(str, inner))} (`exit_layer_indices` in config.json)."]
        if own := part_names(part):
            lines += ["", f"Each of them has {', '.join(own)} of its own, in `{EXITS}`. {use_of_exits(name, inner[0])[0]}",
                      *use_of_exits(name, inner[0])[1:]]
    return "\n".join([*lines, "", f"Cut out with megatron_sorted {__version__}.", ""])
