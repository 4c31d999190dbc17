"""Requests whose clients left make room for others at once."""

import threading

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from megatron_sorted.decoding.strategies import SamplingParameters
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.serving.answers import BusyError
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.worker import MAX_WAITING, GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_text_generator import Letters


class Waiting(TextGenerator):
    """A text generator that begins a text and waits for permission to end it."""

    def __init__(self):
        super().__init__(plain_network("llama")[1], Letters())
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def writing(self, *arguments):
        self.has_begun.set()
        assert self.may_end.wait(60)
        return super().writing(*arguments)


def job() -> Job:
    return Job([[1, 2]], None, SamplingParameters(), 1, [])


def test_cancelled_jobs_leave_the_queue():
    writer = Waiting()
    worker = GenerationWorker(writer)
    running = worker.submit(job())
    assert writer.has_begun.wait(60)
    waiting = [worker.submit(job()) for _ in range(MAX_WAITING)]
    with pytest.raises(BusyError):
        worker.submit(job())
    waiting[5].cancel()
    assert waiting[5].outputs.get(timeout=30) is None, (
        "its outputs end at once, before those of the jobs in front of it"
    )
    last = worker.submit(job())  # there is room again
    for one in (*waiting[:5], *waiting[6:]):
        one.cancel()
    writer.may_end.set()
    assert len(list(running.results())) == 1 and len(list(last.results())) == 1
    assert worker.close(60)
