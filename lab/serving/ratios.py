"""How far servers are ahead of vLLM alone, by the number of clients: tables of the page."""

import textwrap
from collections.abc import Callable, Sequence

from lab.contests.rounds import Row
from lab.contests.summary import Spread, names_of
from lab.serving.rows import efficiency, rows_of, speed
from lab.serving.vllm_servers import BY_LOAD, PLUG_IN, VLLM
from megatron_sorted.reporting.markdown import table

FEW = 1
WANTED_ALONE, WANTED_ALWAYS = 1.3, 0.97
"""What the plug-in is to reach over vLLM alone: with one client, and at every load."""


def ratio_of(
    rows: Sequence[Row], name: str, case: int, value: Callable[[Row], float]
) -> Spread | None:
    """Return how far a contender is ahead of vLLM alone, within rounds; None without both."""
    both = [
        {row["round"]: value(row) for row in rows_of(rows, name=one, case=case)}
        for one in (name, VLLM)
    ]
    shared = both[0].keys() & both[1].keys()
    return Spread.of(both[0][number] / both[1][number] for number in shared) if shared else None


def engine_lines(rows: Sequence[Row]) -> list[str]:
    """Return tables of all contenders over vLLM alone, where the plug-in takes part."""
    if not rows_of(rows, engine=PLUG_IN):
        return []
    cases, lines = sorted({row["case"] for row in rows}), []
    heads = [f"{case} client" + "s" * (case > 1) for case in cases]
    for what, value in (("Tokens/s", speed), ("Tokens/CPU s", efficiency)):
        cells = []
        for name in names_of(rows):
            ratios = [ratio_of(rows, name, case, value) for case in cases]
            cells.append(
                [
                    name,
                    *("" if one is None else f"{one.median:.2f} ({one.least:.2f} to {one.most:.2f})"
                      for one in ratios),
                ]
            )  # fmt: skip
        lines += [f"{what} over those of {VLLM} alone in the same round:", "", *table(
            ["contender", *heads], cells)]  # fmt: skip
    return lines + target_lines(rows, cases)


def target_lines(rows: Sequence[Row], cases: Sequence[int]) -> list[str]:
    """Return the sentence that compares the plug-in's drafts by load with what was wanted."""
    by_load = [name for name in names_of(rows) if name.endswith(BY_LOAD)]
    parts = []
    for name in by_load:
        ratios = {case: ratio_of(rows, name, case, speed) for case in cases}
        medians = {case: one.median for case, one in ratios.items() if one is not None}
        if FEW in medians:
            met = "met" if medians[FEW] >= WANTED_ALONE else "missed"
            parts.append(
                f"{medians[FEW]:.2f} times vLLM alone with {FEW} client (wanted: "
                f"{WANTED_ALONE:g}; {met})"
            )
        if medians:
            least = min(medians.values())
            met = "met" if least >= WANTED_ALWAYS else "missed"
            parts.append(
                f"{least:.2f} at the load where it gains least (wanted: {WANTED_ALWAYS:g}; {met})"
            )
    if not parts:
        return []
    return [*textwrap.wrap(f"**{PLUG_IN}, {BY_LOAD}: {', '.join(parts)}.**", 100), ""]
