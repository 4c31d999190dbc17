"""Texts that are decoded at once are those that are written alone, whatever runs beside them."""

import random
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="serving is an extra")
from megatron_sorted.decoding.batching.draft_lengths import Acceptance
from megatron_sorted.decoding.batching.options import BatchingOptions
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Fixed,
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.errors import MemoryExhaustedError
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import KINDS, needs_native, plain_network, prompts
from tests.unit.test_decoding_text_generator import Letters

STRATEGIES = (
    Full(),
    Fixed(1),
    Fixed(3),
    EarlyExit((1, 2), (0.05, 0.1)),
    SelfSpeculative(2, 5),
    SelfSpeculative(1, 12),
    SortedSpeculative((1, 3), (0.5, 0.2), 6, "margin"),
    TreeSpeculative((1, 3), (0.4,), 4, 3, 9, 1),
    TreeSpeculative((2,), (), 3, 5, 40),
)
SAMPLINGS = (
    SamplingParameters(),
    SamplingParameters(repetition_penalty=1.3),
    SamplingParameters(0.7, top_k=8, top_p=0.9, repetition_penalty=1.3, seed=4),
    SamplingParameters(1.0, seed=5),
)
ALL = [kind if kind == "torch" else pytest.param(kind, marks=needs_native) for kind in KINDS]
PATIENCE = 60


def draw(number: int) -> Job:
    """Return a random request: prompts of 1 to 150 tokens, some of which begin alike."""
    dice = random.Random(number)
    shared = prompts((150,), 100, seed=number % 3)[0]
    texts = [
        shared[: dice.choice((1, 20, 40, 90, 150))] + prompts((dice.randint(0, 9),), 100, number)[0]
        for _ in range(dice.choice((1, 1, 1, 2)))
    ]
    if dice.random() < 0.3:  # the same prompt several times, as n asks for it
        texts = [texts[0]] * 3
    return Job(texts, dice.choice(STRATEGIES), dice.choice(SAMPLINGS), dice.choice((1, 7, 30)), [])


def tokens_of(job: Job) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in job.prompts]
    for piece in job.results():
        texts[piece.row] += piece.added.tokens
    return texts


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ALL)
def test_every_text_is_the_one_written_alone(family, kind):
    """60 requests of all strategies and samplings, 9 texts at once, prompts in pieces of 16."""
    _, network = plain_network(family, kind=kind)
    options = BatchingOptions(max_num_seqs=9, prefill_tokens=16, drafts_by_load=True)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    dice, jobs = random.Random(1), [draw(number) for number in range(60)]
    for number, job in enumerate(jobs):
        worker.submit(job)
        if dice.random() < 0.2:
            time.sleep(0.01)
        if number % 7 == 3:
            jobs[dice.randrange(number)].cancel()
    for number, job in enumerate(jobs):
        texts = tokens_of(job)
        if job.cancelled.is_set():
            continue
        groups = [(row, [prompt]) for row, prompt in enumerate(job.prompts)]
        limits = Limits(job.max_new_tokens)
        for row, group in groups:
            if row:  # the noise of a row is another one
                wanted = alone(network, job, row, limits)
            else:
                wanted = [
                    text.tokens
                    for text in generate(network, group, job.strategy, job.sampling, limits)
                ]
            assert texts[row : row + len(wanted)] == wanted, (number, job.strategy, job.sampling)
    assert worker.close(PATIENCE)
    counts = worker.counts
    assert counts.requests_finished + counts.requests_cancelled == 60
    assert counts.texts_running == counts.cache_bytes_running == 0
    assert (counts.cached_tokens > 500) == (kind != "torch"), "torch keeps whole pieces alone"


def alone(network, job: Job, row: int, limits: Limits) -> list[list[int]]:
    """Return a row's text, written beside copies of itself, since its noise is that of the row."""
    same = [job.prompts[row]] * (row + 1)
    texts = generate(network, same, job.strategy, job.sampling, limits)
    return [texts[row].tokens]


def test_a_conversation_is_read_once_and_only_by_its_owner():
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))
    text = prompts((100,), 100)[0]
    cached = []
    for tenant in ("a", "a", "b", "a"):
        job = Job([list(text)], Full(), SamplingParameters(), 20, [], tenant=tenant)
        [new] = tokens_of(worker.submit(job))
        cached.append(job.cached_tokens)
        if tenant == "a":
            [wanted] = generate(network, [text], Full(), None, Limits(20))
            assert new == wanted.tokens
            text += [*new, 7, 8, 9]
    assert cached[0] == cached[2] == 0 and cached[1] >= 119 and cached[3] >= 142
    assert worker.close(PATIENCE)


@needs_native
def test_a_shallow_text_does_not_replace_the_deeper_one_that_it_continues():
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))
    [text] = prompts((100,), 100)
    cached = []
    for strategy in (Full(), Fixed(1), Full()):
        job = Job([list(text)], strategy, SamplingParameters(), 10, [])
        [new] = tokens_of(worker.submit(job))
        cached.append(job.cached_tokens)
        text += [*new, 7]
    assert cached[1] >= 109 and 100 <= cached[2] < 115, "all layers have read the first text"
    assert worker.close(PATIENCE)


