"""What a soak must show, checked on what the clients saw."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lab.reliability.soak.alone import Alone
from lab.reliability.soak.load import Outcome, Seen

MOST_HEALTH_SECONDS = 5.0
MEMORY_SLACK, MEMORY_SHARE = 32.0, 0.05
"""Megabytes, or the share, by which memory may grow from a quarter of the time to the end."""
SLACK = 8
"""Files and threads that may be left: a connection of the checks, threads kept for work."""
EXAMPLES = 5


@dataclass(frozen=True)
class Bounds:
    """Limits that are given to a soak.

    Attributes:
        wait_seconds: Longest time to the first text of a stream.
        probe_seconds: The same for small requests.
    """

    wait_seconds: float
    probe_seconds: float


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What must hold.
        found: What was figures.
        faults: What did not hold; empty if all did.
    """

    name: str
    figures: str
    faults: tuple[str, ...] = ()


def all_checks(
    seen: Seen, alone: Alone, bounds: Bounds, log: str, exact: bool = False
) -> list[Check]:
    """Return all checks; where every request was sent once, the counts are ``exact``."""
    return [
        check_texts([*seen.outcomes, *seen.probes], alone),
        check_refusals(seen),
        check_waits(seen, bounds),
        check_health(seen),
        check_counts(seen, exact),
        check_idle(seen),
        *([] if exact else [check_memory(seen)]),  # the first time fills what is reused
        check_files(seen),
        _check("the server's log has no traceback", "", ["Traceback"] * log.count("Traceback")),
    ]


def _check(name: str, figures: str, faults: Sequence[str]) -> Check:
    more = [f"and {len(faults) - EXAMPLES} more"] if len(faults) > EXAMPLES else []
    return Check(name, figures, (*faults[:EXAMPLES], *more))


def check_texts(outcomes: Iterable[Outcome], alone: Alone) -> Check:
    """Check that every finished text is the one written alone, and every other its beginning."""
    faults, counts = [], Counter()
    for outcome in outcomes:
        if outcome.leave is not None and not outcome.answer.is_complete:
            counts["left"] += 1
            counts["beginnings"] += any(outcome.answer.texts.values())
            faults += _fault_of_beginning(outcome, alone)
        else:
            counts["finished"] += 1
            counts["texts"] += len(outcome.answer.texts)
            counts["tokens"] += (outcome.answer.usage or {}).get("completion_tokens", 0)
            faults += _fault_of_texts(outcome, alone)
    figures = (
        f"{counts['texts']} texts of {counts['finished']} answers, {counts['tokens']} tokens, "
        f"{len(alone.written)} different requests; {counts['left']} clients left, "
        f"{counts['beginnings']} of them with the beginning of a text"
    )
    return _check("every text is the one written alone", figures, faults)


def _fault_of_texts(outcome: Outcome, alone: Alone) -> list[str]:
    answer, request = outcome.answer, outcome.request
    if answer.status != 200 or not answer.is_complete:
        end = "complete" if answer.is_complete else "cut off"
        return [f"{request}: status {answer.status}, {end}, {answer.message}"]
    written, usage = alone.of(request), answer.usage or {}
    indexes = range(len(written.texts))
    got = tuple((answer.texts.get(index, ""), answer.ends.get(index)) for index in indexes)
    if got != written.texts or len(answer.texts) > len(written.texts):
        return [f"{request}: {got} is not {written.texts}"]
    if usage.get("completion_tokens") != written.num_tokens:
        return [f"{request}: usage {usage} is not of {written.num_tokens} tokens"]
    if written.depths is not None and usage.get("depths", written.depths) != written.depths:
        return [f"{request}: depths {usage['depths']} are not {written.depths}"]
    return []


def _fault_of_beginning(outcome: Outcome, alone: Alone) -> list[str]:
    if not any(outcome.answer.texts.values()):
        return []
    texts = alone.of(outcome.request).texts
    return [
        f"{outcome.request}: {text!r} does not begin {texts[index][0]!r}"
        for index, text in outcome.answer.texts.items()
        if not texts[index][0].startswith(text)
    ]


def check_refusals(seen: Seen) -> Check:
    """Check that every bad request got its status and its message."""
    faults = [
        f"{bad.name}: status {answer.status}: {answer.message[:200]}"
        for bad, answer in seen.refused
        if answer.status != bad.status or bad.says not in answer.message
    ]
    kinds = len({bad.name for bad, _ in seen.refused})
    figures = f"{len(seen.refused)} bad requests of {kinds} kinds"
    return _check("every bad request gets its 4xx and its message", figures, faults)


