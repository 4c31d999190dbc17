"""Serve many clients that come and leave at random, and compare every text with the one alone.

    python -m lab.soak_serving                             10 minutes, 64 clients, and the page
    python -m lab.soak_serving --seconds 30 --output ''    shorter, without a page
    python -m lab.soak_serving --model MODEL --dtype int8  another model and kind of weights

First every request of the pool is asked once. Then clients send requests of all strategies and
samplings at random, streamed or not, conversations that grow, long prompts and bad bodies, and
leave at every moment. Afterwards each different request is written alone by the library, in this
process. Every text must be equal, memory flat, waits within their bounds, counts those of the
clients, and nothing left behind. Writes docs/results/serving_soak.md.
"""

from megatron_sorted.command_line import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path

from lab.reliability.processes import environment
from lab.reliability.soak.alone import Alone
from lab.reliability.soak.bad_bodies import bad_requests
from lab.reliability.soak.checks import Bounds, Check, all_checks
from lab.reliability.soak.load import Load, Seen
from lab.reliability.soak.model import DEPTHS, write_soaked_model
from lab.reliability.soak.page import page
from lab.reliability.soak.requests import Pool
from lab.reliability.soak.served import Served, write_keys
from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.files import write_text_atomically

STOP_SECONDS = 20
PATIENCE = 900
"""Longest time for an answer in seconds: a request of 128 texts has 128 turns among the others."""
CACHE_GIGABYTES = 0.05
"""Memory for texts of the small model: so little that it is always full."""


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="time of random requests (%(default)s)")
    add("--clients", type=int, default=64, help="(%(default)s)")
    add("--pool", type=int, default=400, help="number of different requests (%(default)s)")
    add("--pause", type=float, default=0.5, help="mean seconds between requests (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--model", type=Path, help="Hugging Face directory (default: a small random one)")
    add("--depths", type=int, nargs="+", help="exits to use (default: those of the model)")
    add("--dtype", default="float32", help="kind of weights (%(default)s)")
    add("--native", default="auto", help="auto, on or off, as for serve (%(default)s)")
    add("--cache-memory", type=float, help="GB, as for serve (0.05 for the small model)")
    add("--max-wait", type=float, default=60, help="seconds, as for serve (%(default)s)")
    add("--probe-wait", type=float, default=20, help="longest wait of small requests (%(default)s)")
    add("--output", type=Path, default=Path("docs"), help="folder; '' writes none (%(default)s)")
    add("options", nargs="*", help="more options of serve, after --")
    return parser.parse_args()


def serve_command(values: argparse.Namespace, model: Path, keys: Path) -> list[str]:
    """Return the command that serves."""
    depths = [f"{depth}" for depth in values.depths or ()]
    return [
        *(sys.executable, "-m", "megatron_sorted", "serve", f"{model}", "--port", "0"),
        *(["--depths", *depths] if depths else []),
        *("--device", "cpu", "--dtype", values.dtype, "--native", values.native),
        *("--generation-config", "none", "--api-key-file", f"{keys}"),
        *(["--cache-memory", f"{values.cache_memory}"] if values.cache_memory else []),
        *("--max-wait", f"{values.max_wait}", "--no-request-log"),
        *values.options,
    ]


def main() -> int:
    """Return 0 if all checks hold."""
    values = read_arguments()
    with tempfile.TemporaryDirectory(prefix="soak_serving_") as temporary:
        return soak(values, Path(temporary))


def soak(values: argparse.Namespace, folder: Path) -> int:
    """Soak a server in a folder; return 0 if all checks hold."""
    model = values.model
    if model is None:
        model = write_soaked_model(folder)
        values.depths = values.depths or list(DEPTHS)
        values.cache_memory = values.cache_memory or CACHE_GIGABYTES
    generator = open_generator(values, model)
    keys = write_keys(folder / "keys")
    command = serve_command(values, model, folder / "keys")
    served = Served(command, folder / "server.log", environment())
    try:
        phases = asyncio.run(run_phases(values, served, generator, keys))
        status = served.stop(STOP_SECONDS)
    finally:
        served.kill()
    log = served.log.read_text(encoding="utf-8", errors="replace")
    alone, bounds = Alone(generator, model), Bounds(values.max_wait, values.probe_wait)
    checked: list[tuple[str, Seen, list[Check]]] = []
    for name, seen in phases.items():
        began = time.monotonic()
        checks = all_checks(seen, alone, bounds, log, exact=seen is next(iter(phases.values())))
        checked.append((name, seen, checks))
        print(f"{name}: compared in {time.monotonic() - began:.0f} s", flush=True)
        for check in checks:
            print(f"  {'FAILED' if check.faults else 'holds '} {check.name}: {check.figures}")
            for fault in check.faults:
                print(f"         {fault[:2000]}")
    if values.output != Path():
        target = values.output / "results" / "serving_soak.md"
        line = shlex.join(["python", "-m", "lab.soak_serving", *sys.argv[1:]])
        write_text_atomically(target, page(line, f"1 thread, {values.dtype}", checked))
    failed = status or any(check.faults for _, _, checks in checked for check in checks)
    print(f"FAILED: status {status}" if failed else "all texts equal, nothing left behind")
    return int(bool(failed))


def open_generator(values: argparse.Namespace, model: Path) -> TextGenerator:
    """Open the model as the server does."""
    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, values.dtype)
    return open_text_generator(model, None, values.depths, None, dtype, "cpu", native=values.native)


async def run_phases(
    values: argparse.Namespace, served: Served, generator: TextGenerator, keys: list[str]
) -> dict[str, Seen]:
    """Run the parts of the soak and return what the clients saw in each."""
    network, name = generator.network, await served.model_name(keys[0])
    context = network.max_positions
    pool = Pool(random.Random(values.seed), values.pool, name, network.depths, context)
    bad = bad_requests(name, network.depths, context)
    load = Load(served, pool, bad, keys, values.clients, PATIENCE, values.pause)
    print(f"every request once, by {values.clients} clients", flush=True)
    phases = {"Every request once": await load.each_once()}
    print(f"requests at random for {values.seconds:g} s", flush=True)
    phases["At random"] = await load.at_random(values.seconds, values.seed)
    return phases


if __name__ == "__main__":
    run_main(main)
