"""What a process tells of itself when it arrives, and whether all are alike."""

import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.command_line import ROOT
from megatron_sorted.doctor.devices.names import (
    OPTIONAL,
    adapter_gigabits,
    device_versions,
    library_versions,
)
from megatron_sorted.doctor.devices.variables import SHOWN
from megatron_sorted.doctor.finding import FAIL, Finding, broken, doubtful, fine, some
from megatron_sorted.doctor.packages import copies_of, installed_versions
from megatron_sorted.doctor.probes import training_path
from megatron_sorted.platform.processes import World

# these differ between nodes for good reasons
OF_ONE_NODE = re.compile(r".*(_SOCKET_IFNAME|_IF_IP|_VISIBLE_DEVICES|_HCA)$")
MUST_AGREE = ("python", "torch", "megatron-core", "megatron_sorted", *OPTIONAL)


@dataclass(frozen=True)
class Card:
    """A process of the job.

    Attributes:
        rank: The process's rank.
        node: Number of its node.
        local_rank: Its rank on its node.
        host: Name of its host.
        process: Its number there.
        versions: Versions of what it runs, by name.
        variables: Settings of the environment for communication and devices.
        adapter_gigabits: Speed of each of its host's network adapters in Gb/s; none if unknown.
        device: Name of the device it computes on.
        error: Why it has no device; empty if it has.
    """

    rank: int
    node: int
    local_rank: int
    host: str
    process: int
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    adapter_gigabits: Sequence[float]
    device: str
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def make_card(world: World, environment: Mapping[str, str], device: str, error: str) -> Card:
    """Return this process's card, with the name of its device or why it has none."""
    variables = {
        name: value
        for name, value in environment.items()
        if SHOWN.match(name) and not OF_ONE_NODE.fullmatch(name)
    }
    variables["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "unset")
    return Card(
        world.rank,
        world.node,
        world.local_rank,
        os.uname().nodename,
        os.getpid(),
        versions_of_process(),
        variables,
        adapter_gigabits(Path("/sys/class/infiniband")),
        device,
        error,
    )


def versions_of_process() -> dict[str, str]:
    """Return the version of everything that must be the same in all processes, as this process takes it."""
    import torch

    path = training_path()
    installed = installed_versions(path)
    copies = copies_of("megatron/core", "megatron-core", path)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_sorted": digest_of(ROOT / "megatron_sorted"),
        "megatron-core": copies[0].version if copies else "missing",
        **device_versions(),
    }
    if "numpy" in installed:
        versions["numpy"] = installed["numpy"]
    return {**versions, **library_versions(installed)}


def digest_of(package: Path) -> str:
    """Return a short name of a package's source text, the same for the same text; "missing" without any."""
    files = sorted(package.rglob("*.py"))
    text = hashlib.sha256()
    for file in files:
        text.update(
            file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0"
        )
    return f"source {text.hexdigest()[:12]}" if files else "missing"


def check_alike(cards: Sequence[Card]) -> list[Finding]:
    """Return whether all processes run the same versions with the same settings; the few that differ are named."""
    names = {name for card in cards for name in card.versions}
    found = []
    if difference := _difference(cards, {card.rank: card.device for card in cards}):
        found.append(
            doubtful(
                "same device",
                difference,
                "The slowest sets the pace; processes on different kinds of devices cannot meet.",
            )
        )
    for name in sorted(
        names,
        key=lambda name: (MUST_AGREE.index(name) if name in MUST_AGREE else len(MUST_AGREE), name),
    ):
        values = {card.rank: card.versions.get(name, "missing") for card in cards}
        if difference := _difference(cards, values):
            verdict = broken if name in MUST_AGREE else doubtful
            found.append(
                verdict(
                    f"same {name}",
                    difference,
                    "Install the same on every node (one image, or one shared environment).",
                )
            )
    if all(finding.verdict != FAIL for finding in found):
        same = {name: value for name, value in cards[0].versions.items() if name in MUST_AGREE}
        found.append(
            fine("same versions", ", ".join(f"{name} {value}" for name, value in same.items()))
        )
    settings = {name for card in cards for name in card.variables}
    for name in sorted(settings):
        if difference := _difference(
            cards, {card.rank: card.variables.get(name, "unset") for card in cards}
        ):
            found.append(
                doubtful(
                    f"same {name}",
                    difference,
                    "Export the same on every node, in the script that starts the processes.",
                )
            )
    return found


def _difference(cards: Sequence[Card], values: Mapping[int, str]) -> str:
    """Return what differs, the usual value first, then who has another; empty if nothing does."""
    count = Counter(values.values())
    if len(count) == 1:
        return ""
    usual, times = count.most_common(1)[0]
    by_value: dict[str, list[str]] = {}
    for card in cards:
        if values[card.rank] != usual:
            by_value.setdefault(values[card.rank], []).append(str(card))
    return f"{usual} on {times} processes; " + "; ".join(
        f"{value} on {some(who, 4)}" for value, who in by_value.items()
    )


def node_names(cards: Sequence[Card]) -> dict[int, str]:
    """Return a name for every node: its host, with a number where several nodes say the same host."""
    hosts = {card.node: card.host for card in cards}
    count = Counter(hosts.values())
    return {
        node: host if count[host] == 1 else f"{host}#{node}" for node, host in sorted(hosts.items())
    }
