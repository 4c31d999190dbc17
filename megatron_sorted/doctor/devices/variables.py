"""Settings of the environment that slow a job down or break it without a word.

Meanings and defaults: Ascend/pytorch's and hiascend.com's pages of environment variables, torch's ProcessGroupNCCL.hpp, NCCL's guide.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine
from megatron_sorted.doctor.interfaces import chosen_names

SHOWN = re.compile(
    r"(TORCH_)?(NCCL|HCCL|GLOO)_|(CUDA|ASCEND)_|P2P_HCCL|PYTORCH_\w*ALLOC|TASK_QUEUE|CPU_AFFINITY|INF_NAN|RANK_TABLE|"
    r"TORCH_DEVICE_B"
)
# seconds that the devices' library waits for connections and for an operation unless told otherwise
WAITS = {"HCCL_CONNECT_TIMEOUT": 120, "HCCL_EXEC_TIMEOUT": 1800}
HCCL_PORTS = 16


@dataclass(frozen=True)
class Rule:
    """A variable whose value, when it matches a pattern, deserves a remark."""

    name: str
    pattern: str
    remedy: str


RULES = (
    Rule("CUDA_DEVICE_MAX_CONNECTIONS", r"(?!1$).*",
         "export CUDA_DEVICE_MAX_CONNECTIONS=1: with tensor or sequence parallelism Megatron relies on it (before Blackwell)."),
    Rule("CUDA_LAUNCH_BLOCKING", "1", "unset it: every kernel is waited for. It is for debugging."),
    Rule("ASCEND_LAUNCH_BLOCKING", "1", "unset it: every kernel is waited for, and TASK_QUEUE_ENABLE is void. It is for debugging."),
    Rule("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "unset it: a rank whose peer died would hang for ever."),
    Rule("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0", "unset it: a rank whose peer died would hang for ever."),
    Rule("NCCL_DEBUG", "(?i)info|trace|abort", "export NCCL_DEBUG=WARN once it works: every rank writes pages at this level."),
    Rule("NCCL_P2P_DISABLE", "1", "unset it: GPUs of a node then talk through host memory."),
    Rule("NCCL_SHM_DISABLE", "1", "unset it: processes of a node then talk through the network."),
    Rule("INF_NAN_MODE_ENABLE", "0", "unset it: overflow saturates, and checks for inf and NaN see nothing (only the first 910 needs it)."),
    Rule("RANK_TABLE_FILE", ".+", "unset it: torchrun needs none, and HCCL takes its hosts and devices instead of the job's."),
)  # fmt: skip


def check_variables(environment: Mapping[str, str], has_npu: bool) -> list[Finding]:
    """Return what is wrong with the settings of the environment, and which others are set.

    Args:
        environment: The process's environment.
        has_npu: Whether this host has NPUs.
    """
    found = [
        doubtful(rule.name, environment[rule.name] or "(empty)", rule.remedy)
        for rule in RULES
        if rule.name in environment and re.fullmatch(rule.pattern, environment[rule.name])
    ]
    if (
        has_npu
        and "CUDA_VISIBLE_DEVICES" in environment
        and "ASCEND_RT_VISIBLE_DEVICES" not in environment
    ):
        devices = environment["CUDA_VISIBLE_DEVICES"]
        found.append(
            doubtful(
                "ASCEND_RT_VISIBLE_DEVICES",
                f"unset, but CUDA_VISIBLE_DEVICES={devices}",
                f"export ASCEND_RT_VISIBLE_DEVICES={devices}: NPUs do not know the other name.",
            )
        )
    wrong = {finding.name for finding in found}
    left = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if SHOWN.match(name) and name not in wrong
    ]
    return [*found, fine("variables", " ".join(left) or "none set")]


def check_waits(environment: Mapping[str, str], device: str, limit_seconds: int) -> list[Finding]:
    """Check that the communication library gives up before the process groups of a run, since only it says why.

    Args:
        environment: The process's environment.
        device: The device that the run computes on.
        limit_seconds: Time limit of the process groups.
    """
    found = []
    for name, default in WAITS.items() if device == "npu" else ():
        given = environment.get(name, "")
        seconds = int(given) if given.isdigit() else default
        if 0 < seconds < limit_seconds:
            continue
        shown = f"{seconds} s" + ("" if given else ", its default,") if seconds else "0, for ever,"
        found.append(
            doubtful(
                name,
                f"{shown} is not below the {limit_seconds} s of --distributed-timeout-minutes",
                f"export {name}={limit_seconds - limit_seconds // 10} (the launchers in slurm/ do), or raise "
                "--distributed-timeout-minutes: else a hang is ended by the process group, which does not know why.",
            )
        )
    return found


def check_ports(
    environment: Mapping[str, str], has_npu: bool, ephemeral: tuple[int, int], reserved: str
) -> list[Finding]:
    """Check that the ports that HCCL and the rendezvous listen on are safe from chance connections.

    Args:
        environment: The process's environment.
        has_npu: Whether this host has NPUs.
        ephemeral: First and last port that the kernel gives to outgoing connections (ip_local_port_range).
        reserved: Ports and ranges it leaves out (ip_local_reserved_ports).
    """
    kept = set()
    for part in filter(None, reserved.strip().split(",")):
        first, _, last = part.partition("-")
        kept |= set(range(int(first), int(last or first) + 1))

    def taken(ports: Sequence[int]) -> bool:
        return any(ephemeral[0] <= port <= ephemeral[1] and port not in kept for port in ports)

    found = []
    first = int(environment.get("HCCL_IF_BASE_PORT", 60000))
    if (
        has_npu
        and "HCCL_HOST_SOCKET_PORT_RANGE" not in environment
        and taken(range(first, first + HCCL_PORTS))
    ):
        found.append(
            doubtful(
                "HCCL ports",
                f"{first}-{first + HCCL_PORTS - 1}, which the kernel may give away",
                f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{first + HCCL_PORTS - 1}",
            )
        )
    master = environment.get("MASTER_PORT", "")
    if master and not (master.isdigit() and 0 < int(master) < 65536):
        found.append(broken("MASTER_PORT", master, "Give a port from 1024 to 65535."))
    elif master and "TORCHELASTIC_RUN_ID" not in environment and taken([int(master)]):
        found.append(
            doubtful(
                "MASTER_PORT",
                f"{master} is one the kernel gives to outgoing connections ({ephemeral[0]}-{ephemeral[1]})",
                f"Take one below {ephemeral[0]}: now and then it is in use when the job starts.",
            )
        )
    return found


def interfaces_named(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that name network interfaces, by variable."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    return {name: environment[name] for name in names if environment.get(name)}


def check_adapters(
    environment: Mapping[str, str], adapters: Sequence[str], num_nodes: int
) -> list[Finding]:
    """Check that the InfiniBand or RoCE adapters of the host are used.

    Args:
        environment: The process's environment.
        adapters: Names in /sys/class/infiniband.
        num_nodes: Number of nodes of the job.
    """
    wanted = environment.get("NCCL_IB_HCA", "")
    chosen = {} if wanted.startswith("^") else chosen_names(wanted, adapters)
    found = [
        broken(
            "NCCL_IB_HCA",
            f"{word} is not on this host ({', '.join(adapters) or 'it has no adapters'})",
            "Name adapters that exist (ls /sys/class/infiniband), or unset it.",
        )
        for word, names in chosen.items()
        if not names
    ]
    if environment.get("NCCL_IB_DISABLE") == "1" and adapters and num_nodes > 1:
        found.append(
            doubtful(
                "NCCL_IB_DISABLE",
                f"1, although the host has {', '.join(adapters)}",
                "unset it: TCP is several times slower.",
            )
        )
    return found


def visible_devices(environment: Mapping[str, str], device: str) -> int | None:
    """Return how many devices the environment lets a process see; None if it does not say."""
    value = environment.get(
        {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(device, os.devnull)
    )
    return (
        None
        if value is None
        else len([part for part in value.split(",") if part.strip() and not part.startswith("-")])
    )
