"""The page of runs: one HTML file with the picture, tables of the last numbers and the settings."""

import base64
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from megatron_sorted.files import write_text_atomically
from megatron_sorted.reporting.run_reports import RecordedRun

COLUMNS = {
    "loss": ("loss", "{:.4f}", 1),
    "perplexity": ("perplexity", "{:,.2f}", 1),
    "token_accuracy": ("tokens right", "{:.1f} %", 100),
    "exact_match": ("exact match", "{:.1f} %", 100),
    "agreement": ("agreement", "{:.1f} %", 100),
    "accept_length": ("accept length", "{:.2f}", 1),
    "coefficient": ("coefficient", "{:g}", 1),
    "grad_norm": ("gradient norm", "{:.3g}", 1),
    "kd": ("KL to teacher", "{:.4f}", 1),
    "gradient_cosine": ("gradient cosine", "{:.2f}", 1),
    "gradient_ratio": ("gradient ratio", "{:.2f}", 1),
}
"""Number of an exit -> title, format, factor."""
TRAINING = {
    "samples": ("samples", "{:,.0f}", 1),
    "epoch": ("epoch", "{:.2f}", 1),
    "learning_rate": ("learning rate", "{:.3e}", 1),
    "step_seconds": ("seconds per step", "{:.3g}", 1),
    "tokens_per_second": ("tokens/s", "{:,.0f}", 1),
    "tflops_per_device": ("TFLOP/s per device", "{:.3g}", 1),
    "mfu": ("MFU", "{:.1f} %", 100),
    "memory_bytes": ("memory (GiB)", "{:.2f}", 2**-30),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222;
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; height: auto; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .6rem;
  border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { font-weight: 600; background: #f6f6f6; } td:first-child, th:first-child { text-align: left; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.note { color: #666; } code { background: #f4f4f4; padding: .1rem .3rem; overflow-wrap: anywhere; }
"""


def _cell(value: Any, form: str, factor: float) -> str:
    return "–" if value is None else form.format(value * factor)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], name: str = "") -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table class="{name}"><tr>{head}</tr>\n{body}</table></div>'


def exit_rows(run: RecordedRun, name: str | None) -> tuple[list[str], list[list[str]]]:
    """Return (titles, rows) of the last numbers of every exit in training (name None) or on a set.

    Numbers that were not measured have no column.
    """
    _, exits = run.final(name)
    numbers = [
        number
        for number in COLUMNS
        if any(measured.get(number) is not None for measured in exits.values())
    ]
    costs = any(depth in run.costs for depth in exits)
    titles = [
        "exit",
        *(COLUMNS[number][0] for number in numbers),
        *["parameters", "FLOPs/token"] * costs,
    ]
    rows = []
    for depth, measured in exits.items():
        cells = (_cell(measured.get(number), *COLUMNS[number][1:]) for number in numbers)
        row = [str(depth), *cells]
        if costs:
            cost = run.costs.get(depth, {})
            row += [
                _cell(cost.get("parameters"), "{:,.0f}", 1),
                _cell(cost.get("flops_per_token"), "{:.3e}", 1),
            ]
        rows.append(row)
    return titles, rows


def _training(run: RecordedRun) -> str:
    last = run.train[-1]
    titles, row = (
        ["step"],
        [f"{last['step']:,}" + (f" of {last['total_steps']:,}" if "total_steps" in last else "")],
    )
    for number, (title, *form) in TRAINING.items():
        if last.get(number):
            titles.append(title)
            row.append(_cell(last[number], *form))
    for number, title in (("skipped", "steps skipped"), ("nonfinite", "not finite")):
        titles.append(title)
        row.append(str(sum(line.get(number) or 0 for line in run.train)))
    return _table(titles, [row])


def _section(run: RecordedRun) -> str:
    parts = [
        f"<h2>{escape(run.name)}</h2>",
        f'<p class="note"><code>{escape(str(run.path))}</code></p>',
    ]
    if run.train:
        parts += ["<h3>Training, last report</h3>", _training(run), _table(*exit_rows(run, None))]
    for name in run.evaluations:
        step, _ = run.final(name)
        title = f"Evaluation of {escape(name.removesuffix('_text_document'))} at step {step:,}"
        parts += [f"<h3>{title}</h3>", _table(*exit_rows(run, name))]
    if run.settings:
        rows = [
            [name.replace("_", "-"), str(value)]
            for name, value in run.settings.items()
            if value not in (None, [], "")
        ]
        settings = _table(["setting", "value"], rows, "settings")
        parts.append(f"<details><summary>Settings ({len(rows)})</summary>{settings}</details>")
    return "\n".join(parts)


def write_page(runs: Sequence[RecordedRun], picture: Path, output: Path) -> None:
    """Write the page of these runs, with their picture inside."""
    title = " and ".join(run.name for run in runs)
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    write_text_atomically(
        output,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1>
<p class="note">{made}; steps up to {max(run.last_step for run in runs):,}</p>
<img alt="Curves of the runs; the last numbers are in the tables below"
 src="data:image/png;base64,{image}">
{"".join(_section(run) for run in runs)}
</body></html>
""",
    )
