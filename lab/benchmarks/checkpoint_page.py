"""The page docs/benchmarks/run_checkpoint.md."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.benchmarks.jobs import CaseResult, load_of
from lab.benchmarks.pages import bullets, origin, write_page
from lab.benchmarks.run_numbers import checkpoint_row
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import table
from megatron_sorted.settings.costs import sub_model_parameters
from megatron_sorted.settings.run import Settings

OPENING = """\
Real runs on gloo, fp32 with Adam, one thread a process. Every save is hashed while it is written,
flushed to disk, read back and compared (--verify-checkpoint, the default) unless stated. Bounds
and megatron-core's own save are measured in the same processes, in turns with ours; ratios are
medians of ratios within a round; of several ranks the slowest counts.
"""
TERMS = """\
- *in the background*: while training continues, from the call to the tracker.
- *held up*: the whole of the loop's call of a save in the background; *reported* is the time in
  the line "saved ..." (`SaveOutcome.stall_seconds`). *first*: the first save of a process also
  allocates host memory for its copies and has Megatron check the state dict over all ranks.
- *steps beside a save*: median step while a save is written over the median step between two saves
  of the same run, in turns, the time held up left out; in brackets the number of each.
- *all parts*: hash + write and flush + read + hash, one after another. With two ranks each does
  half of the bytes, at the same time; in the save itself the first data parallel rank writes the
  weights, of which all have copies, and every one its part of the optimizer's state.
- *load*: from looking for the newest checkpoint to continuing from it; files out of the page
  cache, optimizer state empty as at a start.
"""
READING = """\
## Reading

A save in the foreground is bound by writing and flushing; then come hashing, and reading back with
its hash, all on one thread a rank, so that the parts add up: what is above 1 in *save / all parts*
is torch's planning and serialisation. Training is held up by a copy in host memory and by one pass
over the weights for numbers that are not finite. The distributed optimizer's state holds the
weights once more (16 bytes a parameter instead of 12), as Megatron's own form of it does. Steps
beside a save are slower by what the writing thread takes of cores and memory bus; with as many
processes as cores it takes a core from one of them. megatron-core starts writing processes at
every save and a server process at the first, which costs seconds before a byte is written and
dominates small checkpoints. A load is bound by reading; verifying reads and hashes the files once
before that, after which they come from memory where they fit.
"""


def parameters_of(settings: dict[str, Any]) -> int:
    """Return the parameters of the whole model of a case."""
    plain = replace(
        Settings(),
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        },
    )
    return sub_model_parameters(plain, plain.vocab_size)[plain.num_layers]


def _saving(rows: dict[str, dict[str, Any]]) -> list[str]:
    return table(
        [
            "run",
            "MB",
            "bytes a parameter",
            "foreground, s",
            "not read back, s",
            "in the background, s",
            "held up, first, ms",
            "held up, later, ms",
            "reported, later, ms",
            "steps beside a save",
        ],
        [
            [
                name,
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['bytes_a_parameter']:.2f}",
                f"{row['save']:.2f}",
                f"{row['save_unverified']:.2f}",
                f"{row['background']:.2f}",
                f"{1e3 * row['held_first']:,.0f}",
                f"{1e3 * row['held']:,.0f}",
                f"{1e3 * row['stall']:,.0f}",
                f"{'-' if row['slowdown'] is None else format(row['slowdown'], '.2f')}"
                f" ({row['saving_steps']} / {row['quiet_steps']})",
            ]
            for name, row in rows.items()
        ],
    )


def _bounds(rows: dict[str, dict[str, Any]]) -> list[str]:
    return table(
        [
            "run",
            "write and flush, s",
            "read, s",
            "sha256, s",
            "memcpy, s",
            "save / write",
            "not read back / write",
            "save / all parts",
            "held up, later / memcpy",
        ],
        [
            [
                name,
                *(
                    f"{row['bounds'][part]:.{digits}f}"
                    for part, digits in (("write", 2), ("read", 2), ("sha256", 2), ("memcpy", 3))
                ),
                f"{row['save_over_write']:.2f}",
                f"{row['unverified_over_write']:.2f}",
                f"{row['save_over_bounds']:.2f}",
                f"{row['held_over_memcpy']:.1f}",
            ]
            for name, row in rows.items()
        ],
    )


def _core(rows: dict[str, dict[str, Any]]) -> list[str]:
    return table(
        [
            "run",
            "first call, s",
            "later, s",
            "later / write",
            "ours / its later",
            "ours, not read back / its later",
        ],
        [
            [
                name,
                f"{row['core_first']:.2f}",
                "-" if row["core"] is None else f"{row['core']:.2f}",
                *(
                    "-" if row[ratio] is None else f"{row[ratio]:.2f}"
                    for ratio in ("core_over_write", "over_core", "unverified_over_core")
                ),
            ]
            for name, row in rows.items()
        ],
    )


def _loading(rows: dict[str, dict[str, Any]]) -> list[str]:
    return table(
        ["run", "with --verify-checkpoint, s", "without, s", "without / (read + memcpy)", "rounds"],
        [
            [
                name,
                f"{row['load']:.2f}",
                f"{row['load_unverified']:.2f}",
                f"{row['load_over_bound']:.2f}",
                str(row["rounds"]),
            ]
            for name, row in rows.items()
        ],
    )


def write_checkpoint_page(results: list[CaseResult], folder: Path, disk: str) -> str:
    """Write the page on checkpoints and its numbers; return the page.

    ``disk`` describes the file system that the checkpoints were written to.
    """
    facts = {**origin("cpu", 1, bf16=False), **load_of(results), "file system": disk}
    rows = {}
    for result in results:
        parameters = parameters_of(result.case.settings)
        rows[f"{parameters / 1e6:.1f} M, {result.case.layout}"] = checkpoint_row(
            result.ranks, parameters
        )
    lines = [
        *page_head(
            "Checkpoints of a run: time, size, and what training feels of them",
            "what checkpoints cost",
        ),
        OPENING,
        *bullets(facts),
        "",
        "## Saving",
        "",
        *_saving(rows),
        "## Beside what the machine needs for the same bytes",
        "",
        *_bounds(rows),
        "## Beside megatron-core's own save",
        "",
        "`dist_checkpointing.save` of the same state, synchronous; no hashes, nothing read back.",
        "",
        *_core(rows),
        "## Loading",
        "",
        *_loading(rows),
        TERMS,
        READING,
    ]
    numbers = {**facts, "rows": rows, "runs": [result.as_dict() for result in results]}
    return write_page(folder, "run_checkpoint", "\n".join(lines), numbers)
