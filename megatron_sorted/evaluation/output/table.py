"""The tables for the console: a row per depth and model, with definitions of the columns below."""

from collections.abc import Callable

from megatron_sorted.evaluation.output.cells import MINUS, align, error_of
from megatron_sorted.evaluation.output.position_table import write_position_tables
from megatron_sorted.settings.derived import MASKS

LOSS = (
    "loss: nats per counted token over all documents; ± one standard error over documents (ratio "
    "estimator)"
)
BITS = (
    "bits/byte: total nats / ln 2 / UTF-8 bytes of the counted text; comparable between tokenizers"
)
PERPLEXITY = "perplexity: e^loss, per token"
AGREES = (
    "agrees: share of counted tokens for which the exit and the last exit have the same most "
    "likely token"
)
EXACT = (
    "exact: share of answers that equal a right one after TriviaQA's normalisation (case, "
    "punctuation, articles, underscores); ± one standard error over questions"
)
EXACT_TOKENS = (
    "exact: share of documents in which every trained token is the most likely one after the right "
    "ones before it"
)
F1 = "F1: overlap of words with the best right answer, same normalisation"
CASE = "case: share of answers that equal a right one letter by letter (Sorted LLaMA's measure)"
MINUS_EXACT = (
    "- NAME: difference in exact, in points, to that baseline's exit at the same depth, ± one "
    "standard error of the paired difference"
)
COST = (
    "FLOPs/token: forward, {length} tokens: 2 x weights of linear layers and head + attention at "
    "its causal mean; without the embedding"
)


def write_tables(results: dict) -> str:
    """Return all tables."""
    parts = []
    cost = COST.format(length=results["settings"]["seq_length"])
    for name, text in results["texts"].items():
        tokens = {model: numbers["tokens"] for model, numbers in text["models"].items()}
        counted = ", ".join(f"{count:,} tokens ({model})" for model, count in tokens.items())
        if len(set(tokens.values())) == 1:
            counted = f"{next(iter(tokens.values())):,} tokens"
        columns = {
            "loss": _witherror_of("loss", 4),
            "bits/byte": _number("bits_per_byte", 4),
            "perplexity": _perplexity,
            "agrees": _percent("agreement"),
        } | _minus(text, "loss_minus", lambda value: f"{value:+.4f}")
        notes = [
            LOSS,
            BITS,
            PERPLEXITY,
            AGREES,
            *[MINUS] * _has(text, "loss_minus"),
            cost,
            f"counted: {results['settings']['counted']}",
        ]
        notes += [
            f"note: {model} has {numbers['unknown_tokens']:,} unknown tokens; its bits/byte leave "
            "out the text behind them"
            for model, numbers in text["models"].items()
            if numbers["unknown_tokens"]
        ]
        title = f"{name}: {text['documents']:,} documents, {text['bytes']:,} bytes, {counted}"
        parts.append(_table(title, text, results, columns, notes))
    if results.get("positions"):
        parts += write_position_tables(results)
    for name, measured in results.get("data", {}).items():
        parts.append(_data_table(name, measured, results, cost))
    for name, measured in results["questions"].items():
        columns = {
            "exact": _percent_witherror_of("exact_match"),
            "F1": _percent("f1"),
            "case": _percent("exact_match_with_case"),
        }
        columns |= _minus(measured, "exact_match_minus", lambda value: f"{100 * value:+.1f}")
        notes = [EXACT, F1, CASE, *[MINUS_EXACT] * _has(measured, "exact_match_minus"), cost]
        total, shots = f"{measured['questions']:,}", results["settings"]["shots"]
        cut = [
            f"{numbers['cut_prompts']:,} of {total} prompts of {model} were too long and lost "
            "their beginning"
            for model, numbers in measured["models"].items()
            if numbers["cut_prompts"]
        ]
        title = f"{name}: {total} questions, {shots} examples each"
        parts.append(_table("\n".join([title, *cut]), measured, results, columns, notes))
    for name, task in results["tasks"].items():
        metrics = {
            metric: None
            for model in task["models"].values()
            for numbers in model["exits"].values()
            for metric in numbers
            if metric != "samples"
        }
        columns = {metric: _metric(metric) for metric in metrics}
        notes = [
            "metrics: as the task defines them; ± lm-evaluation-harness's own standard error",
            cost,
        ]
        parts.append(_table(f"{name} (lm-evaluation-harness)", task, results, columns, notes))
    return "\n\n".join(parts)


