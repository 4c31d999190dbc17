"""What is told of a run before it is queued: its plan, layouts that may be better, what a dry run met."""

import argparse
import dataclasses
import json
import os
import sys

from megatron_sorted.errors import SettingsError
from megatron_sorted.planning.devices import Device, device_named
from megatron_sorted.planning.estimate import Plan, make_plan
from megatron_sorted.planning.search import search
from megatron_sorted.planning.split import balanced_split, weights_of_layers, with_split
from megatron_sorted.planning.work import without_uncounted
from megatron_sorted.settings.exits import loss_chunk_tokens
from megatron_sorted.settings.launch import USUAL, launch_line
from megatron_sorted.settings.layout import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.load import load_settings, notes_on_file
from megatron_sorted.settings.rules import check_settings
from megatron_sorted.settings.run import Settings

GB = 10**9


def plan_run(options: argparse.Namespace, changes: list[str]) -> int:
    """Return the exit status: 0 if the run fits, and is what was planned where that was tried."""
    settings = load_settings(["--config", options.run, *changes])
    sources = {
        "--world-size": options.world_size,
        "world-size": settings.world_size,
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
    }
    source, given = next((source, given) for source, given in sources.items() if given is not None)
    world_size = _positive(str(given), source, int)
    check_settings(settings, world_size)
    settings, notes = without_uncounted(
        dataclasses.replace(settings, vocab_size=_vocabulary(settings))
    )
    (name, said_device), shown = (
        _device_name(options, settings),
        _positive(options.show, "--show", int),
    )
    notes = [*notes_on_file(options.run), *notes, *said_device]
    device = device_named(name, options.device_file)
    limit = (
        device.memory_bytes
        if options.memory_gb is None
        else int(_positive(options.memory_gb, "--memory-gb", float) * GB)
    )
    ranks = _ranks(options.dry_run, settings, world_size) if options.dry_run else None
    chunk_tokens = loss_chunk_tokens(settings, on_cpu=not device.fused)
    plan = make_plan(settings, settings.vocab_size, world_size, device, chunk_tokens)
    if options.search:
        proposals, tried, least = search(
            settings,
            settings.vocab_size,
            world_size,
            device,
            chunk_tokens,
            limit,
            lambda count: _tell(f"{count} layouts"),
        )
        _tell("")
    run = None
    if options.dry_run:
        from megatron_sorted.dry_run.ranks import dry_run

        run = dry_run(
            settings, settings.vocab_size, world_size, plan, ranks, options.whole_step, _tell
        )
        _tell("")
    launch = _launch(options, settings, changes, world_size, device.per_host)
    if options.json:
        result = {
            "settings": changes,
            "device": name,
            "plan": _as_json(plan),
            "fits": plan.peak_bytes <= limit,
            "fits_surely": plan.needed_bytes <= limit,
            "notes": notes,
            "launch": launch,
        }
        if options.search:
            result["proposals"] = [
                {
                    "layout": {
                        field.name: getattr(p.settings, field.name)
                        for field in dataclasses.fields(settings)
                        if getattr(p.settings, field.name) != getattr(settings, field.name)
                    },
                    "seconds": p.plan.seconds,
                    "peak_bytes": p.plan.peak_bytes,
                }
                for p in proposals[:shown]
            ]
        if run:
            result["dry_run"] = {
                "ranks": len(run.ranks),
                "messages": run.messages,
                "problems": run.problems,
            }
        print(json.dumps(result, indent=1))
    else:
        from megatron_sorted.dry_run.page import dry_run_lines, plan_lines, search_lines

        lines = [
            *notes,
            *plan_lines(
                settings,
                plan,
                name,
                limit,
                launch,
                _better_split(settings, plan, device, chunk_tokens),
            ),
        ]
        lines += (
            ["", *search_lines(settings, proposals, tried, least, limit, shown)]
            if options.search
            else []
        )
        lines += ["", *dry_run_lines(run)] if run else []
        print("\n".join(lines))
    return int(plan.peak_bytes > limit or bool(run and run.problems))


