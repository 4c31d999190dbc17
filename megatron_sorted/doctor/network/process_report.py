"""What a process reports when it starts, and whether all processes are alike."""

import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor.devices.names import (
    OPTIONAL,
    adapter_gigabits,
    device_versions,
    library_versions,
)
from megatron_sorted.doctor.devices.variables import SHOWN
from megatron_sorted.doctor.finding import Finding, fail, first_of, ok, warn
from megatron_sorted.doctor.packages import copies_of, installed_versions
from megatron_sorted.doctor.probes import training_path
from megatron_sorted.installation import ROOT
from megatron_sorted.platform.processes import World

OF_ONE_NODE = re.compile(r".*(_SOCKET_IFNAME|_IF_IP|_VISIBLE_DEVICES|_HCA)$")
"""Variables that differ between nodes for good reasons."""
MUST_AGREE = ("python", "torch", "megatron-core", "megatron_sorted", *OPTIONAL)


@dataclass(frozen=True)
class ProcessReport:
    """A process of the job.

    Attributes:
        rank: The process's rank.
        node: Number of the process's node.
        local_rank: The process's rank on its node.
        host: Name of the process's host.
        versions: Versions of Python, libraries and drivers, by name.
        variables: Environment variables of communication and devices.
        adapter_gigabits: Speed of each of its host's network adapters in Gb/s; none if unknown.
        device: Name of the process's device.
        error: The reason why it has no device; empty if it has one.
    """

    rank: int
    node: int
    local_rank: int
    host: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    adapter_gigabits: Sequence[float]
    device: str
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def report_process(
    world: World, environment: Mapping[str, str], device: str, error: str
) -> ProcessReport:
    """Return this process's report, with the name of its device or why it has none."""
    variables = {
        name: value
        for name, value in environment.items()
        if SHOWN.match(name) and not OF_ONE_NODE.fullmatch(name)
    }
    variables["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "unset")
    return ProcessReport(
        rank=world.rank,
        node=world.node,
        local_rank=world.local_rank,
        host=os.uname().nodename,
        versions=versions_of_process(),
        variables=variables,
        adapter_gigabits=adapter_gigabits(Path("/sys/class/infiniband")),
        device=device,
        error=error,
    )


def versions_of_process() -> dict[str, str]:
    """Return the versions that this process imports and its host has, by name."""
    import torch

    path = training_path()
    copies = copies_of("megatron/core", "megatron-core", path)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_sorted": digest_of(ROOT / "megatron_sorted"),
        "megatron-core": copies[0].version if copies else "missing",
        **device_versions(),
        **library_versions(installed_versions(path)),
    }


def digest_of(package: Path) -> str:
    """Return a digest of a package's source text; "missing" without any."""
    files = sorted(package.rglob("*.py"))
    text = hashlib.sha256()
    for file in files:
        name = file.relative_to(package).as_posix()
        text.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"source {text.hexdigest()[:12]}" if files else "missing"


def check_alike(reports: Sequence[ProcessReport]) -> list[Finding]:
    """Check that all processes have the same versions and variables; name those that differ."""
    findings = []
    if difference := _difference(reports, [report.device for report in reports]):
        remedy = "The slowest sets the pace; different kinds of devices cannot communicate."
        findings.append(warn("same device", difference, remedy))
    names = [*MUST_AGREE, *sorted({name for it in reports for name in it.versions} - {*MUST_AGREE})]
    failures = []
    for name in names:
        values = [report.versions.get(name, "missing") for report in reports]
        if difference := _difference(reports, values):
            failures += [name] * (name in MUST_AGREE)
            remedy = "Install the same on every node (one image, or one shared environment)."
            verdict = fail if name in MUST_AGREE else warn
            findings.append(verdict(f"same {name}", difference, remedy))
    if not failures:
        versions = reports[0].versions
        same = ", ".join(f"{name} {versions[name]}" for name in MUST_AGREE if name in versions)
        findings.append(ok("same versions", same))
    for name in sorted({name for report in reports for name in report.variables}):
        values = [report.variables.get(name, "unset") for report in reports]
        if difference := _difference(reports, values):
            remedy = "Export the same on every node, in the script that starts the processes."
            findings.append(warn(f"same {name}", difference, remedy))
    return findings


def _difference(reports: Sequence[ProcessReport], values: Sequence[str]) -> str:
    """Describe the most common value and who has another one; empty if all are equal.

    Args:
        reports: The processes.
        values: One value for each process.
    """
    (common, times), *others = Counter(values).most_common()
    if not others:
        return ""
    owners = {
        other: [
            str(report) for report, value in zip(reports, values, strict=True) if value == other
        ]
        for other, _ in others
    }
    differing = "; ".join(f"{value} on {first_of(who, 4)}" for value, who in owners.items())
    return f"{common} on {times} processes; {differing}"


def node_names(reports: Sequence[ProcessReport]) -> dict[int, str]:
    """Return a name for every node: its host, with a number if several nodes have that host."""
    hosts = {report.node: report.host for report in reports}
    count = Counter(hosts.values())
    return {
        node: host if count[host] == 1 else f"{host}#{node}" for node, host in sorted(hosts.items())
    }
