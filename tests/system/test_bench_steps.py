"""Every trainer that lab/bench.py compares takes steps of the stated number of operations."""

import pytest

from lab.benchmarks.cases import Case, case_settings
from lab.benchmarks.flops import step_attention_flops, step_flops
from lab.benchmarks.worker import Worker, serve_case


@pytest.mark.parametrize(
    "case", [Case("plain", 0), Case("ours", 1), Case("eager", 1)], ids=lambda case: case.name
)
def test_a_trainer_takes_steps(case):
    worker = Worker(case.name, serve_case, "B", case, "cpu", False, 1)
    assert worker.answer() == "ready"
    cost = worker.step()
    assert cost.seconds > 0 and cost.peak_bytes > 0
    if case.kind == "ours":  # torch's counter refuses the gradients an exit computes in backward
        return worker.stop()
    worker.request("flops")
    counted, settings = worker.answer(), case_settings("B", case, "cpu", False)
    # Some versions of torch's counter do not know attention's products; others are counted once.
    expected = step_flops(settings, case.num_exits + 1)
    assert (
        expected - step_attention_flops(settings) <= counted * 1.001 and counted <= expected * 1.34
    )
    return worker.stop()
