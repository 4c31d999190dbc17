"""Step numbers of wandb's rows, and errors without keys."""

from megatron_sorted.monitoring.wandb_process import StepNumbers, reason_of


def test_steps_are_iterations_while_these_go_forward(tmp_path):
    steps = StepNumbers(tmp_path / "next", 0)
    assert [steps.of(iteration) for iteration in (0, 10, 10, 20, 25)] == [0, 10, 10, 20, 25]


def test_repeated_iterations_get_the_next_free_steps(tmp_path):
    first = StepNumbers(tmp_path / "next", 0)
    assert [first.of(iteration) for iteration in (10, 20, 30)] == [10, 20, 30]
    # continued from 10, reports at 12 and then every 10; another kill; continued from 30
    second = StepNumbers(tmp_path / "next", 0)
    assert [second.of(iteration) for iteration in (12, 20, 20, 30, 40)] == [31, 32, 32, 33, 40]
    third = StepNumbers(tmp_path / "next", 0)
    assert [third.of(iteration) for iteration in (31, 32, 42)] == [41, 42, 43]


def test_the_server_may_know_more_than_the_file(tmp_path):
    (tmp_path / "next").write_text("7\n")
    assert StepNumbers(tmp_path / "next", 100).of(5) == 100
    (tmp_path / "next").write_text("")  # a kill in the middle of writing it
    assert StepNumbers(tmp_path / "next", 3).of(1) == 3


def test_reasons_are_one_line_without_keys(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret0123")
    error = RuntimeError("no\n  route  secret0123 to https://user:pass@host/x?key=secret0123")
    assert reason_of(error) == "no route *** to https://***@host/x?key=***"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert len(reason_of(RuntimeError("x" * 1000))) == 300
