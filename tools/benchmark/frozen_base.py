"""What --tune-exit costs beside training everything: time and memory of a step on one process, as a table.

    MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 PYTHONPATH=.:tools python tools/benchmark/frozen_base.py

Each way of training runs in a process of its own, in turn and several times over, so that all meet the same machine. Time is the
processor's own, which a busy machine does not stretch.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time

EXITS = {"exit_layer_nums": (2, 4, 6)}
TUNE = {**EXITS, "tune_exit": True}
WAYS = {
    "no exits": {},
    "exits, all trains": EXITS,
    "exits with block and norm, all trains": {**EXITS, "use_exit_block": True, "use_exit_norm": True},
    "block and norm, --tune-exit": {**TUNE, "use_exit_block": True, "use_exit_norm": True},
    "MLP and norm, --tune-exit": {**TUNE, "use_exit_mlp": True, "use_exit_norm": True},
    "adapter of rank 16, --tune-exit": {**TUNE, "exit_adapter_rank": 16},
    "own norm and head, --tune-exit": {**TUNE, "use_exit_norm": True, "untie_exit_output_weights": True},
}
STEPS, ROUNDS = 3, 3


def measure(changes: dict) -> dict[str, float]:
    """Returns processor seconds of a step, peak bytes of a step, and bytes before the first one."""
    from megatron_sorted.data.batches import make_train_batches
    from megatron_sorted.parallel.groups import start_process_groups
    from megatron_sorted.platform.select import choose_platform
    from megatron_sorted.settings.derived import trained_exits
    from megatron_sorted.settings.run import Settings
    from megatron_sorted.settings.weighting import coefficient_rule
    from megatron_sorted.training.build import build_model, build_optimizer
    from megatron_sorted.training.forward_step import ForwardStep
    from megatron_sorted.training.step import train_step

    settings = Settings(num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, seq_length=512, vocab_size=8000,
                        mock_data=True, device="cpu", micro_batch_size=2, global_batch_size=2, **changes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    platform = choose_platform("cpu")
    platform.prepare()
    place = start_process_groups(settings, platform)
    model = build_model(settings, platform, place, settings.vocab_size)
    build_optimizer(model, settings, 1)
    forward_step, rule = ForwardStep(settings, model, platform), coefficient_rule(settings)
    batches, seconds, peak = make_train_batches(settings, settings.vocab_size, 0, 1, 0), [], 0
    for step in range(STEPS + 1):
        batch = [next(batches)]
        platform.reset_peak_memory()
        began = time.process_time()
        train_step(model, settings, forward_step, batch, trained_exits(settings, rule, step), 2)
        seconds.append(time.process_time() - began)
        peak = max(peak, platform.peak_memory_bytes())
    trained = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    return {"seconds": statistics.median(seconds[1:]), "peak": peak, "trained": trained}


def main() -> None:
    """Measures every way and prints the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(WAYS[sys.argv[1]])))
        return
    found: dict[str, list[dict]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, results in found.items():
            output = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    reference = min(one["seconds"] for one in found["exits, all trains"])
    print("| what trains | parameters that train | time of a step | of that of all | peak memory |\n|---|---|---|---|---|")
    for name, results in found.items():
        seconds, peak = (min(one[key] for one in results) for key in ("seconds", "peak"))
        print(f"| {name} | {results[0]['trained'] / 1e6:.2f} M | {seconds:.2f} s | {seconds / reference:.2f} | {peak / 1e6:,.0f} MB |")


if __name__ == "__main__":
    main()
