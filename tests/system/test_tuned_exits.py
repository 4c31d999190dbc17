"""Exits with layers of their own, trained on a frozen base; one of two stages trains nothing."""

from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.monitoring.json_lines import read_json_lines
from tests.support.command_line import pretrain
from tests.support.weights_only import weights_by_layer

RUN = (
    "--num-layers",
    4,
    "--hidden-size",
    32,
    "--num-attention-heads",
    4,
    "--seq-length",
    32,
    "--vocab-size",
    100,
    "--device",
    "cpu",
    "--mock-data",
    "--micro-batch-size",
    2,
    "--global-batch-size",
    4,
    "--lr",
    1e-2,
    "--lr-decay-style",
    "constant",
    "--log-interval",
    1,
    "--exit-layer-nums",
    1,
    2,
    "--eval-interval",
    2,
    "--eval-iters",
    1,
)
TUNED = (
    *RUN,
    "--use-exit-block",
    "--use-exit-norm",
    "--exit-adapter-rank",
    2,
    "--tune-exit",
    "--pretrained-checkpoint",
    "base",
    "--load",
    "tuned",
    "--save",
    "tuned",
    "--save-interval",
    2,
)


def test_a_base_gets_exits_and_keeps_its_bits(tmp_path):
    pretrain(1, tmp_path, *RUN, "--save", "base", "--train-iters", 2)
    lines = pretrain(2, tmp_path, *TUNED, "--train-iters", 2, "--pipeline-model-parallel-size", 2)
    assert any(line.startswith("loaded base/iter_0000002: weights only") for line in lines)
    lines = pretrain(1, tmp_path, *TUNED, "--train-iters", 4)
    assert any(line.startswith("loaded tuned/iter_0000002: step 2") for line in lines)
    base = weights_by_layer(iteration_directory(tmp_path / "base", 2))
    first, tuned = (
        weights_by_layer(iteration_directory(tmp_path / "tuned", step)) for step in (2, 4)
    )
    own = tuned.keys() - base.keys()
    assert base.keys() < tuned.keys() and {name.split(".")[0] for name in own} == {
        "exit_blocks",
        "exit_norms",
        "exit_adapters",
    }
    for name, weight in base.items():
        # rows that pad the vocabulary are not compared
        real = slice(100 if "embedding" in name else None)
        assert (weight[real] == tuned[name][real]).all(), name
    assert all((first[name] != tuned[name]).any() for name in own)
    steps = [
        line
        for line in read_json_lines(tmp_path / "tuned" / "metrics.jsonl")
        if "learning_rate" in line
    ]
    assert all(set(line["exits"]) == {"1", "2"} for line in steps), "the last exit does not train"
