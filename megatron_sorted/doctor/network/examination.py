"""The examination of a job's nodes, step by step."""

import os
import sys
import uuid
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sorted.doctor.disks import existing_folder
from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine, some
from megatron_sorted.doctor.local import (
    DISK_SECONDS,
    IMPORT_SECONDS,
    DoctorOptions,
    device_of,
    folder_of,
    look_around,
)
from megatron_sorted.doctor.network.cards import Card, check_alike, make_card, node_names
from megatron_sorted.doctor.network.meeting import (
    PATIENCE_SECONDS,
    MissingRanksError,
    dismiss,
    gather,
    meet,
    open_store,
    put,
    wait_for_the_end,
    was_told_to_stop,
)
from megatron_sorted.doctor.network.trial import NetworkTrial, judge
from megatron_sorted.doctor.network.watch import Heart, Watch
from megatron_sorted.doctor.table import Show
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.processes import World
from megatron_sorted.platform.select import choose_platform, load_library_of

# of a node's own examination: imports are tried twice where torch fails
LOCAL_SECONDS = 2 * IMPORT_SECONDS + DISK_SECONDS


def open_platform(device: str, local_rank: int) -> tuple[Platform | None, str, str]:
    """Return the platform of this process and the name of its device, or why there is none."""
    try:
        with redirect_stdout(sys.stderr):  # it prints warnings, and JSON is to be read by programs
            load_library_of(device)
        platform = choose_platform(device)
        platform.select_device(local_rank)
        place = platform.device()
        return (
            platform,
            place.type if place.type == "cpu" else torch.get_device_module(place).get_device_name(),
            "",
        )
    except (PlatformError, RuntimeError) as error:
        return None, "none", str(error)


