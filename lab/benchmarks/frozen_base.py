"""Measure what --tune-exit costs beside training everything, as a table on the terminal.

    MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 \\
        python -m lab.benchmarks.frozen_base

Time and memory of a step on one process. Each case runs in processes of its own, in turn and
several times, so that all meet the same machine. Time is CPU time of the process, which a busy
machine does not stretch.
"""

import statistics
from multiprocessing.connection import Connection

from lab.benchmarks.worker import Worker, answer_requests
from megatron_sorted.reporting.markdown import table

EXITS = {"exit_layer_nums": (2, 4, 6)}
TUNE = {**EXITS, "tune_exit": True}
NORM, BLOCK = {"use_exit_norm": True}, {"use_exit_block": True}
CASES = {
    "no exits": {},
    "exits, all trains": EXITS,
    "exits with block and norm, all trains": {**EXITS, **BLOCK, **NORM},
    "block and norm, --tune-exit": {**TUNE, **BLOCK, **NORM},
    "MLP and norm, --tune-exit": {**TUNE, "use_exit_mlp": True, **NORM},
    "adapter of rank 16, --tune-exit": {**TUNE, "exit_adapter_rank": 16},
    "own norm and head, --tune-exit": {**TUNE, **NORM, "untie_exit_output_weights": True},
}
STEPS, ROUNDS = 3, 3


def serve(connection: Connection, changes: dict) -> None:
    """Train steps of a case; the first answer is the number of parameters that train."""
    from lab.benchmarks.trainer import Trainer, start_platform
    from megatron_sorted.parallel.groups import start_process_groups
    from megatron_sorted.settings.run import Settings

    settings = Settings(
        num_layers=8,
        hidden_size=384,
        ffn_hidden_size=1024,
        num_attention_heads=6,
        seq_length=512,
        vocab_size=8000,
        mock_data=True,
        device="cpu",
        micro_batch_size=2,
        global_batch_size=2,
        **changes,
    )
    platform = start_platform("cpu", 1)
    step = Trainer(settings, platform, start_process_groups(settings, platform))
    parameters = [p for chunk in step.model.chunks for p in chunk.parameters()]
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    answer_requests(connection, {"": step}, platform, num_trained)


def measure(name: str) -> tuple[int, float, int]:
    """Return trained parameters, median CPU seconds of a step and peak bytes of a case."""
    worker = Worker(name, serve, CASES[name])
    num_trained = worker.answer()
    costs = [worker.step() for _ in range(1 + STEPS)]
    worker.stop()
    seconds = statistics.median(cost.cpu_seconds for cost in costs[1:])
    return num_trained, seconds, max(cost.peak_bytes for cost in costs)


def main() -> None:
    """Measure every case and print the table."""
    rounds = [{name: measure(name) for name in CASES} for _ in range(ROUNDS)]
    least = {name: tuple(map(min, *(one[name] for one in rounds))) for name in CASES}
    reference = least["exits, all trains"][1]
    titles = ["what trains", "parameters that train", "time of a step"]
    rows = [
        [
            name,
            f"{trained / 1e6:.2f} M",
            f"{seconds:.2f} s",
            f"{seconds / reference:.2f}",
            f"{peak / 1e6:,.0f} MB",
        ]
        for name, (trained, seconds, peak) in least.items()
    ]
    print("\n".join(table([*titles, "over exits, all trains", "peak memory"], rows)))


if __name__ == "__main__":
    main()
