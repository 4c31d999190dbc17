"""Says what a run will take before it is queued: memory, time, messages, balance of its stages; proposes layouts; tries them dry.

    python tools/plan.py RUN.yaml [--micro-batch-size 4 ...]       the plan; settings may be changed as in training
    python tools/plan.py RUN.yaml --search                         layouts of the same training, the fastest that fit first
    python tools/plan.py RUN.yaml --dry-run all                    build every rank without devices, step one of each kind
    python tools/plan.py --calibrate cpu.json                      measure this machine, for --device-file
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import DEVICES, Device, device_named
from megatron_sorted.planning.estimate import Plan, make_plan
from megatron_sorted.planning.search import search
from megatron_sorted.planning.split import balanced_split, weights_of_layers, with_split
from megatron_sorted.planning.work import without_uncounted
from megatron_sorted.settings.check import check_settings
from megatron_sorted.settings.derived import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.launch import USUAL, launch_line
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.run_head import said_in_head

CHUNK_TOKENS = {True: 2048, False: 256}
"""Tokens whose logits exist at one time unless the settings say: on accelerators, on cores."""
GB = 10**9


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns the command line's options, and the rest: settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", metavar="RUN.yaml", help="the run")
    parser.add_argument("--world-size", help="processes; by default as the line `# world-size: N` of the file says")
    parser.add_argument("--planned-device", help=f"what it is to run on: {', '.join(DEVICES)}; by default `# planned-device:` of the file")
    parser.add_argument("--device-file", type=Path, help="JSON with fields of the device that differ from the table (see --calibrate)")
    parser.add_argument("--memory-gb", help="limit for one rank, by default the device's memory")
    parser.add_argument("--search", action="store_true", help="propose layouts on as many processes")
    parser.add_argument("--show", default="10", help="how many of them")
    parser.add_argument("--dry-run", nargs="+", metavar="RANK", help="ranks to build and step without devices, or: all")
    parser.add_argument("--whole-step", action="store_true", help="with --dry-run: all micro-batches of a step, not only enough of them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine's cores and write a --device-file")
    return parser.parse_known_args()


def _positive(text: str, source: str, kind: type) -> int | float:
    """Returns a number above 0.

    Raises:
        SettingsError: The text is none.
    """
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise SettingsError(f"{source}: {text} is not a {'whole ' if kind is int else ''}number above 0. Give one, or leave it out.")
    return number


def _ranks(words: list[str], settings: Settings, world_size: int) -> list[int] | None:
    """Returns the ranks to run dry; None for all.

    Raises:
        SettingsError: A word is no rank, or the run cannot be tried without devices.
    """
    if settings.data_parallel == "fsdp":
        raise SettingsError("--dry-run: --data-parallel fsdp is torch's, which knows no device without values. Leave --dry-run out: the "
                            "plan counts fsdp all the same.")
    if words == ["all"]:
        return None
    for word in words:
        if not word.isdecimal() or int(word) >= world_size:
            raise SettingsError(f"--dry-run: {word} is no rank of {world_size} processes. Use 0..{world_size - 1}, or all, after the run's "
                                "file.")
    return [int(word) for word in words]


def _device_name(options: argparse.Namespace, settings: Settings) -> tuple[str, list[str]]:
    """Return the device that is planned for, and a note where nobody said which: the usual one of the run's kind."""
    name = options.planned_device or said_in_head(options.run, "planned-device")
    if name is not None:
        return name, []
    usual = USUAL[settings.device]
    if settings.device == "cpu":
        return usual, []
    return usual, [f"note: planned for {usual}, since neither --planned-device nor a line '# planned-device:' in the head of "
                   f"{options.run} says what --device {settings.device} is"]


def _vocabulary(settings: Settings) -> int:
    """Return the number of tokens: as said, or of the tokenizer if it is there.

    Raises:
        SettingsError: Neither is.
    """
    if settings.vocab_size is not None:
        return settings.vocab_size
    path = settings.tokenizer_model
    if path is None or not os.path.exists(path):
        where = f"the tokenizer {path} is not there to be asked" if path else "no tokenizer is named"
        raise SettingsError(f"--vocab-size: not said, and {where}. Give the number of its tokens: --vocab-size N.")
    from megatron_sorted.data.tokenizer import load_tokenizer

    return load_tokenizer(settings.tokenizer_type, path, None).vocab_size


