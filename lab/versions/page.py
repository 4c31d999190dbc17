"""The page of results by version of megatron-core."""

from pathlib import Path
from typing import Any

from lab.benchmarks.pages import bullets, write_page
from lab.versions.checkpoints import LAYOUTS, SAVED
from lab.versions.fine_tuning import LAYOUT, STEPS
from lab.versions.rows import FAILED, NOT_RUN, PASSED, totals
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.reporting.markdown import table

NAME = "megatron_versions"
KINDS = (PASSED, FAILED, NOT_RUN)
HEAD = """\
# Results by version of megatron-core

> **What this is for**: which tests passed under which version, and whether versions read each
> other's checkpoints. **Read first**: [Versions of megatron-core](../megatron_versions.md).
"""
TESTS = """\
## Tests

Passed / failed / not run, with every row of the long tables (as in `make test-all`). Rows compare
with plain PyTorch on one process, and bit for bit after a checkpoint."""
CHECKPOINTS = """\
## Checkpoints of each version continued under each other

A run of 6 steps is stopped after step 3 and continued under another version. Weights and moments of
Adam are compared bit for bit: in the same layout ({same}) with the run that was not interrupted; in
another layout ({other}) with the same change of layout under the version that saved. Dropout is on,
and exits are drawn. A row is the version that saved, a column the version that continued; a cell
says whether the ends are equal in the same and in the other layout."""
FINE_TUNING = """\
## Fine-tuning of {title}

{steps} steps of nested fine-tuning from a trained model ({model}), {layout}, exported to a Hugging
Face directory. Shown are losses of the last exit, the last gradient norm and the first digits of
model.safetensors' hash; compared are all losses of all exits, all gradient norms, digit for digit,
and the hash."""


def _tests(tests: dict[str, dict[str, Any]]) -> list[str]:
    """Return the section on tests: ``tests`` holds sessions by version and place."""
    places = list(dict.fromkeys(place for sessions in tests.values() for place in sessions))
    rows: list[list[str]] = []
    for place in places:
        sums = [totals(sessions[place]) for sessions in tests.values()]
        cells = [" / ".join(f"{sums_[kind]:,}" for kind in KINDS) for sums_ in sums]
        rows.append([f"`{place}`", *cells])
    minutes = [sum(one["seconds"] for one in sessions.values()) / 60 for sessions in tests.values()]
    rows.append(["minutes", *(f"{value:.0f}" for value in minutes)])
    notes = [
        f"- {version}, {file}: {note}"
        for version, sessions in tests.items()
        for session in sessions.values()
        for file, counts in session["files"].items()
        for note in (
            *(f"failed: {name}" for name in counts["names"]),
            *(f"{number} not run: {reason}" for reason, number in counts["reasons"].items()),
        )
    ]
    return [TESTS, "", *table(["tests", *tests], rows), *notes, *([""] if notes else [])]


def _checkpoints(result: dict[str, Any]) -> list[str]:
    hashes = result["hashes"]
    equal = {
        (pair["saved by"], pair["continued by"], pair["layout"]): pair["equal"]
        for pair in result["pairs"]
    }
    versions = list(dict.fromkeys(pair["saved by"] for pair in result["pairs"]))

    def cell(saved: str, version: str) -> str:
        states = ["equal" if equal[saved, version, layout] else "DIFFERENT" for layout in LAYOUTS]
        return ", ".join(states)

    rows = [[saved, *(cell(saved, version) for version in versions)] for saved in versions]
    same = {hashes[version]["hash"] for version in versions}
    other = {hashes[f"{version} under {version}, other"]["hash"] for version in versions}
    return [
        CHECKPOINTS.format(same=SAVED[0], other=LAYOUTS["other"][0]),
        "",
        *table(["saved by", *versions], rows),
        f"A checkpoint holds {hashes[versions[0]]['tensors']} tensors. The {len(versions)} "
        f"uninterrupted runs end in {_states(same)}, the {len(versions)} changes of layout alone in"
        f" {_states(other)}.",
        "",
    ]


def _states(hashes: set[str]) -> str:
    return "one and the same state" if len(hashes) == 1 else f"{len(hashes)} different states"


def _fine_tuning(result: dict[str, Any]) -> list[str]:
    versions, rows = result["versions"], []
    first = next(iter(versions.values()))
    for version, this in versions.items():
        start, end = this["steps"][0], this["steps"][-1]
        last_exit = list(start["losses"])[-1]
        rows.append([
            version,
            *(repr(step["losses"][last_exit]) for step in (start, end)),
            repr(end["gradient norm"]),
            this["sha256"][:16],
            "yes" if this == first else "NO",
        ])  # fmt: skip
    heads = ["version", "loss, step 1", f"loss, step {STEPS}", "gradient norm", "sha256"]
    own = "a small one that is trained on sums first"
    return [
        FINE_TUNING.format(
            steps=STEPS, model=result["model"] or own, layout=LAYOUT,
            title=result["model"] or "a model trained here",
        ),
        "",
        *table([*heads, "all equal"], rows),
    ]  # fmt: skip


SECTIONS = {"checkpoints": _checkpoints, "fine-tuning": _fine_tuning, "tests": _tests}
"""Kind of part -> its section; the kind is the first word of a part's name."""


def write_results(folder: Path, name: str, facts: dict[str, str], result: Any) -> str:
    """Put one part's result on the page and into its numbers; return the page.

    Parts that were run before, and are not run now, stay as they are, with their own facts.
    """
    path = folder / f"{NAME}.json"
    parts = read_json_object(path) if path.is_file() else {}
    parts[name] = {"facts": facts, "result": result}
    parts = dict(sorted(parts.items(), reverse=True))  # tests first
    lines = [HEAD]
    for part, content in parts.items():
        lines += SECTIONS[part.split()[0]](content["result"])
        lines += [*bullets(content["facts"]), ""]
    return write_page(folder, NAME, "\n".join(lines).rstrip() + "\n", parts)
