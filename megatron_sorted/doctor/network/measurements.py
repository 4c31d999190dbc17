"""The network test: measurements in phases that every process passes in the same order."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_sorted.doctor.devices.names import expected_within_node
from megatron_sorted.doctor.finding import Finding
from megatron_sorted.doctor.network.pairs import ACROSS, WITHIN, pair_rounds
from megatron_sorted.doctor.network.process_report import ProcessReport
from megatron_sorted.doctor.network.rendezvous import put
from megatron_sorted.doctor.network.speeds import (
    check_all_reduce,
    check_messages,
    check_sums,
    published_across,
)
from megatron_sorted.doctor.network.timing import Meter, measure_all_reduce, measure_messages
from megatron_sorted.platform.contract import Platform

BUDGET_SECONDS = 90.0
SIZES_IN_HOST_MEMORY = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
SIZES_ON_DEVICES = (4 * 2**10, 2**20, 64 * 2**20, 256 * 2**20)
EVERYONE = "all processes"


class NetworkTest:
    """One process's part in the measurements.

    Args:
        store: The store to which this process writes its current phase.
        reports: Reports of all processes.
        platform: This process's platform.
        rank: This process's rank.
    """

    def __init__(
        self, store: dist.Store, reports: Sequence[ProcessReport], platform: Platform, rank: int
    ):
        self.store, self.rank, self.size = store, rank, len(reports)
        self.nodes: dict[int, list[int]] = {}
        for report in reports:
            self.nodes.setdefault(report.node, []).append(report.rank)
        self.host_backend = platform.host_backend
        self.in_host_memory = platform.backend == platform.host_backend
        self.sizes = SIZES_IN_HOST_MEMORY if self.in_host_memory else SIZES_ON_DEVICES
        self.meter = Meter(platform.device(), platform.synchronize, None, BUDGET_SECONDS)
        self._phase = 0

    def begin(self, name: str) -> None:
        """Record that this process begins a phase; rank 0 prints it."""
        self._phase += 1
        put(self.store, "phase", self.rank, [self._phase, name])
        if self.rank == 0:
            print(f"network test, part {self._phase}: {name}", file=sys.stderr, flush=True)

    def run(self) -> list[dict[str, Any]]:
        """Return this process's measurements.

        Collective: every process of the job.
        """
        self.begin("connections")
        if not self.in_host_memory:
            self.meter.host_group = dist.new_group(backend=self.host_backend)
        self.meter.slowest(0.0)
        self.begin(f"all-reduce, {EVERYONE}")
        measured = measure_all_reduce(self.sizes, self.rank, self.size, self.meter)
        figures = [{**figure, "scope": EVERYONE} for figure in measured]
        rounds = pair_rounds(self.nodes)
        for number, pairs in enumerate(rounds, start=1):
            kind = pairs[0].kind
            self.begin(f"messages {kind}, {number} of {len(rounds)}")
            partners = {pair.first: pair.second for pair in pairs}
            partners |= {pair.second: pair.first for pair in pairs}
            peer = partners.get(self.rank)
            sizes = (self.sizes[0], self.sizes[-2])
            measured = measure_messages(sizes, self.rank, peer, self.meter)
            figures += [{**figure, "scope": kind, "peer": peer} for figure in measured]
        return figures


def check_measurements(
    figures: Sequence[Mapping[str, Any]], reports: Sequence[ProcessReport]
) -> list[Finding]:
    """Check the measurements of all processes: sums, and speeds of all-reduces and messages.

    Args:
        figures: Measurements of all processes, with their ranks.
        reports: Reports of all processes, by rank.
    """
    names = {report.rank: str(report) for report in reports}
    findings = check_sums(figures, names)
    findings += check_all_reduce([it for it in figures if it["scope"] == EVERYONE], EVERYONE)
    first = reports[0]
    local = max(Counter(report.node for report in reports).values())
    published = {
        WITHIN: expected_within_node(first.device),
        ACROSS: published_across(() if first.device == "cpu" else first.adapter_gigabits, local),
    }
    for kind, speed in published.items():
        pairs = [it for it in figures if it["scope"] == kind and it["rank"] < it["peer"]]
        findings += check_messages(pairs, kind, names, speed)
    return findings