def _launch(options: argparse.Namespace, settings: Settings, changes: list[str], world_size: int, per_host: int) -> str:
    """Returns the command that starts the run, or what must be changed before there is one."""
    if world_size > per_host and world_size % per_host and settings.device != "cpu":
        return (f"no line to start it: {world_size} processes do not fill hosts of {per_host} devices. Change --world-size, or per_host in "
                "--device-file.")
    line, said = launch_line(settings, options.run, changes, world_size, per_host), said_in_head(options.run, "world-size")
    if line.startswith("slurm/") and said not in (None, str(world_size)):
        return f"with '# world-size: {world_size}' in the head of {options.run}, which says {said}: {line}"
    return line


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _better_split(settings: Settings, plan: Plan, device: Device, chunk_tokens: int) -> list[int] | None:
    """Returns layers of chunks that make a step faster in no more memory than the device has, or than is needed now; None if none do."""
    if plan.pipeline_size == 1:
        return None
    lengths = balanced_split(weights_of_layers(settings, settings.vocab_size), plan.pipeline_size, num_virtual_chunks(settings))
    if lengths == [chunk.num_layers for chunk in layers_of_chunks(settings)]:
        return None
    moved = with_split(settings, lengths)
    try:
        check_settings(moved, plan.world_size)
    except SettingsError:
        return None
    other = make_plan(moved, settings.vocab_size, plan.world_size, device, chunk_tokens)
    fits = other.needed_bytes <= max(device.memory_bytes, plan.needed_bytes)
    return lengths if fits and other.seconds < plan.seconds else None


def _as_json(thing) -> object:
    if dataclasses.is_dataclass(thing):
        values = {field.name: _as_json(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        return values | ({"total": thing.total} if hasattr(thing, "total") else {})
    if isinstance(thing, list | tuple):
        return [_as_json(part) for part in thing]
    return {key: _as_json(value) for key, value in thing.items()} if isinstance(thing, dict) else thing


def plan_run(options: argparse.Namespace, changes: list[str]) -> int:
    """Returns the exit status: 0 if the run fits, and is what was planned where that was tried."""
    settings = load_settings(["--config", options.run, *changes])
    said, around = said_in_head(options.run, "world-size"), os.environ.get("WORLD_SIZE", "1")
    sources = {"--world-size": options.world_size, f"# world-size in {options.run}": said, "WORLD_SIZE": around}
    source, text = next((source, text) for source, text in sources.items() if text is not None)
    world_size = _positive(text, source, int)
    check_settings(settings, world_size)
    settings, notes = without_uncounted(dataclasses.replace(settings, vocab_size=_vocabulary(settings)))
    (name, said_device), shown = _device_name(options, settings), _positive(options.show, "--show", int)
    notes += said_device
    device = device_named(name, options.device_file)
    limit = device.memory_bytes if options.memory_gb is None else int(_positive(options.memory_gb, "--memory-gb", float) * GB)
    ranks = _ranks(options.dry_run, settings, world_size) if options.dry_run else None
    chunk_tokens = CHUNK_TOKENS[device.fused]
    plan = make_plan(settings, settings.vocab_size, world_size, device, chunk_tokens)
    if options.search:
        proposals, tried, least = search(settings, settings.vocab_size, world_size, device, chunk_tokens, limit,
                                         lambda count: _tell(f"{count} layouts"))
        _tell("")
    run = None
    if options.dry_run:
        from planning.dry_run import dry_run

        run = dry_run(settings, settings.vocab_size, world_size, plan, ranks, options.whole_step, _tell)
        _tell("")
    launch = _launch(options, settings, changes, world_size, device.per_host)
    if options.json:
        result = {"settings": changes, "device": name, "plan": _as_json(plan), "fits": plan.peak_bytes <= limit,
                  "fits_surely": plan.needed_bytes <= limit, "notes": notes, "launch": launch}
        if options.search:
            result["proposals"] = [{"layout": {field.name: getattr(p.settings, field.name) for field in dataclasses.fields(settings)
                                               if getattr(p.settings, field.name) != getattr(settings, field.name)},
                                    "seconds": p.plan.seconds, "peak_bytes": p.plan.peak_bytes} for p in proposals[:shown]]
        if run:
            result["dry_run"] = {"ranks": len(run.ranks), "messages": run.messages, "problems": run.problems}
        print(json.dumps(result, indent=1))
    else:
        from planning.page import dry_run_lines, plan_lines, search_lines

        lines = [*notes, *plan_lines(settings, plan, name, limit, launch, _better_split(settings, plan, device, chunk_tokens))]
        lines += ["", *search_lines(settings, proposals, tried, least, limit, shown)] if options.search else []
        lines += ["", *dry_run_lines(run)] if run else []
        print("\n".join(lines))
    return int(plan.peak_bytes > limit or bool(run and run.problems))


def main() -> int:
    """Print the plan and return the exit status."""
    options, changes = parse_arguments()
    if options.calibrate:
        from planning.calibrate import calibrate

        print(calibrate(options.calibrate, len(os.sched_getaffinity(0))))
        return 0
    if options.run is None:
        raise SettingsError("no run. Give its YAML file: python tools/plan.py RUN.yaml")
    start = time.monotonic()
    status = plan_run(options, changes)
    if options.search or options.dry_run:
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    run_main(main)
