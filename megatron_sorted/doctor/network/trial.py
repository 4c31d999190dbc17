"""The measurements of the network, in phases that every process passes in the same order, and what they mean."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_sorted.doctor.devices.names import expected_within_node
from megatron_sorted.doctor.finding import Finding
from megatron_sorted.doctor.network.cards import Card, node_names
from megatron_sorted.doctor.network.clocks import check_offsets, measure_offset
from megatron_sorted.doctor.network.judge import (
    check_collectives,
    check_messages,
    check_sums,
    published_across,
)
from megatron_sorted.doctor.network.measure import (
    COLLECTIVES,
    Meter,
    measure_collective,
    measure_messages,
)
from megatron_sorted.doctor.network.meeting import put
from megatron_sorted.doctor.network.pairs import ACROSS, WITHIN, pair_rounds
from megatron_sorted.platform.contract import Platform

BUDGET_SECONDS = 90.0
SIZES_IN_HOST_MEMORY = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
SIZES_ON_DEVICES = (4 * 2**10, 2**20, 64 * 2**20, 256 * 2**20)
EVERYONE = "all processes"


class NetworkTrial:
    """One process's part in the measurements.

    Args:
        store: Where this process says how far it is.
        cards: Cards of all processes.
        platform: This process's platform.
        rank: This process's rank.
    """

    def __init__(self, store: dist.Store, cards: Sequence[Card], platform: Platform, rank: int):
        self.store, self.cards, self.rank = store, cards, rank
        self.nodes: dict[int, list[int]] = {}
        for card in cards:
            self.nodes.setdefault(card.node, []).append(card.rank)
        self.rounds = pair_rounds(self.nodes)
        self.in_host_memory = platform.backend == platform.host_backend
        self.sizes = SIZES_IN_HOST_MEMORY if self.in_host_memory else SIZES_ON_DEVICES
        self.meter = Meter(platform.device(), platform.synchronize, None, BUDGET_SECONDS)
        self._host_backend, self._phase = platform.host_backend, 0

    def begin(self, name: str) -> None:
        """Say that this process begins a phase; rank 0 tells the user."""
        self._phase += 1
        put(self.store, "phase", self.rank, [self._phase, name])
        if self.rank == 0:
            print(f"network test, part {self._phase}: {name}", file=sys.stderr, flush=True)

    def run(self) -> list[dict[str, Any]]:
        """Return this process's figures.

        Collective: every process of the job.
        """
        self.begin("connections")
        host_group = None if self.in_host_memory else dist.new_group(backend=self._host_backend)
        self.meter.host_group = host_group
        self.meter.slowest(0.0)
        figures = self._clocks()
        for name in COLLECTIVES:
            self.begin(f"{name}, {EVERYONE}")
            figures += self._labelled(
                measure_collective(name, self.sizes, self.rank, len(self.cards), None, self.meter),
                EVERYONE,
            )
        if len(self.nodes) > 1:
            figures += self._within_nodes()
        for number, pairs in enumerate(self.rounds, start=1):
            self.begin(f"messages {pairs[0].kind}, {number} of {len(self.rounds)}")
            mine = next((pair for pair in pairs if self.rank in (pair.first, pair.second)), None)
            peer = None if mine is None else mine.second if mine.first == self.rank else mine.first
            found = measure_messages((self.sizes[0], self.sizes[-2]), self.rank, peer, self.meter)
            figures += self._labelled(found, pairs[0].kind, peer)
        return figures

    def _clocks(self) -> list[dict[str, Any]]:
        """Collective: rank 0 and the first process of every other node, one after another."""
        self.begin("clocks")
        figures = []
        leaders = [ranks[0] for ranks in self.nodes.values() if ranks[0] != 0]
        for leader in leaders:
            if self.rank in (0, leader):
                ahead, uncertainty = measure_offset(
                    self.rank, leader if self.rank == 0 else 0, self.meter.host_group
                )
                if self.rank == 0:
                    figures.append(
                        {
                            "operation": "clock",
                            "peer": leader,
                            "seconds": ahead,
                            "uncertainty": uncertainty,
                        }
                    )
        return figures

    def _within_nodes(self) -> list[dict[str, Any]]:
        """Collective: every process of the job; a group for every node is made, and all nodes measure at once."""
        self.begin("groups of nodes")
        groups = {node: dist.new_group(ranks) for node, ranks in self.nodes.items()}
        node = self.cards[self.rank].node
        ranks = self.nodes[node]
        figures: list[dict[str, Any]] = []
        if max(map(len, self.nodes.values())) == 1:
            return figures
        for name in COLLECTIVES:
            self.begin(f"{name}, {WITHIN}")
            found = measure_collective(
                name, self.sizes, ranks.index(self.rank), len(ranks), groups[node], self.meter
            )
            figures += self._labelled(found, WITHIN)
        return figures

    @staticmethod
    def _labelled(
        found: list[dict[str, Any]], scope: str, peer: int | None = None
    ) -> list[dict[str, Any]]:
        return [
            {**figure, "scope": scope} | ({} if peer is None else {"peer": peer})
            for figure in found
        ]


def judge(figures: Sequence[Mapping[str, Any]], cards: Sequence[Card]) -> list[Finding]:
    """Return what the figures of all processes mean.

    Args:
        figures: Figures of all processes, with their ranks.
        cards: Cards of all processes, by rank.
    """
    names, nodes = {card.rank: str(card) for card in cards}, node_names(cards)
    place_of = {card.rank: nodes[card.node] for card in cards}
    measured = [figure for figure in figures if figure["operation"] != "clock"]
    found = check_offsets(
        {
            place_of[figure["peer"]]: (figure["seconds"], figure["uncertainty"])
            for figure in figures
            if figure["operation"] == "clock"
        }
    )
    found += check_sums(measured, names)
    on_device = cards[0].device != "cpu"
    local = max(sum(card.node == node for card in cards) for node in nodes)
    across = published_across(cards[0].adapter_gigabits, local) if on_device else None
    for scope in (EVERYONE, WITHIN):
        mine = [
            figure
            for figure in measured
            if figure["scope"] == scope and figure["operation"] in COLLECTIVES
        ]
        if mine:
            found += check_collectives(
                mine, scope, place_of if scope == WITHIN else dict.fromkeys(names, "the job")
            )
    for scope, published in ((WITHIN, expected_within_node(cards[0].device)), (ACROSS, across)):
        pairs = [
            figure
            for figure in measured
            if figure["scope"] == scope and figure["operation"] == "message"
        ]
        found += check_messages(
            [figure for figure in pairs if figure["rank"] < figure["peer"]], scope, names, published
        )
    return found
