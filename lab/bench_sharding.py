"""Measure the memory of each data parallel rank by form of data parallelism; print a table.

Every form runs in processes of its own: two steps, then the peak of a third. Memory is what a
process needs beyond what it had before the model was built. On a CPU it is resident memory, with an
allocator that returns freed blocks.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import datetime
import os
from dataclasses import replace

from lab.benchmarks.layouts import MeasuredLayout
from lab.benchmarks.pages import machine
from lab.benchmarks.worker import RETURN_FREED_MEMORY
from lab.results.pages import show_progress
from megatron_sorted.reporting.markdown import commit, table
from megatron_sorted.settings.run import Settings

FORMS = {
    "ddp": {},
    "ddp, distributed optimizer": {"use_distributed_optimizer": True},
    "fsdp": {"data_parallel": "fsdp"},
}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[2, 4], help="numbers of data parallel ranks"
    )
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of fp32")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the run: exits at every other layer, one short sample for each rank."""
    return Settings(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // 64,
        vocab_size=options.vocab_size,
        seq_length=64,
        exit_layer_nums=tuple(range(2, options.num_layers, 2)),
        mock_data=True,
        device=options.device,
        bf16=options.bf16,
        untie_embeddings_and_output_weights=True,
        lr_decay_style="constant",
    )


def measure(settings: Settings, processes: int) -> tuple[int, int]:
    """Return the largest peak of any rank: of the third step, and of the build."""
    layout = MeasuredLayout(settings, processes, warm=True)
    costs = [layout.step() for _ in range(3)][-1]
    layout.stop()
    return max(cost.peak_bytes for cost in costs), max(layout.build_bytes)


def main() -> None:
    """Run every form and print the table."""
    options = parse_arguments()
    settings = settings_of(options)
    os.environ.update(RETURN_FREED_MEMORY)  # for the fork server, which the first process starts
    rows = []
    for processes in options.processes:
        peaks = {}
        for form, changes in FORMS.items():
            show_progress(f"{form} on {processes} processes")
            peaks[form] = measure(replace(settings, **changes), processes)
        base, _ = peaks["ddp, distributed optimizer"]
        rows += [
            [
                form,
                str(processes),
                f"{step / 1e6:,.0f}",
                f"{step / base:.2f}",
                f"{build / 1e6:,.0f}",
            ]
            for form, (step, build) in peaks.items()
        ]
    show_progress("")
    precision = "bf16" if options.bf16 else "fp32"
    print(f"{datetime.date.today()}, {commit()}, {machine(options.device, 1)}, {precision}\n")
    titles = ["form", "ranks", "step, MB a rank", "to distributed optimizer", "build, MB"]
    print("\n".join(table(titles, rows)))


if __name__ == "__main__":
    run_main(main)
