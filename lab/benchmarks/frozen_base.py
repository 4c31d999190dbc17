"""What --tune-exit costs beside training everything: time and memory of a step on one process, as a table.

    MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 python -m lab.benchmarks.frozen_base

Each way of training runs in a process of its own, in turn and several times over, so that all meet the same machine. Time is the
processor's own, which a busy machine does not stretch.
"""

import json
import statistics
import subprocess
import sys
import time

EXITS = {"exit_layer_nums": (2, 4, 6)}
TUNE = {**EXITS, "tune_exit": True}
STRATEGIES = {
    "no exits": {},
    "exits, all trains": EXITS,
    "exits with block and norm, all trains": {
        **EXITS,
        "use_exit_block": True,
        "use_exit_norm": True,
    },
    "block and norm, --tune-exit": {**TUNE, "use_exit_block": True, "use_exit_norm": True},
    "MLP and norm, --tune-exit": {**TUNE, "use_exit_mlp": True, "use_exit_norm": True},
    "adapter of rank 16, --tune-exit": {**TUNE, "exit_adapter_rank": 16},
    "own norm and head, --tune-exit": {
        **TUNE,
        "use_exit_norm": True,
        "untie_exit_output_weights": True,
    },
}
STEPS, ROUNDS = 3, 3


def measure(changes: dict) -> dict[str, float]:
    """Return processor seconds of a step, peak bytes of a step, and bytes before the first one."""
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
    train = Trainer(settings, platform, start_process_groups(settings, platform))
    seconds, peak = [], 0
    for _ in range(STEPS + 1):
        platform.reset_peak_memory()
        began = time.process_time()
        train()
        seconds.append(time.process_time() - began)
        peak = max(peak, platform.peak_memory_bytes())
    trained = sum(
        p.numel() for chunk in train.model.chunks for p in chunk.parameters() if p.requires_grad
    )
    return {"seconds": statistics.median(seconds[1:]), "peak": peak, "trained": trained}


def main() -> None:
    """Measure every way and prints the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(STRATEGIES[sys.argv[1]])))
        return
    found: dict[str, list[dict]] = {name: [] for name in STRATEGIES}
    for _ in range(ROUNDS):
        for name, results in found.items():
            command = [sys.executable, "-m", "lab.benchmarks.frozen_base", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    reference = min(one["seconds"] for one in found["exits, all trains"])
    print(
        "| what trains | parameters that train | time of a step | of that of all | peak memory |\n|---|---|---|---|---|"
    )
    for name, results in found.items():
        seconds, peak = (min(one[key] for one in results) for key in ("seconds", "peak"))
        print(
            f"| {name} | {results[0]['trained'] / 1e6:.2f} M | {seconds:.2f} s | {seconds / reference:.2f} | {peak / 1e6:,.0f} MB |"
        )


if __name__ == "__main__":
    main()
