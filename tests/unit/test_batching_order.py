"""Texts that are decoded at once do not wait for others longer than they have to."""

import time
from collections.abc import Callable

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from megatron_sorted.decoding.batching import engine as engine_module
from megatron_sorted.decoding.batching.options import BatchingOptions
from megatron_sorted.decoding.cache.joined import ForwardPass, Joined, run_joined
from megatron_sorted.decoding.generate import generate
from megatron_sorted.decoding.strategies import (
    EarlyExit,
    Full,
    SamplingParameters,
    SelfSpeculative,
    Strategy,
)
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import Limits
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.job_run import JobRun
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import needs_native, plain_network, prompts
from tests.unit.test_decoding_text_generator import Letters

PATIENCE = 60


def job_of(
    texts: list[list[int]],
    count: int,
    strategy: Strategy | None = None,
    tenant: str = "",
    notify: Callable[[], None] = lambda: None,
) -> Job:
    return Job(
        texts, strategy or Full(), SamplingParameters(), count, [], tenant=tenant, notify=notify
    )


def submit_together(worker: GenerationWorker, *jobs: Job) -> None:
    """Put jobs into the queue before the first of them is begun."""
    with worker.changed:
        for job in jobs:
            worker.submit(job)


@needs_native
def test_a_text_does_not_wait_for_layers_that_no_other_text_runs():
    """The first text leaves at exit 1, so that deeper layers never read its prompt."""
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))
    [prompt], order = prompts((100,), 100), []
    leaving = EarlyExit((1, 2), (0.0, 0.0))
    first = job_of([prompt], 60, leaving, notify=lambda: order.append("first"))
    second = job_of([prompt], 60, leaving, notify=lambda: order.append("second"))
    submit_together(worker, first, second)
    assert len(list(first.results())) == len(list(second.results())) == 60
    assert order.index("second") < 30, "both are written at once"
    assert worker.close(PATIENCE)


@needs_native
def test_a_long_prompt_is_read_while_shorter_ones_keep_coming():
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=1, prefix_caching=False)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    long, ended, most = job_of(prompts((240,), 100), 1), [], 60

    def short(number: int) -> Job:
        def ends() -> None:  # the worker itself sends the next one, so that there are always two
            if job.outputs.queue[-1] is None and number not in ended:
                ended.append(number)
                if len(ended) < most:
                    jobs.append(worker.submit(short(number + 2)))

        job = job_of(prompts((80,), 100, seed=number), 1, notify=ends)
        return job

    jobs = [short(0), short(1)]
    at_end = []
    long.notify = lambda: at_end.append(len(ended))
    submit_together(worker, long, *jobs)
    list(long.results())
    for job in jobs:
        list(job.results())
    assert at_end[0] < 30, "it has a third of all pieces"
    assert worker.close(PATIENCE)


def test_texts_of_a_draft_model_end_while_others_are_drafted():
    _, network = plain_network("llama")
    _, draft = plain_network("llama", agree=0.2)
    worker = GenerationWorker(TextGenerator(network, Letters(), draft))
    jobs = [
        job_of(
            prompts((5 + number,), 100, seed=number),
            3 + 2 * number,
            SelfSpeculative(2, 1 + number % 4),
        )
        for number in range(8)
    ]
    submit_together(worker, *jobs)
    for job in jobs:
        tokens = [token for piece in job.results() for token in piece.added.tokens]
        [wanted] = generate(network, job.prompts, Full(), None, Limits(job.max_new_tokens))
        assert tokens == wanted.tokens
    assert worker.close(PATIENCE) and worker.counts.requests_failed == 0


@pytest.mark.parametrize("is_read", [True, False], ids=["streaming", "prompt being read"])
def test_nothing_is_left_of_a_request_whose_client_has_left(is_read):
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=1)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    job = worker.submit(job_of(prompts((2 if is_read else 200,), 100), 50))
    while not (job.outputs.qsize() if is_read else worker.counts.rounds > 3):
        time.sleep(0.001)
    job.cancel()
    list(job.results())
    assert worker.close(PATIENCE)
    counts = worker.counts
    assert counts.requests_cancelled == 1
    assert counts.requests_running == counts.texts_running == counts.cache_bytes_running == 0


@needs_native
@pytest.mark.parametrize("owner", ["a", "b"], ids=["same owner", "another owner"])
def test_a_request_of_many_texts_holds_up_no_other(owner):
    _, network = plain_network("llama")
    options = BatchingOptions(max_num_seqs=2, prefix_caching=False)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    order = []
    many = job_of(prompts((5,), 100) * 40, 4, None, "a", lambda: order.append("many"))
    one = job_of(prompts((6,), 100), 4, None, owner, lambda: order.append("one"))
    submit_together(worker, many, one)
    list(many.results())
    list(one.results())
    assert order.index("one") < 80, "its turn comes after some texts of the other, not after all 40"
    assert worker.close(PATIENCE)