def _data_table(name: str, measured: dict, results: dict, cost: str) -> str:
    """Return the table of one file of prepared data."""
    first, data = next(iter(measured["models"].values())), results["settings"]["data"]
    of_instructions = next(iter(first["exits"].values()))["exact_match"] is not None
    columns = {
        "loss": _witherror_of("loss", 4),
        "perplexity": _perplexity,
        "agrees": _percent("agreement"),
    }
    columns |= {"exact": _percent("exact_match")} if of_instructions else {}
    columns |= _minus(measured, "loss_minus", lambda value: f"{value:+.4f}")
    unit = "documents" if of_instructions else "samples"
    flags = [f"{flag.replace('_', '-')} {'on' if data[flag] else 'off'}" for flag in MASKS]
    masks = "packed documents are kept apart" if of_instructions else ", ".join(flags)
    notes = [
        "loss: nats per trained token, as in a run's own evaluation of these data; ± one standard "
        f"error over {unit}",
        PERPLEXITY,
        AGREES,
        *[EXACT_TOKENS] * of_instructions,
        *[MINUS] * _has(measured, "loss_minus"),
        cost,
        f"samples: {data['seq_length']} positions, cut and packed as in training; {masks}",
    ]
    title = f"{name}: {first['units']:,} {unit}, {first['tokens']:,} trained tokens (prepared data)"
    return _table(title, measured, results, columns, notes)


def _table(
    title: str,
    measured: dict,
    results: dict,
    columns: dict[str, Callable[[dict], str]],
    notes: list[str],
) -> str:
    """Return a table with its title above and its notes below."""
    rows = [["depth", "model", "parameters", "FLOPs/token", *columns]]
    depths = sorted({depth for model in measured["models"].values() for depth in model["exits"]})
    breaks = []
    for depth in depths:
        breaks.append(len(rows))
        for name, model in measured["models"].items():
            if depth in model["exits"]:
                cost = results["models"][name]["exits"][depth]
                rows.append(
                    [
                        str(depth),
                        name,
                        f"{cost['parameters']:,}",
                        f"{cost['flops_per_token']:.2e}",
                        *(column(model["exits"][depth]) for column in columns.values()),
                    ]
                )
    one_by_one = len(measured["models"]) > 1
    return align(title, rows, breaks if one_by_one else breaks[:1], notes)


def _number(key: str, decimals: int) -> Callable[[dict], str]:
    return lambda numbers: f"{numbers[key]:.{decimals}f}"


def _percent(key: str) -> Callable[[dict], str]:
    return lambda numbers: f"{100 * numbers[key]:.1f}%"


def _percent_witherror_of(key: str) -> Callable[[dict], str]:
    return lambda numbers: (
        f"{100 * numbers[key]:.1f}%"
        + error_of(numbers[f"{key}_standard_error"], lambda value: f"{100 * value:.1f}")
    )


def _witherror_of(key: str, decimals: int) -> Callable[[dict], str]:
    return lambda numbers: (
        f"{numbers[key]:.{decimals}f}"
        + error_of(numbers[f"{key}_standard_error"], lambda value: f"{value:.{decimals}f}")
    )


def _perplexity(numbers: dict) -> str:
    value = numbers["perplexity"]
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}" if value >= 1e6 else f"{value:,.0f}"


def _metric(metric: str) -> Callable[[dict], str]:
    def show(numbers: dict) -> str:
        if metric not in numbers:
            return "-"
        value, error = numbers[metric]["value"], numbers[metric]["standard_error"]
        return f"{value:.4f}" + error_of(error, lambda number: f"{number:.4f}")

    return show


def _has(measured: dict, key: str) -> bool:
    return any(
        key in numbers
        for model in measured["models"].values()
        for numbers in model["exits"].values()
    )


def _minus(
    measured: dict, key: str, show: Callable[[float], str]
) -> dict[str, Callable[[dict], str]]:
    """Return a column for the difference to every baseline."""
    others = {
        other: None
        for model in measured["models"].values()
        for numbers in model["exits"].values()
        for other in numbers.get(key, {})
    }

    def column(other: str) -> Callable[[dict], str]:
        def cell(numbers: dict) -> str:
            difference = numbers.get(key, {}).get(other)
            if difference is None:
                return ""
            error = error_of(difference["standard_error"], lambda value: show(value).lstrip("+"))
            return show(difference["value"]) + error

        return cell

    return {f"- {other}": column(other) for other in others}
