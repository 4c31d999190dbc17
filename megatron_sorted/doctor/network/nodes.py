"""The checks of a job's nodes, in order: rendezvous, each node's own checks, network test."""

import os
import sys
import uuid
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sorted.doctor.disks import existing_folder
from megatron_sorted.doctor.finding import Finding, fail, first_of, ok, warn
from megatron_sorted.doctor.local import (
    DISK_SECONDS,
    IMPORT_SECONDS,
    DoctorOptions,
    check_host,
    device_of,
    folder_of,
)
from megatron_sorted.doctor.network.measurements import NetworkTest, check_measurements
from megatron_sorted.doctor.network.process_report import (
    ProcessReport,
    check_alike,
    node_names,
    report_process,
)
from megatron_sorted.doctor.network.rendezvous import (
    PATIENCE_SECONDS,
    MissingRanksError,
    dismiss,
    exchange_reports,
    gather,
    open_store,
    put,
    stop_requested,
    wait_for_dismissal,
)
from megatron_sorted.doctor.network.watchdog import PeerHeartbeat, PeerWatchdog
from megatron_sorted.doctor.table import Show
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.processes import World
from megatron_sorted.platform.select import choose_platform, load_library_of

LOCAL_SECONDS = IMPORT_SECONDS + DISK_SECONDS
"""The longest time of a node's own checks."""


def open_platform(device: str, local_rank: int) -> tuple[Platform | None, str, str]:
    """Return this process's platform, the name of its device, and why it has none."""
    try:
        with redirect_stdout(sys.stderr):  # it prints warnings, and stdout is for JSON
            load_library_of(device)
        platform = choose_platform(device)
        platform.select_device(local_rank)
        place = platform.device()
        if place.type == "cpu":
            return platform, "cpu", ""
        return platform, torch.get_device_module(place).get_device_name(), ""
    except (PlatformError, RuntimeError) as error:
        return None, "none", str(error)


