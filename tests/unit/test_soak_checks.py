"""Each check of a soak finds the fault that it is there for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from lab.reliability.soak.alone import Written
from lab.reliability.soak.bad_bodies import BadRequest
from lab.reliability.soak.checks import Bounds, all_checks
from lab.reliability.soak.client import LEAVES, Answer, Leave
from lab.reliability.soak.load import Outcome, Seen
from lab.reliability.soak.page import page
from lab.reliability.soak.requests import COMPLETIONS, pooled
from lab.reliability.soak.served import ProcessUsage

REQUEST = pooled(COMPLETIONS, prompt="a", max_tokens=3)
WRITTEN = Written((("one two", "stop"),), 2, {"4": 2})
USAGE = {"completion_tokens": 2, "prompt_tokens": 1, "depths": {"4": 2}}
ALONE = SimpleNamespace(of=lambda _: WRITTEN, written={REQUEST: WRITTEN})
BAD = BadRequest("bad", b"", 400, "is wrong")
STREAM = {"content-type": "text/event-stream; charset=utf-8"}
IDLE = ProcessUsage(100.0, 10, 5)


def finished(**more) -> Answer:
    answer = Answer(200, {0: "one two"}, {0: "stop"}, USAGE, "", 0.5, 1.0, True, True, STREAM)
    return replace(answer, **more)


def seen(**more) -> Seen:
    """Return what clients saw of a server without a fault: two answers, one beginning."""
    left = Answer(200, {0: "one t"}, {}, None, "", 0.5, 0.6, False, True)
    after = {
        "requests_finished": 2,
        "requests_cancelled": 1,
        "requests_refused": 0,
        "requests_failed": 0,
        "generated_tokens": 6,
        "texts_running": 0,
    }
    values = {
        "outcomes": [Outcome(REQUEST, None, finished()), Outcome(REQUEST, Leave(LEAVES[2]), left)],
        "probes": [Outcome(REQUEST, None, finished())],
        "refused": [(BAD, Answer(400, message="it is wrong.", is_complete=True))],
        "health": [0.1],
        "usage": [IDLE, ProcessUsage(110.0, 70, 5)],
        "before": dict.fromkeys(after, 0),
        "after": after,
        "idle": IDLE,
        "settled": IDLE,
    }
    return Seen(**(values | more))


def faulty(one: Seen, log: str = "", exact: bool = False) -> list[str]:
    return [
        check.name for check in all_checks(one, ALONE, Bounds(5, 2), log, exact) if check.faults
    ]


def test_a_server_without_a_fault_passes():
    assert faulty(seen()) == []


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"texts": {0: "one too"}}, "text"),
        ({"texts": {}}, "text"),
        ({"texts": {0: "one two", 1: "three"}}, "text"),
        ({"ends": {0: "length"}}, "text"),
        ({"usage": USAGE | {"depths": {"1": 2}}}, "text"),
        ({"usage": USAGE | {"completion_tokens": 3}}, "text"),
        ({"status": 503, "message": "busy"}, "text"),
        ({"is_complete": False}, "text"),
        ({"first_seconds": 6.0}, "waits"),
    ],
)
def test_a_wrong_answer_is_reported(more, word):
    outcomes = [Outcome(REQUEST, None, finished(**more)), *seen().outcomes[1:]]
    assert word in " ".join(faulty(seen(outcomes=outcomes)))


def test_a_beginning_that_is_another_ones_is_reported():
    left = Answer(200, {0: "two"}, {}, None, "", 0.5, 0.6, False, True)
    outcomes = [seen().outcomes[0], Outcome(REQUEST, Leave(LEAVES[2]), left)]
    assert faulty(seen(outcomes=outcomes)) == ["every text is the one written alone"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"refused": [(BAD, Answer(500, message="it is wrong."))]}, "4xx"),
        ({"refused": [(BAD, Answer(400, message="it is not."))]}, "4xx"),
        ({"probes": [Outcome(REQUEST, None, finished(first_seconds=3.0))]}, "waits"),
        ({"health": [0.1, float("inf")]}, "health"),
        ({"health": []}, "health"),
        ({"settled": ProcessUsage(150.0, 10, 5)}, "memory"),
        ({"settled": ProcessUsage(100.0, 30, 5)}, "open file"),
        ({"settled": ProcessUsage(100.0, 10, 70)}, "thread"),
        ({"after": seen().after | {"texts_running": 1}}, "nothing is left"),
        ({"after": seen().after | {"requests_failed": 1}}, "counts"),
        ({"after": seen().after | {"requests_finished": 1}}, "counts"),
        ({"after": seen().after | {"requests_cancelled": 0}}, "counts"),
        ({"after": seen().after | {"generated_tokens": 8}}, "counts"),
        ({"after": seen().after | {"generated_tokens": 3}}, "counts"),
    ],
)
def test_a_fault_of_the_server_is_reported(more, word):
    reported = faulty(seen(**more))
    assert word in " ".join(reported) and len(reported) == 1


@pytest.mark.parametrize("name", ["requests_finished", "requests_cancelled", "nothing"])
def test_a_client_that_leaves_early_may_be_counted_or_not(name):
    outcomes = [seen().outcomes[0], Outcome(REQUEST, Leave(LEAVES[1]), Answer(reached=True))]
    after = seen().after | {"requests_cancelled": 0}
    after[name] = after.get(name, 0) + 1
    assert faulty(seen(outcomes=outcomes, after=after)) == []


def test_kept_texts_may_fill_their_budget():
    after = seen().after | {"cache_bytes_kept": 50e6}
    assert faulty(seen(after=after, settled=ProcessUsage(150.0, 10, 5))) == []


def test_a_traceback_and_counts_that_are_not_exact_are_reported():
    assert len(faulty(seen(), log="Traceback (most recent call last):")) == 1
    stayed = seen(outcomes=seen().outcomes[:1])
    assert faulty(stayed, exact=True) == ["/metrics counts what the clients counted"]
    counts = seen().after | {"requests_cancelled": 0, "generated_tokens": 4}
    assert faulty(replace(stayed, after=counts), exact=True) == []


def test_the_page_shows_what_holds_and_what_does_not():
    good, bad = seen(seconds=10.0), seen(seconds=10.0, health=[9.0])
    parts = [(name, one, all_checks(one, ALONE, Bounds(5, 2), "")) for name, one in
             (("First", good), ("Then", bad))]  # fmt: skip
    text = page("python -m lab.soak_serving", "1 thread", parts)
    first, then = text.split("## Then")
    assert "| NO |" not in first and then.count("| NO |") == 1 and "- 9.00 s" in then
    assert "1 after some text" in first and "\n\n\n" not in text