def check_missing(
    error: MissingRanksError, world: World, limit_seconds: float, ended: bool
) -> Finding:
    """Return which ranks did not come, with the host where their neighbours did; ``ended``: the launcher would not wait longer."""
    hosts = {card.rank // world.local_size: card.host for card in error.cards}
    words = [
        f"rank {rank} ({f'on {hosts[node]}' if node in hosts else f'node {node}, from which nobody came'})"
        for rank in error.missing
        for node in [rank // world.local_size]
    ]
    when = (
        "before the launcher ended the job, since a process had ended"
        if ended
        else f"within {limit_seconds:.0f} s"
    )
    return broken(
        "processes",
        f"{len(error.missing)} of {world.size} did not come {when}: {some(words, 16)}",
        "Look at their output and hosts: not started, still importing (--limit-seconds), or MASTER_ADDR not reachable there.",
    )


def examine(question: DoctorOptions, limit_seconds: float, show: Show) -> int:
    """Examine the nodes and return the exit status of this process; rank 0 prints. See ``job.examine_job``.

    Collective: every process of the job.
    """
    world = question.world
    platform, device, error = open_platform(device_of(question), world.local_rank)
    card = make_card(world, question.environment, device, error)
    store = open_store(world, question.environment, limit_seconds)
    try:
        cards = meet(store, world, card, limit_seconds)
    except MissingRanksError as missing:
        if world.rank == 0:
            ended = was_told_to_stop()  # then there is no time to look around
            here = [] if ended else look_around(question)
            status = show(
                {card.host: [*here, check_missing(missing, world, limit_seconds, ended)]}, ()
            )
            dismiss(store, world.size)
            return status
        wait_for_the_end(store, world.rank, LOCAL_SECONDS)
        return 1
    if world.local_rank == 0:
        put(store, "findings", world.rank, [asdict(finding) for finding in look_around(question)])
    leaders = [card.rank for card in cards if card.local_rank == 0]
    if world.rank != 0:
        if gather(store, "go", [0], LOCAL_SECONDS + limit_seconds + PATIENCE_SECONDS).get(0):
            _take_part(store, cards, platform, question, limit_seconds, None)
        wait_for_the_end(store, world.rank, limit_seconds + PATIENCE_SECONDS)
        return 0
    nodes = node_names(cards)
    came = gather(store, "findings", leaders, LOCAL_SECONDS + limit_seconds)
    by_host = {
        nodes[cards[rank].node]: [Finding(**data) for data in came.get(rank, [])]
        for rank in leaders
    }
    mute = [str(cards[rank]) for rank in leaders if rank not in came]
    of_job = check_alike(cards) + [
        broken("examination", f"{', '.join(mute)} did not answer", "Start the doctor there alone.")
    ] * bool(mute)
    homeless = [card for card in cards if card.error]
    if homeless:
        of_job.append(
            broken(
                "devices of processes",
                f"{homeless[0]}: {homeless[0].error} ({len(homeless)} of {world.size} processes)",
                "Mend this; the network was not tested.",
            )
        )
    put(store, "go", 0, not homeless)

    def tell(found: list[Finding], figures: list) -> int:
        tried = {
            finding.name for finding in found
        }  # what was tried together counts, not what a node supposed
        whole = {
            node: [*(one for one in findings if one.name not in tried), *of_job, *found]
            for node, findings in by_host.items()
        }
        return show(whole, figures)

    found, figures = [], []
    if not homeless:
        found, figures = _take_part(
            store, cards, platform, question, limit_seconds, lambda finding: tell([finding], [])
        )
    status = tell(found, figures)
    dismiss(store, world.size)
    return status


def _take_part(
    store: dist.Store,
    cards: list[Card],
    platform: Platform,
    question: DoctorOptions,
    limit_seconds: float,
    on_end: Callable[[Finding], int] | None,
) -> tuple[list[Finding], list[dict]]:
    """Return, on rank 0, what the test of the network found, and its figures.

    Collective: every process of the job.
    """
    world = question.world
    names = {card.rank: str(card) for card in cards}
    heart, watch = Heart(store.clone(), world.rank), None
    heart.start()
    if on_end is not None:
        watch = Watch(store.clone(), names, limit_seconds, on_end)
        watch.start()
    # torch 2.13 gives collective operations new names, which older ones do not know
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    put(store, "phase", world.rank, (0, "the first connections"))
    try:
        dist.init_process_group(
            platform.backend,
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=limit_seconds + PATIENCE_SECONDS),
        )
        trial = NetworkTrial(store, cards, platform, world.rank)
        results = trial.run()
        shared = share_folder(store, trial, existing_folder(folder_of(question)), world, cards)
    except Exception as error:
        put(store, "error", world.rank, f"{type(error).__name__}: {error}")
        if watch is not None:
            watch.join()  # it waits for the others' words and ends this process
        return [], []
    heart.stop()
    put(store, "result", world.rank, results)
    if watch is None:
        return [], []
    every = gather(store, "result", range(world.size), limit_seconds)
    watch.stop()
    figures = [{**figure, "rank": rank} for rank, mine in sorted(every.items()) for figure in mine]
    return judge(figures, cards) + shared, figures


def share_folder(
    store: dist.Store, trial: NetworkTrial, folder: Path, world: World, cards: list[Card]
) -> list[Finding]:
    """Return, on rank 0, whether all nodes see the same folder.

    Collective: two all-reduces of 8 bytes over all processes.
    """
    nodes = node_names(cards)
    if len(nodes) == 1:
        return []
    trial.begin("shared folder")
    if world.rank == 0:
        put(store, "token", 0, f".doctor_{uuid.uuid4().hex}")
    token, failure = folder / gather(store, "token", [0], 60)[0], ""
    try:
        if world.rank == 0:
            token.touch()
    except OSError as error:  # said when the others, who wait in an operation, have been through it
        failure = error.strerror or str(error)
    trial.meter.slowest(0.0)
    if world.local_rank == 0:
        put(store, "sees", world.rank, os.access(token, os.F_OK))
    trial.meter.slowest(0.0)
    if world.rank != 0:
        return []
    with suppress(OSError):
        token.unlink()
    if failure:
        return [
            broken(
                "shared folder",
                f"{folder}: {failure}",
                "Give a folder that can be written: --folder here, --save in the run.",
            )
        ]
    sees = gather(store, "sees", [card.rank for card in cards if card.local_rank == 0], 60)
    blind = [nodes[cards[rank].node] for rank, there in sees.items() if not there]
    if blind:
        return [
            doubtful(
                "shared folder",
                f"{folder} of {nodes[cards[0].node]} is not seen on {', '.join(blind[:8])}",
                "--save needs a folder that all nodes see, at the same path.",
            )
        ]
    return [fine("shared folder", f"{folder}: seen on all {len(nodes)} nodes")]
