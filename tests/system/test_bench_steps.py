"""Every trainer that tools/bench.py compares really takes steps, of as many operations as the page says."""

import pytest

from lab.benchmarks.cases import Case, case_settings
from lab.benchmarks.flops import step_attention_flops, step_flops
from lab.benchmarks.worker import StepWorker


@pytest.mark.parametrize(
    "case", [Case("plain", 0), Case("ours", 1), Case("eager", 1)], ids=lambda case: case.name
)
def test_a_trainer_takes_steps(case):
    worker = StepWorker("B", case, "cpu", False, 1)
    assert worker.answer() == "ready"
    worker.ask("step")
    seconds, _ = worker.answer()
    assert seconds > 0
    if (
        case.kind == "ours"
    ):  # torch's counter refuses the gradients that an exit asks for in backward
        return worker.stop()
    worker.ask("flops")
    counted, settings = worker.answer(), case_settings("B", case, "cpu", False)
    # torch's counter knows attention's products in some versions only; nothing else is missing, nothing is there twice
    expected = step_flops(settings, case.num_exits + 1)
    assert (
        expected - step_attention_flops(settings) <= counted * 1.001 and counted <= expected * 1.34
    )
    return worker.stop()