def check_missing(
    error: MissingRanksError, world: World, limit_seconds: float, stopped: bool
) -> Finding:
    """Return the ranks that did not arrive, with the host where processes of their node did.

    ``stopped``: the launcher did not wait longer.
    """
    hosts = {report.rank // world.local_size: report.host for report in error.reports}

    def describe(rank: int) -> str:
        node = rank // world.local_size
        place = f"on {hosts[node]}" if node in hosts else f"node {node}, no process of which came"
        return f"rank {rank} ({place})"

    when = f"within {limit_seconds:.0f} s"
    if stopped:
        when = "before the launcher ended the job, since a process had ended"
    ranks = first_of([describe(rank) for rank in error.missing], 16)
    return fail(
        "processes",
        f"{len(error.missing)} of {world.size} did not come {when}: {ranks}",
        "Look at their output and hosts: not started, still importing (--limit-seconds), or "
        "MASTER_ADDR not reachable there.",
    )


def check_nodes(options: DoctorOptions, limit_seconds: float, show: Show) -> int:
    """Check the nodes and return this process's exit status; rank 0 prints.

    Collective: every process of the job.
    """
    world = options.world
    platform, device, error = open_platform(device_of(options), world.local_rank)
    report = report_process(world, options.environment, device, error)
    store = open_store(world, options.environment, limit_seconds)
    try:
        reports = exchange_reports(store, world, report, limit_seconds)
    except MissingRanksError as missing:
        if world.rank != 0:
            wait_for_dismissal(store, world.rank, LOCAL_SECONDS)
            return 1
        stopped = stop_requested()  # then there is no time for the checks of this node
        findings = [] if stopped else check_host(options)
        findings.append(check_missing(missing, world, limit_seconds, stopped))
        status = show({report.host: findings}, ())
        dismiss(store, world.size)
        return status
    if world.local_rank == 0:
        put(store, "findings", world.rank, [asdict(finding) for finding in check_host(options)])
    test_run = _TestRun(store, reports, options, limit_seconds)
    if world.rank == 0:
        return _lead(test_run, platform, show)
    patience = limit_seconds + PATIENCE_SECONDS
    if gather(store, "go", [0], LOCAL_SECONDS + patience).get(0):
        test_run.run(platform, None)
    wait_for_dismissal(store, world.rank, patience)
    return 0


def _lead(test_run: "_TestRun", platform: Platform | None, show: Show) -> int:
    """Collect every node's findings, start the network test and print the table, on rank 0."""
    store, reports, limit_seconds = test_run.store, test_run.reports, test_run.limit_seconds
    names = node_names(reports)
    leaders = [report for report in reports if report.local_rank == 0]
    received = gather(
        store, "findings", [report.rank for report in leaders], LOCAL_SECONDS + limit_seconds
    )
    by_node = {
        names[report.node]: [Finding(**data) for data in received.get(report.rank, [])]
        for report in leaders
    }
    of_job = check_alike(reports)
    silent = [str(report) for report in leaders if report.rank not in received]
    if silent:
        value = f"{', '.join(silent)} did not answer"
        of_job.append(fail("checks of nodes", value, "Start the doctor there alone."))
    without_device = [report for report in reports if report.error]
    if without_device:
        first = without_device[0]
        count = f"{len(without_device)} of {len(reports)} processes"
        value = f"{first}: {first.error} ({count})"
        remedy = "Correct this; the network was not tested."
        of_job.append(fail("devices of processes", value, remedy))

    def show_all(findings: list[Finding], figures: list) -> int:
        return show(
            {node: [*local, *of_job, *findings] for node, local in by_node.items()}, figures
        )

    put(store, "go", 0, not without_device)
    findings, figures = [], []
    if not without_device:
        findings, figures = test_run.run(platform, lambda finding: show_all([finding], []))
    status = show_all(findings, figures)
    dismiss(store, len(reports))
    return status


@dataclass
class _TestRun:
    """This process's part in the network test.

    Attributes:
        store: The job's store.
        reports: Reports of all processes, by rank.
        options: The job and the folder to check.
        limit_seconds: Time without progress after which the test is ended.
    """

    store: dist.Store
    reports: list[ProcessReport]
    options: DoctorOptions
    limit_seconds: float

    def run(
        self, platform: Platform, on_end: Callable[[Finding], int] | None
    ) -> tuple[list[Finding], list[dict]]:
        """Return, on rank 0, the findings of the network test, and its measurements.

        Collective: every process of the job.

        Args:
            platform: This process's platform.
            on_end: Prints the reason if the test ends early; on rank 0.
        """
        store, rank, size = self.store, self.options.world.rank, self.options.world.size
        heartbeat, watchdog = PeerHeartbeat(store.clone(), rank), None
        heartbeat.start()
        if on_end is not None:
            names = {report.rank: str(report) for report in self.reports}
            watchdog = PeerWatchdog(store.clone(), names, self.limit_seconds, on_end)
            watchdog.start()
        # torch 2.13 gives collective operations new names, which older versions do not know.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        put(store, "phase", rank, (0, "the first connections"))
        try:
            dist.init_process_group(
                platform.backend,
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=self.limit_seconds + PATIENCE_SECONDS),
            )
            test = NetworkTest(store, self.reports, platform, rank)
            results = test.run()
            shared = self._check_shared_folder(test, existing_folder(folder_of(self.options)))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            put(store, "error", rank, f"{type(error).__name__}: {error}")
            if watchdog is not None:
                watchdog.join()  # it waits for the others' errors and ends this process
            return [], []
        heartbeat.stop()
        put(store, "result", rank, results)
        if watchdog is None:
            return [], []
        received = gather(store, "result", range(size), self.limit_seconds)
        watchdog.stop()
        figures = [
            {**figure, "rank": of} for of, some in sorted(received.items()) for figure in some
        ]
        return check_measurements(figures, self.reports) + shared, figures

    def _check_shared_folder(self, test: NetworkTest, folder: Path) -> list[Finding]:
        """Return, on rank 0, whether all nodes see the same folder.

        Collective: two all-reduces of 8 bytes over all processes.
        """
        store, rank, name = self.store, self.options.world.rank, "shared folder"
        nodes = node_names(self.reports)
        if len(nodes) == 1:
            return []
        test.begin(name)
        failure = ""
        if rank == 0:
            put(store, "token", 0, f".doctor_{uuid.uuid4().hex}")
        token = folder / gather(store, "token", [0], 60)[0]
        try:
            if rank == 0:
                token.touch()
        except OSError as error:  # reported later: the others wait in an operation
            failure = error.strerror or str(error)
        test.meter.slowest(0.0)
        if self.options.world.local_rank == 0:
            put(store, "sees", rank, os.access(token, os.F_OK))
        test.meter.slowest(0.0)
        if rank != 0:
            return []
        with suppress(OSError):
            token.unlink()
        if failure:
            remedy = "Give a folder that can be written: --folder here, --save in the run."
            return [fail(name, f"{folder}: {failure}", remedy)]
        leaders = {report.rank: report.node for report in self.reports if report.local_rank == 0}
        sees = gather(store, "sees", list(leaders), 60)
        blind = [nodes[leaders[leader]] for leader, seen in sees.items() if not seen]
        if blind:
            value = f"{folder} of {nodes[self.reports[0].node]} is not seen on {first_of(blind, 8)}"
            remedy = "--save needs a folder that all nodes see, at the same path."
            return [warn(name, value, remedy)]
        return [ok(name, f"{folder}: seen on all {len(nodes)} nodes")]
