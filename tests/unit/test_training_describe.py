"""Text and plain data that describe a run."""

import pytest

from megatron_sorted.checkpoint.manifest import network_shape
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers
from megatron_sorted.training.run.describe import evaluation_results, short_count
from tests.support.tiny import tiny


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (26080, "26.1K"),
        (999_499, "999K"),
        (1_000_000, "1.00M"),
        (6_738_415_616, "6.74B"),
        (70_553_706_496, "70.6B"),
    ],
)
def test_counts_have_three_digits(count, text):
    assert short_count(count) == text


def test_evaluation_results():
    reports = [
        EvaluationReport(
            9,
            "facts",
            1.0,
            50,
            {4: ExitNumbers(1.0, 0.5, exact_match=0.25), 2: ExitNumbers(2.0, 0.25)},
        )
    ]
    results = evaluation_results(tiny(save="runs/mine", exit_layer_nums=(2,)), 100, 9, reports)
    assert (results["run"], results["step"]) == ("mine", 9)
    assert list(results["sets"]["facts"].items()) == [
        ("2", {"loss": 2.0, "token_accuracy": 0.25, "exact_match": None}),
        ("4", {"loss": 1.0, "token_accuracy": 0.5, "exact_match": 0.25}),
    ]
    # embedding and last norm, then per layer: attention 32 x (32 + 2 x 16) + 32 x 32, MLP
    # 3 x 32 x 48, two norms
    assert {depth: costs["parameters"] for depth, costs in results["exits"].items()} == {
        "2": 3232 + 2 * (3072 + 4608 + 64),
        "4": 3232 + 4 * (3072 + 4608 + 64),
    }


def test_shape_has_defaults_resolved():
    shape = network_shape(
        tiny(
            ffn_hidden_size=None,
            group_query_attention=False,
            num_query_groups=None,
            exit_layer_nums=(3, 1),
        ),
        100,
    )
    assert (shape["ffn_hidden_size"], shape["kv_channels"], shape["num_query_groups"]) == (
        128,
        8,
        4,
    )
    assert shape["exit_layer_nums"] == [1, 3, 4]