def check_waits(seen: Seen, bounds: Bounds) -> Check:
    """Check that no one waited longer than allowed."""
    faults, figures = [], []
    for name, outcomes, most in (
        ("streams", seen.outcomes, bounds.wait_seconds),
        ("small streams", seen.probes, bounds.probe_seconds),
    ):
        # an answer that is not streamed arrives with its last text, so its time is no waiting time
        stayed = [
            one
            for one in outcomes
            if one.leave is None and one.answer.is_complete and one.answer.is_stream
        ]
        waits = sorted(one.answer.first_seconds for one in stayed)
        if not waits:
            faults.append(f"{name}: none came to its end")
            continue
        middle, late = waits[len(waits) // 2], waits[int(0.95 * (len(waits) - 1))]
        figures.append(
            f"{name}: {middle:.3f} s (median), {late:.3f} s (95 %), {waits[-1]:.3f} s (longest; "
            f"allowed {most:g} s)"
        )
        faults += [f"{one.request}: {one.answer.first_seconds:.1f} s" for one in stayed
                   if one.answer.first_seconds > most]  # fmt: skip
    return _check("no one waits longer for the first text", "; ".join(figures), faults)


def check_health(seen: Seen) -> Check:
    """Check that /health was answered throughout."""
    late = [f"{one:.2f} s" for one in seen.health if one > MOST_HEALTH_SECONDS]
    worst = max(seen.health, default=float("inf"))
    figures = f"{len(seen.health)} times, at most {worst:.2f} s (allowed {MOST_HEALTH_SECONDS:g} s)"
    return _check("/health answers throughout", figures, late if seen.health else ["never asked"])


def check_counts(seen: Seen, exact: bool) -> Check:
    """Check that /metrics counts what the clients counted."""
    outcomes = [*seen.outcomes, *seen.probes]
    done = [one for one in outcomes if one.answer.is_complete and one.answer.status == 200]
    left = [one for one in outcomes if not one.answer.is_complete and one.answer.reached]
    sums = {
        name: sum((one.answer.usage or {}).get(key, 0) for one in done)
        for name, key in (
            ("prompt_tokens", "prompt_tokens"),
            ("generated_tokens", "completion_tokens"),
        )
    }
    most_left = sum(one.request.most_tokens for one in left)
    ranges = {
        "requests_finished": (len(done), len(done) + len(left)),
        "requests_cancelled": (0, len(left)),
        "requests_refused": (0, 0),
        "requests_failed": (0, 0),
        "generated_tokens": (sums["generated_tokens"], sums["generated_tokens"] + most_left),
    }
    if exact:
        ranges = {name: (low, low) for name, (low, _) in ranges.items()}
    faults = [
        f"{name}: {seen.num_of(name):.0f} is not in {low}..{high}"
        for name, (low, high) in ranges.items()
        if not low <= seen.num_of(name) <= high
    ]
    # a client that leaves early may leave before the server has its request
    begun = sum(one.answer.status == 200 for one in left)
    ended = sum(seen.num_of(name) for name in ranges if name.startswith("requests_"))
    if not len(done) + begun <= ended <= len(done) + len(left):
        faults.append(
            f"{ended:.0f} requests ended; clients saw the end of {len(done)} and the beginning of "
            f"{begun}, and left {len(left)}"
        )
    figures = ", ".join(f"{name} {seen.num_of(name):.0f}" for name in ranges)
    return _check("/metrics counts what the clients counted", figures, faults)


def check_idle(seen: Seen) -> Check:
    """Check that nothing runs and nothing waits when all clients have left."""
    names = ("requests_waiting", "requests_running", "texts_waiting", "texts_running")
    names = (*names, "cache_bytes_running")
    faults = [f"{name}: {seen.after[name]:.0f}" for name in names if seen.after.get(name)]
    return _check("nothing is left of texts whose clients have left", "", faults)


def check_memory(seen: Seen) -> Check:
    """Check that the server's memory stays within its bound; kept texts may fill their budget."""
    sizes = [usage.memory for usage in seen.usage]
    if not sizes:
        return _check("memory is flat", "", ["never measured"])
    early, end = max(sizes[: max(1, len(sizes) // 4)]), seen.settled.memory
    kept = max(seen.num_of("cache_bytes_kept"), 0) / 1e6
    most = early + kept + max(MEMORY_SLACK, MEMORY_SHARE * early)
    figures = (
        f"{early:.0f} MB in the first quarter, at most {max(sizes):.0f} MB, {end:.0f} MB at the "
        f"end, of which new kept texts {kept:.0f} MB (allowed {most:.0f} MB)"
    )
    return _check("memory is flat", figures, [figures] if end > most else [])


def check_files(seen: Seen) -> Check:
    """Check that no open file and no thread is left over."""
    faults, figures = [], []
    for name in ("files", "threads"):
        low, end = getattr(seen.idle, name), getattr(seen.settled, name)
        most = max((getattr(usage, name) for usage in seen.usage), default=end)
        figures.append(f"{name}: {low} before, at most {most}, {end} at the end")
        faults += [figures[-1]] if end > low + SLACK else []
    return _check("no open file and no thread is left", "; ".join(figures), faults)
