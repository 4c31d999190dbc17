"""The cases of the benchmark of single steps: shapes, kinds of model, numbers of exits."""

from dataclasses import dataclass

from megatron_sorted.settings.run import Settings

NUM_LAYERS = 8
EXIT_LAYERS = {0: (), 1: (4,), 3: (2, 4, 6), 7: (1, 2, 3, 4, 5, 6, 7)}
"""Number of early exits -> their depths; the last layer's loss is added."""
SHAPES = {"A": (32_000, "heads"), "B": (6_400, "layers")}
"""Shape -> its vocabulary, and what dominates the cost.

In A one head costs as much as 5 layers, in B as much as one. Both vocabularies are multiples of
128, so that no implementation pads.
"""
MEMORY_SHAPES = {"A"}
"""Shapes whose memory is measured: where the head is large it is what exits could cost."""
KINDS = {
    "plain": "megatron-core GPTModel with its own loss",
    "ours": "this project",
    "eager": "exits computed in forward (megatron-core's output layer and cross entropy for each)",
}


@dataclass(frozen=True)
class Case:
    """One row of the comparison."""

    kind: str
    num_exits: int

    @property
    def name(self) -> str:
        """Return a short name for progress lines."""
        return f"{self.kind}, {self.num_exits} exits"


def all_cases(exit_counts: list[int]) -> list[Case]:
    """Return the rows: plain, ours for each number of exits, eager for each number but 0."""
    return [
        Case("plain", 0),
        *(Case("ours", n) for n in exit_counts),
        *(Case("eager", n) for n in exit_counts if n),
    ]


def case_settings(shape: str, case: Case, device: str, bf16: bool) -> Settings:
    """Return the run of a case: 8 LLaMA layers, embedding and head tied, 2 x 512 tokens."""
    return Settings(
        num_layers=NUM_LAYERS,
        hidden_size=512,
        num_attention_heads=8,
        seq_length=512,
        vocab_size=SHAPES[shape][0],
        micro_batch_size=2,
        global_batch_size=2,
        exit_layer_nums=EXIT_LAYERS[case.num_exits],
        mock_data=True,
        device=device,
        bf16=bf16,
        train_iters=1000,
        lr=1e-4,
        lr_decay_style="constant",
    )
