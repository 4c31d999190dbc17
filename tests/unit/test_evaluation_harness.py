"""lm-evaluation-harness: errors if it is not installed, its numbers, and checks of its tasks."""

import sys

import pytest

from megatron_sorted.errors import DataError, PlatformError
from megatron_sorted.evaluation.harness import Harness, _metrics


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        PlatformError, match=r"--tasks needs lm-evaluation-harness .* pip install lm-eval"
    ):
        Harness(["anything"])


def test_flat_names_of_metrics():
    flat = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "em,strict": 1,
        "em_stderr,strict": "N/A",
        "sample_len": 3,
    }
    assert _metrics(flat) == {
        "acc": {"value": 0.5, "standard_error": 0.25},
        "em (strict)": {"value": 1.0, "standard_error": None},
    }


TASK = """task: long_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 64}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Return a folder with a task of 64 new tokens, and its data file."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "s.jsonl").write_text('{"q": "say hi", "a": "hi there"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(TASK.format(data=tmp_path / "s.jsonl"))
    return tmp_path


def test_new_tokens_of_tasks_are_checked_before_anything_is_measured(task):
    harness = Harness(["long_answers"], task / "tasks")
    harness.check({"large": 65})
    with pytest.raises(
        DataError, match="long_answers needs up to 64 new tokens, and small has 64 positions"
    ):
        harness.check({"large": 65, "small": 64})


def test_missing_data_are_reported_before_anything_is_measured(task):
    (task / "s.jsonl").unlink()
    with pytest.raises(DataError, match="--tasks: lm-evaluation-harness stopped: "):
        Harness(["long_answers"], task / "tasks").check({"large": 65})
