"""The measured whole runs: models, layouts and rounds."""

from dataclasses import dataclass, field
from typing import Any

COMMON = {
    "micro_batch_size": 1,
    "log_interval": 10,
    "lr": 1e-4,
    "lr_decay_style": "constant",
    "device": "cpu",
    "train_iters": 100_000,
}
"""Settings of every case.

Legs of the measurement end before the last step, so no run saves or evaluates by itself.
"""
SMALL = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8192}
LARGE = {"num_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 8192}
TINY = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1024}
LAYOUTS = {
    "1 process": (1, {}),
    "pp 2": (2, {"pipeline_model_parallel_size": 2}),
    "dp 2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
}
LOG_INTERVALS = (1, 10, 2)
"""1 and 10 are on the page; with 2, steps with and without a comparison of exits take turns."""


@dataclass(frozen=True)
class RunCase:
    """One run.

    Attributes:
        kind: "loop" or "checkpoint".
        layout: A key of ``LAYOUTS``.
        settings: Settings of the run, without folders.
        rounds: The number of times that everything is measured.
        leg_steps: Steps of a "loop" at one log interval; the first and the last are not counted.
    """

    kind: str
    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 2
    leg_steps: int = 12

    @property
    def num_processes(self) -> int:
        """Return the number of processes it needs."""
        return LAYOUTS[self.layout][0]

    @property
    def name(self) -> str:
        """Return a name for lines and folders."""
        return f"{self.kind}, {self.layout}, hidden {self.settings['hidden_size']}"


def _case(
    kind: str, layout: str, model: dict[str, int], rounds: int, leg_steps: int = 12, **more: Any
) -> RunCase:
    return RunCase(
        kind, layout, {**COMMON, **model, **LAYOUTS[layout][1], **more}, rounds, leg_steps
    )


def loop_cases(quick: bool) -> list[RunCase]:
    """Return the runs whose loop is measured: four exits and real data.

    A step takes about a second on one thread for each process.
    """
    if quick:
        return [
            _case(
                "loop", layout, TINY, 1, seq_length=64, global_batch_size=2, exit_layer_nums=[1, 2]
            )
            for layout in ("1 process", "pp 2")
        ]
    return [
        _case(
            "loop",
            layout,
            SMALL,
            2,
            seq_length=128,
            global_batch_size=batch,
            exit_layer_nums=[2, 4, 6],
        )
        for layout, batch in (("1 process", 2), ("pp 2", 3))
    ]


def checkpoint_cases(quick: bool) -> list[RunCase]:
    """Return the runs whose checkpoints are measured; many of their short steps fit into a save."""
    if quick:
        return [
            _case("checkpoint", layout, TINY, 1, seq_length=64, exit_layer_nums=[2])
            for layout in LAYOUTS
        ]
    return [
        _case(
            "checkpoint",
            layout,
            model,
            rounds,
            seq_length=64,
            exit_layer_nums=[model["num_layers"] // 2],
        )
        for layout, model, rounds in (
            ("1 process", SMALL, 3),
            ("1 process", LARGE, 2),
            ("pp 2", SMALL, 3),
            ("dp 2, distributed optimizer", SMALL, 3),
        )
    ]
