"""Measures what each data parallel rank needs of memory, by form of data parallelism; prints a table.

Every form runs in fresh processes: two steps, then the peak of a third. What the process held before the model was built (libraries) is
taken off. On a CPU memory is resident memory, with an allocator that gives freed blocks back.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

from lab.benchmarks.report import machine
from lab.benchmarks.worker import RETURN_FREED_MEMORY
from lab.reliability.task import environment
from megatron_sorted.reporting.markdown import commit, table

FORMS = {
    "ddp": {},
    "ddp, distributed optimizer": {"use_distributed_optimizer": True},
    "fsdp": {"data_parallel": "fsdp"},
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
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
    parser.add_argument(
        "--form", choices=FORMS, help=argparse.SUPPRESS
    )  # of a process that measures
    return parser.parse_args()


def settings_of(options: argparse.Namespace):
    """Return the run of one form: exits at every other layer, one short sample a rank."""
    from megatron_sorted.settings.run import Settings

    heads = options.hidden_size // 64
    base = Settings(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=heads,
        vocab_size=options.vocab_size,
        seq_length=64,
        exit_layer_nums=tuple(range(2, options.num_layers, 2)),
        mock_data=True,
        device=options.device,
        bf16=options.bf16,
        untie_embeddings_and_output_weights=True,
        lr_decay_style="constant",
    )
    return replace(base, **FORMS[options.form])


def measure(options: argparse.Namespace) -> None:
    """Print this rank's bytes: of libraries, then peaks of the build and of a step, and the number of parameters.

    Collective: starts the process groups and trains three steps.
    """
    from lab.benchmarks.trainer import Trainer, start_platform
    from megatron_sorted.parallel.groups import start_process_groups

    settings, platform = settings_of(options), start_platform(options.device)
    place = start_process_groups(settings, platform)
    platform.reset_peak_memory()
    libraries = platform.peak_memory_bytes()
    train = Trainer(settings, platform, place)
    build = platform.peak_memory_bytes()
    for _ in range(3):
        platform.reset_peak_memory()
        train()
    numbers = {
        "libraries": libraries,
        "build": build - libraries,
        "step": platform.peak_memory_bytes() - libraries,
    }
    print(json.dumps(numbers), flush=True)


def run_form(form: str, processes: int) -> dict[str, int]:
    """Return the largest numbers of any rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = {
        **environment(),
        **RETURN_FREED_MEMORY,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "lab.bench_sharding", *sys.argv[1:], "--form", form]
    ranks = [
        subprocess.Popen(
            command,
            env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    answers = [json.loads(rank.communicate(timeout=900)[0].splitlines()[-1]) for rank in ranks]
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def main() -> None:
    """Run every form and prints the table."""
    options = parse_arguments()
    if options.form:
        measure(options)
        os._exit(0)  # peers may be gone
    rows = []
    for processes in options.processes:
        found = {}
        for form in FORMS:
            print(f"{form} on {processes} processes", file=sys.stderr, flush=True)
            found[form] = run_form(form, processes)
        base = found["ddp, distributed optimizer"]["step"]
        rows += [
            [
                form,
                str(processes),
                f"{n['step'] / 1e6:,.0f}",
                f"{n['step'] / base:.2f}",
                f"{n['build'] / 1e6:,.0f}",
            ]
            for form, n in found.items()
        ]
    print(
        f"{datetime.date.today()}, {commit()}, {machine(options.device, 1)}, {'bf16' if options.bf16 else 'fp32'}\n"
    )
    print(
        "\n".join(
            table(
                ["form", "ranks", "step, MB a rank", "to distributed optimizer", "build, MB"], rows
            )
        )
    )


if __name__ == "__main__":
    run_main(main)