def test_a_long_prompt_holds_up_no_text():
    """Between two steps of a text at most the pieces of a round are read, the prompt of all not."""
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=8)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    stream = Job(prompts((5,), 100), Full(), SamplingParameters(), 100, [])
    order = []
    stream.notify = lambda: order.append("stream")
    worker.submit(stream)
    while not order:  # a prompt alone is read in larger pieces
        time.sleep(0.001)
    before = len(order)
    long = Job(prompts((240,), 100), Full(), SamplingParameters(), 1, [])
    long.notify = lambda: order.append("long")
    worker.submit(long)
    assert len(tokens_of(stream)[0]) == 100 and len(tokens_of(long)[0]) == 1
    between = order[: order.index("long")].count("stream") - before
    assert between >= 240 // 8 - 1, "steps of the stream came between pieces of the prompt"
    assert worker.close(PATIENCE)


def test_owners_take_turns():
    _, network = plain_network("llama")
    options = BatchingOptions(max_num_seqs=1)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    order = []

    def job(tenant: str, count: int = 2) -> Job:
        made = Job(prompts((5,), 100), Full(), SamplingParameters(), count, [], tenant=tenant)
        made.notify = lambda: order.append(tenant)
        return made

    with worker.changed:  # all of them wait before the first is begun
        jobs = [job("a") for _ in range(6)] + [job("b")]
        for one in jobs:
            one.on_cancel = worker._drop
            worker.waiting.add(one)
        worker.changed.notify()
    for one in jobs:
        tokens_of(one)
    assert order.index("b") <= 6, "the one of b comes second, not last"
    assert worker.close(PATIENCE)


def test_requests_that_wait_too_long_are_refused():
    _, network = plain_network("llama")
    options = BatchingOptions(max_num_seqs=1, max_wait_seconds=50)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    first = worker.submit(Job(prompts((5,), 100), Full(), SamplingParameters(), 240, []))
    next(first.results())
    late = Job(prompts((5,), 100), Full(), SamplingParameters(), 1, [])
    worker.waiting.clock = lambda: late.waits_since + 51
    worker.submit(late)
    with pytest.raises(BusyError, match="waited 50 s"):
        list(late.results())
    first.cancel()
    assert worker.close(PATIENCE) and worker.counts.requests_refused == 1


def test_memory_is_bounded_by_the_budget():
    _, network = plain_network("llama")
    writer = TextGenerator(network, Letters())
    one = Job(prompts((30,), 100), Full(), SamplingParameters(), 30, [])
    probe = GenerationWorker(writer)
    tokens_of(probe.submit(one))
    assert probe.close(PATIENCE)
    size = probe.engine.prefixes.num_bytes * 2
    worker = GenerationWorker(writer, options=BatchingOptions(cache_bytes=2 * size - 1))
    seen = []
    jobs = [
        Job(prompts((30,), 100, seed), Full(), SamplingParameters(), 30, []) for seed in range(9)
    ]
    for job in jobs:
        job.notify = lambda: seen.append(
            worker.counts.cache_bytes_running + worker.counts.cache_bytes_kept
        )
        worker.submit(job)
    for job in jobs:
        assert len(tokens_of(job)[0]) == 30
    assert 0 < max(seen) <= 2 * size and 0 < worker.engine.prefixes.num_bytes <= 2 * size
    with pytest.raises(MemoryExhaustedError, match="--cache-memory"):
        list(
            worker.submit(Job(prompts((200,), 100), Full(), SamplingParameters(), 50, [])).results()
        )
    assert worker.close(PATIENCE)


def test_a_kept_text_takes_no_more_memory_than_its_tokens_need():
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))
    prompt = prompts((30,), 100)
    first = tokens_of(worker.submit(Job(prompt, Full(), SamplingParameters(), 1, [])))[0]
    # a text that may have 220 new tokens, and stops at the first
    stop = [Letters().decode(first)]
    tokens_of(worker.submit(Job(prompt, Full(), SamplingParameters(), 220, stop)))
    assert worker.close(PATIENCE)
    (kept,) = worker.engine.prefixes._kept.values()
    (state,) = kept.states
    assert worker.engine.prefixes.num_bytes == state.memory.num_bytes
    assert state.capacity == 64 and len(kept.tokens) == 31


@needs_native
def test_drafts_are_shorter_where_many_texts_are_written():
    _, network = plain_network("llama", kind="int8")
    from megatron_sorted.decoding.batching.draft_lengths import DraftLengths
    from megatron_sorted.decoding.tuning.costs import Costs, HostCosts

    with torch.inference_mode():
        lengths = DraftLengths(network, None, lambda: 1)
    # a pass costs the same up to 4 tokens, then in proportion
    widths = (1, 4, 64)
    times = (1.0, 1.0, 16.0)
    lengths.costs = Costs(
        widths,
        dict.fromkeys((1, 2, 3, 4), times),
        dict.fromkeys((1, 2, 3, 4), (0.0,) * 3),
        host=HostCosts(),
    )
    strategy = SelfSpeculative(1, 8)
    by_load = [lengths.best(strategy, 8, texts, 0.9) for texts in (1, 2, 4, 16)]
    assert by_load[0] >= 3 and by_load == sorted(by_load, reverse=True) and by_load[-1] == 0
    assert lengths.best(strategy, 8, 1, 0.1) == 0 or lengths.best(strategy, 8, 1, 0.1) < by_load[0]
    share = Acceptance()
    for _ in range(2000):
        share.add(4, 1)
    assert share.share == pytest.approx(0.5, abs=0.02), "one of two tokens that were tried"