def test_a_fault_at_the_end_of_a_text_ends_no_other(monkeypatch):
    """The model's thread survives whatever happens while a request that was left is removed."""
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=1)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    left = worker.submit(job_of(prompts((200,), 100), 50))
    while worker.counts.rounds < 3:
        time.sleep(0.001)

    def fail(*_) -> None:
        monkeypatch.undo()
        raise RuntimeError("a defect")

    monkeypatch.setattr(worker.engine.prefixes, "keep", fail)
    left.cancel()
    other = worker.submit(job_of(prompts((3,), 100), 2))
    assert other.outputs.get(timeout=10).added.tokens
    assert worker.close(PATIENCE)


def test_a_text_that_fails_ends_those_of_its_request_and_no_other(monkeypatch):
    _, network = plain_network("llama")
    writer = TextGenerator(network, Letters())
    worker = GenerationWorker(writer)
    original, calls = writer.limits, []

    def limits(count: int, stop: list[str]) -> Limits:
        def ends(tokens: list[int]) -> str:
            calls.append(len(tokens))
            if len(calls) == 5:
                raise ValueError("a tokenizer that fails")
            return ""

        made = original(count, stop)
        return Limits(count, made.end_ids, tuple(stop), ends) if stop else made

    monkeypatch.setattr(writer, "limits", limits)
    several = Job(prompts((5, 6, 7), 100), Full(), SamplingParameters(), 20, ["never"])
    other = job_of(prompts((8,), 100), 20)
    submit_together(worker, several, other)
    with pytest.raises(ValueError, match="a tokenizer that fails"):
        list(several.results())
    assert sum(len(piece.added.tokens) for piece in other.results()) == 20
    assert worker.close(PATIENCE)
    assert worker.counts.texts_running == 0 and worker.counts.requests_failed == 1


@needs_native
def test_a_prompt_that_is_read_for_another_text_counts_as_kept():
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))
    jobs = [job_of(prompts((100,), 100), 5) for _ in range(2)]
    submit_together(worker, *jobs)
    for job in jobs:
        list(job.results())
    assert worker.close(PATIENCE)
    assert sorted(job.cached_tokens >= 99 for job in jobs) == [False, True]
    assert worker.counts.cached_tokens == sum(job.cached_tokens for job in jobs)
    assert jobs[0].layers_run > 10 * jobs[1].layers_run


def test_a_stop_reaches_a_request_that_is_just_taken_from_the_queue(monkeypatch):
    _, network = plain_network("llama")
    worker = GenerationWorker(TextGenerator(network, Letters()))

    class Stopped(JobRun):
        def __init__(self, *arguments) -> None:
            worker.stop()
            super().__init__(*arguments)

    monkeypatch.setattr("megatron_sorted.serving.worker.JobRun", Stopped)
    job = worker.submit(job_of(prompts((5,), 100), 200))
    with pytest.raises(BusyError):
        list(job.results())
    assert worker.close(PATIENCE)


@needs_native
def test_a_prompt_that_is_read_for_another_owner_is_read_again():
    """How soon a text begins would tell one owner what another one has sent."""
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=4)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    [prompt] = prompts((100,), 100)
    jobs = [job_of([prompt], 3, tenant=tenant) for tenant in ("a", "b")]
    submit_together(worker, *jobs)
    for job in jobs:
        list(job.results())
    assert [job.cached_tokens for job in jobs] == [0, 0]
    assert worker.close(PATIENCE)


def test_a_short_prompt_behind_a_long_one_is_read_beside_it(monkeypatch):
    """And all prompts together have no more tokens in a round than the option says."""
    _, network = plain_network("llama")
    options = BatchingOptions(prefill_tokens=6, prefix_caching=False)
    worker = GenerationWorker(TextGenerator(network, Letters()), options=options)
    order, read = [], []

    def run(passes: list[ForwardPass], pieces: list[int]) -> Joined:
        before = [one.num_missing for one in passes]
        joined = run_joined(passes, pieces)
        reading = [
            min(missing, piece)
            for missing, piece in zip(before, pieces, strict=True)
            if missing > 1
        ]
        if len(reading) < len(passes):  # beside a text that is being written
            read.append(sum(reading))
        return joined

    monkeypatch.setattr(engine_module, "run_joined", run)
    stream = job_of(prompts((2,), 100), 150, notify=lambda: order.append("stream"))
    worker.submit(stream)
    while not order:
        time.sleep(0.001)
    jobs = [
        job_of(prompts((size,), 100), 1, notify=lambda size=size: order.append(size))
        for size in (240, 200, 30)
    ]
    submit_together(worker, *jobs)
    for job in (stream, *jobs):
        list(job.results())
    assert order.index(30) < order.index(200) < order.index(240)
    assert max(read) == (6 if network.is_native else 240)
    assert worker.close(PATIENCE)