def _positive(text: str, source: str, kind: type) -> int | float:
    """Return a number above 0.

    Raises:
        SettingsError: The text is none.
    """
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise SettingsError(
            f"{source}: {text} is not a {'whole ' if kind is int else ''}number above 0. Give one, or leave it out."
        )
    return number


def _ranks(words: list[str], settings: Settings, world_size: int) -> list[int] | None:
    """Return the ranks to run dry; None for all.

    Raises:
        SettingsError: A word is no rank, or the run cannot be tried without devices.
    """
    if settings.data_parallel == "fsdp":
        raise SettingsError(
            "--dry-run: --data-parallel fsdp is torch's, which knows no device without values. Leave --dry-run out: the "
            "plan counts fsdp all the same."
        )
    if words == ["all"]:
        return None
    for word in words:
        if not word.isdecimal() or int(word) >= world_size:
            raise SettingsError(
                f"--dry-run: {word} is no rank of {world_size} processes. Use 0..{world_size - 1}, or all, after the run's "
                "file."
            )
    return [int(word) for word in words]


def _device_name(options: argparse.Namespace, settings: Settings) -> tuple[str, list[str]]:
    """Return the device that is planned for, and a note where nobody said which: the usual one of the run's kind."""
    name = options.planned_device or settings.planned_device
    if name is not None:
        return name, []
    usual = USUAL[settings.device]
    if settings.device == "cpu":
        return usual, []
    return usual, [
        f"note: planned for {usual}, since neither --planned-device nor the key planned-device of "
        f"{options.run} says what --device {settings.device} is"
    ]


def _vocabulary(settings: Settings) -> int:
    """Return the number of tokens: as said, or of the tokenizer if it is there.

    Raises:
        SettingsError: Neither is.
    """
    if settings.vocab_size is not None:
        return settings.vocab_size
    path = settings.tokenizer_model
    if path is None or not os.path.exists(path):
        where = (
            f"the tokenizer {path} is not there to be asked" if path else "no tokenizer is named"
        )
        raise SettingsError(
            f"--vocab-size: not said, and {where}. Give the number of its tokens: --vocab-size N."
        )
    from megatron_sorted.data.tokenizer import load_tokenizer

    return load_tokenizer(settings.tokenizer_type, path, None).vocab_size


def _launch(
    options: argparse.Namespace,
    settings: Settings,
    changes: list[str],
    world_size: int,
    per_host: int,
) -> str:
    """Return the command that starts the run, or what must be changed before there is one."""
    if world_size > per_host and world_size % per_host and settings.device != "cpu":
        return (
            f"no line to start it: {world_size} processes do not fill hosts of {per_host} devices. Change --world-size, or per_host in "
            "--device-file."
        )
    line = launch_line(settings, options.run, changes, world_size, per_host)
    if line.startswith("slurm/") and settings.world_size not in (None, world_size):
        return f"with world-size: {world_size} in {options.run}, which says {settings.world_size}: {line}"
    return line


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _better_split(
    settings: Settings, plan: Plan, device: Device, chunk_tokens: int
) -> list[int] | None:
    """Return layers of chunks that make a step faster in no more memory than the device has, or than is needed now; None if none do."""
    if plan.pipeline_size == 1:
        return None
    lengths = balanced_split(
        weights_of_layers(settings, settings.vocab_size),
        plan.pipeline_size,
        num_virtual_chunks(settings),
    )
    if lengths == layers_of_chunks(settings):
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
        values = {
            field.name: _as_json(getattr(thing, field.name)) for field in dataclasses.fields(thing)
        }
        return values | ({"total": thing.total} if hasattr(thing, "total") else {})
    if isinstance(thing, list | tuple):
        return [_as_json(part) for part in thing]
    return (
        {key: _as_json(value) for key, value in thing.items()} if isinstance(thing, dict) else thing
    )
