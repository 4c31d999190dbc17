"""The page docs/benchmarks/convert.md."""

import statistics
from pathlib import Path
from typing import Any

from lab.benchmarks.pages import bullets, verdict_lines, write_page
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import table

TIME_BOUND = 1.5
MEMORY_BOUND_BYTES = 600_000_000
FLAT_BYTES = 32 << 20
"""Peaks of two depths this close count as equal: resident memory is not exact."""

OPENING = """\
Models with random weights in bf16, made by the program, converted from Hugging Face to a checkpoint
(import) and back (export) in processes of their own. Beside each conversion, in turns with it:
reading the same files and writing their bytes to new ones (16 MB at a time, one thread), flushed,
as a conversion's are. Files are out of the page cache at the start of both. Ratios are medians of
ratios within a round.
"""
TERMS = """\
- *convert*: from opening the model to the last byte on disk, hashes for the manifest (import) or
  checksums compared (export) included.
- *verify*: every tensor bit for bit, then the logits of 64 tokens at four depths in fp32, ours and
  those of transformers; the start of transformers is in it.
- *peak*: largest resident memory of the process (VmHWM), of which the programs alone take the
  *start*.
- *bound*: two largest tensors + 600 MB.
"""


def model_row(model: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one model from its rounds."""
    row: dict[str, Any] = {
        "bytes": model["bytes"],
        "largest_bytes": model["largest_bytes"],
        "rounds": len(model["rounds"]),
        "bound_bytes": 2 * model["largest_bytes"] + MEMORY_BOUND_BYTES,
    }
    for verb in ("import", "export"):
        runs = [one[verb] for one in model["rounds"]]
        row[verb] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "plain_seconds": statistics.median(
                one[f"plain beside {verb}"]["seconds"] for one in model["rounds"]
            ),
            "ratio": statistics.median(
                one[verb]["seconds"] / one[f"plain beside {verb}"]["seconds"]
                for one in model["rounds"]
            ),
            "start_bytes": max(run["imported_bytes"] for run in runs),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "verify_seconds": statistics.median(
                run["verify_seconds"] for run in runs if "verify_seconds" in run
            ),
            "verify_peak_bytes": max(
                run["verify_peak_bytes"] for run in runs if "verify_peak_bytes" in run
            ),
        }
    return row


def verdicts(rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Return the targets and whether they hold."""
    sides = [(row, row[verb]) for row in rows.values() for verb in ("import", "export")]
    peaks = {
        verb: [
            max(row[verb]["peak_bytes"], row[verb]["verify_peak_bytes"]) for row in rows.values()
        ]
        for verb in ("import", "export")
    }
    return {
        f"a conversion takes at most {TIME_BOUND} x plain reading and writing": all(
            side["ratio"] <= TIME_BOUND for _, side in sides
        ),
        "peak memory, verified, is at most two largest tensors + 600 MB": all(
            max(side["peak_bytes"], side["verify_peak_bytes"]) <= row["bound_bytes"]
            for row, side in sides
        ),
        "peak memory does not grow with the model": all(
            max(values) - min(values) <= FLAT_BYTES for values in peaks.values()
        ),
    }


def write_convert_page(
    models: dict[str, dict[str, Any]], folder: Path, facts: dict[str, str]
) -> str:
    """Write the page and its numbers; return the page.

    ``models`` holds what was measured of each model, by name.
    """
    rows = {name: model_row(model) for name, model in models.items()}
    targets = verdicts(rows)
    lines = [
        *page_head("Converting: time and memory", "what conversions cost in time and memory"),
        OPENING,
        *bullets(facts),
        "",
        *verdict_lines(targets),
        "",
        "## Time",
        "",
        *table(
            [
                "model",
                "direction",
                "MB",
                "convert, s",
                "plain, s",
                "convert / plain",
                "rounds",
                "verify, s",
            ],
            [
                [
                    name,
                    verb,
                    f"{row['bytes'] / 1e6:,.0f}",
                    f"{row[verb]['seconds']:.1f}",
                    f"{row[verb]['plain_seconds']:.1f}",
                    f"{row[verb]['ratio']:.2f}",
                    str(row["rounds"]),
                    f"{row[verb]['verify_seconds']:.1f}",
                ]
                for name, row in rows.items()
                for verb in ("import", "export")
            ],
        ),
        "## Memory, MB",
        "",
        *table(
            [
                "model",
                "direction",
                "start",
                "peak of converting",
                "peak of verifying",
                "largest tensor",
                "bound",
            ],
            [
                [
                    name,
                    verb,
                    *(
                        f"{row[verb][part] / 1e6:,.0f}"
                        for part in ("start_bytes", "peak_bytes", "verify_peak_bytes")
                    ),
                    *(f"{row[part] / 1e6:,.0f}" for part in ("largest_bytes", "bound_bytes")),
                ]
                for name, row in rows.items()
                for verb in ("import", "export")
            ],
        ),
        TERMS,
    ]
    return write_page(
        folder,
        "convert",
        "\n".join(lines),
        {**facts, "holds": targets, "rows": rows, "runs": models},
    )
