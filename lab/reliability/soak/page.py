"""The page of a soak."""

from collections import Counter
from collections.abc import Sequence

from lab.reliability.soak.checks import Check
from lab.reliability.soak.load import Seen
from lab.results.pages import page_head
from megatron_sorted.reporting.markdown import facts, table

ROWS = 12
"""Number of rows of the table of memory."""


def page(command: str, setting: str, phases: Sequence[tuple[str, Seen, list[Check]]]) -> str:
    """Return the page.

    Args:
        command: The command that was run.
        setting: How the machine was used.
        phases: Name of each part, what was seen in it, and its checks.
    """
    lines = page_head(
        "A soak of the server",
        "whether the server's texts are those written alone, and what it leaves behind, under "
        "many clients that come and leave",
        "[the server](../serving.md)",
    )
    lines += [*facts(setting), f"- command: `{command}`", ""]
    for name, seen, checks in phases:
        lines += [f"## {name}", "", *_summary(seen), ""]
        rows = [[one.name, "yes" if not one.faults else "NO", one.figures] for one in checks]
        lines += table(["what must hold", "holds", "figures"], rows)
        faults = [fault for one in checks for fault in one.faults]
        lines += ["", *(f"- {fault}" for fault in faults), ""] if faults else [""]
        lines += [*_memory(seen), ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(seen: Seen) -> list[str]:
    """Return what the clients did, in words."""
    moments = Counter(
        one.leave.moment for one in seen.outcomes if one.leave and not one.answer.is_complete
    )
    left = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items())) or "none"
    tokens, layers = seen.num_of("generated_tokens"), seen.num_of("layers_run")
    return [
        f"{len(seen.outcomes)} requests in {seen.seconds:.0f} s, {tokens:.0f} new tokens "
        f"({tokens / seen.seconds:.0f} a second), {layers:.0f} layers, {seen.num_of('rounds'):.0f} "
        f"joined passes, {seen.num_of('cached_tokens'):.0f} of "
        f"{seen.num_of('prompt_tokens'):.0f} prompt tokens kept from earlier texts. Clients that "
        f"left: {left}."
    ]


def _memory(seen: Seen) -> list[str]:
    """Return the table of what the server used."""
    step = max(1, -(-len(seen.usage) // ROWS))
    rows = [
        [f"{second}", f"{usage.memory:.0f}", f"{usage.files}", f"{usage.threads}"]
        for second, usage in list(enumerate(seen.usage))[::step]
    ]
    return table(["second", "memory, MB", "open files", "threads"], rows)
