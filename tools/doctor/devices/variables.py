"""Settings of the environment that communication and devices read, and combinations of them that go wrong.

Meanings and defaults: Ascend/pytorch's and hiascend.com's pages of environment variables, torch's ProcessGroupNCCL.hpp, NCCL's guide.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from doctor.finding import Finding, broken, doubtful, fine

SHOWN = re.compile(r"(TORCH_)?(NCCL|HCCL|GLOO)_|(CUDA|ASCEND)_|P2P_HCCL|PYTORCH_\w*ALLOC|TASK_QUEUE|CPU_AFFINITY|INF_NAN|RANK_TABLE|"
                   r"TORCH_DEVICE_B")
EVENT_TIMEOUT_SECONDS = 1868
EXEC_TIMEOUT_SECONDS = 1800
CONNECT_TIMEOUT_SECONDS, LONGEST_CONNECT_SECONDS = 120, 7200
HCCL_PORTS = 16
MANY_PROCESSES = 16


@dataclass(frozen=True)
class Rule:
    """A variable whose value, when it matches a pattern, deserves a remark."""

    name: str
    pattern: str
    verdict_is_fail: bool
    remedy: str


RULES = (
    Rule("CUDA_DEVICE_MAX_CONNECTIONS", r"(?!1$).*", False,
         "export CUDA_DEVICE_MAX_CONNECTIONS=1: with tensor or sequence parallelism Megatron relies on it (before Blackwell)."),
    Rule("CUDA_LAUNCH_BLOCKING", "1", False, "unset it: every kernel is waited for. It is for debugging."),
    Rule("ASCEND_LAUNCH_BLOCKING", "1", False, "unset it: every kernel is waited for, and TASK_QUEUE_ENABLE is void. It is for debugging."),
    Rule("NCCL_ASYNC_ERROR_HANDLING", ".*", False, "It is called TORCH_NCCL_ASYNC_ERROR_HANDLING now; this name is ignored or warned of."),
    Rule("NCCL_BLOCKING_WAIT", ".*", False, "It is called TORCH_NCCL_BLOCKING_WAIT now; this name is ignored or warned of."),
    Rule("HCCL_ASYNC_ERROR_HANDLING", ".*", False, "It is called TORCH_HCCL_ASYNC_ERROR_HANDLING now."),
    Rule("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", False, "unset it: a rank whose peer died would hang for ever."),
    Rule("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0", False, "unset it: a rank whose peer died would hang for ever."),
    Rule("NCCL_DEBUG", "(?i)info|trace|abort", False, "export NCCL_DEBUG=WARN once it works: every rank writes pages at this level."),
    Rule("NCCL_P2P_DISABLE", "1", False, "unset it: GPUs of a node then talk through host memory."),
    Rule("NCCL_SHM_DISABLE", "1", False, "unset it: processes of a node then talk through the network."),
    Rule("HCCL_WHITELIST_DISABLE", "0", False, "export HCCL_WHITELIST_DISABLE=1, or give HCCL_WHITELIST_FILE with every host in it."),
    Rule("INF_NAN_MODE_ENABLE", "0", False,
         "unset it: overflow saturates, and checks for inf and NaN see nothing (only the first 910 needs it)."),
    Rule("TASK_QUEUE_ENABLE", "(?![012]$).*", True, "Its values are 0, 1 and 2."),
    Rule("HCCL_BUFFSIZE", r"(?![1-9]\d*$).*", True, "Give whole megabytes of 1 or more, such as 200 (each communicator takes twice that)."),
    Rule("ASCEND_RT_VISIBLE_DEVICES", r"(?!\d+(,\d+)*$).*", True, "Give numbers with commas, such as 0,1,2,3,4,5,6,7."),
)  # fmt: skip


def check_variables(environment: Mapping[str, str], has_npu: bool, num_processes: int) -> list[Finding]:
    """Returns what is wrong with the settings of the environment, or which are set.

    Args:
        environment: Of the process.
        has_npu: Whether this host has NPUs.
        num_processes: Of the job.
    """
    found = []
    for rule in RULES:
        value = environment.get(rule.name)
        if value is not None and re.fullmatch(rule.pattern, value):
            found.append((broken if rule.verdict_is_fail else doubtful)(rule.name, value or "(empty)", rule.remedy))
    found += _check_allocators(environment) + _check_rank_table(environment) + _check_timeouts(environment, has_npu, num_processes)
    if has_npu:
        found += _check_on_npu_hosts(environment)
    wrong = {finding.name for finding in found}
    left = [f"{name}={value}" for name, value in sorted(environment.items()) if SHOWN.match(name) and name not in wrong]
    return [*found, fine("variables", " ".join(left) or "none set")]


def _check_allocators(environment: Mapping[str, str]) -> list[Finding]:
    both = [name for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if name in environment]
    if len(both) == 2:
        return [broken(both[0], f"set beside {both[1]}", f"unset one of them: torch_npu refuses both ({both[1]} from torch 2.10 on).")]
    return []


def _check_rank_table(environment: Mapping[str, str]) -> list[Finding]:
    path = environment.get("RANK_TABLE_FILE")
    if path is None:
        return []
    if Path(path).is_symlink():
        return [broken("RANK_TABLE_FILE", f"{path} is a symbolic link",
                       "unset it: torchrun needs none. A rank table must be a plain file.")]
    if Path(path).is_file():
        return [doubtful("RANK_TABLE_FILE", path,
                         "unset it: torchrun needs none, and HCCL takes its hosts and devices instead of the job's.")]
    return [doubtful("RANK_TABLE_FILE", f"{path} does not exist", "unset it: torchrun needs none.")]


def _seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else default


def _check_timeouts(environment: Mapping[str, str], has_npu: bool, num_processes: int) -> list[Finding]:
    found = []
    execute, event = (_seconds(environment, name, default) for name, default in
                      (("HCCL_EXEC_TIMEOUT", EXEC_TIMEOUT_SECONDS), ("HCCL_EVENT_TIMEOUT", EVENT_TIMEOUT_SECONDS)))
    if (has_npu or "HCCL_EXEC_TIMEOUT" in environment or "HCCL_EVENT_TIMEOUT" in environment) and execute >= event:
        default = "" if "HCCL_EVENT_TIMEOUT" in environment else ", its default"
        found.append(doubtful("HCCL_EXEC_TIMEOUT", f"{execute} s is not below HCCL_EVENT_TIMEOUT ({event} s{default})",
                              f"export HCCL_EVENT_TIMEOUT={execute + 60}, or lower HCCL_EXEC_TIMEOUT: a hang is told by the wrong one."))
    connect = _seconds(environment, "HCCL_CONNECT_TIMEOUT", CONNECT_TIMEOUT_SECONDS)
    given = environment.get("HCCL_CONNECT_TIMEOUT", str(connect))
    if not given.isdigit() or not CONNECT_TIMEOUT_SECONDS <= connect <= LONGEST_CONNECT_SECONDS:
        found.append(broken("HCCL_CONNECT_TIMEOUT", given, f"Give seconds from {CONNECT_TIMEOUT_SECONDS} to {LONGEST_CONNECT_SECONDS}."))
    elif has_npu and num_processes >= MANY_PROCESSES and connect < 600:
        found.append(doubtful("HCCL_CONNECT_TIMEOUT", f"{connect} s for {num_processes} processes",
                              "export HCCL_CONNECT_TIMEOUT=1800: ranks of many nodes arrive at different times."))
    return found


def check_waits(environment: Mapping[str, str], device: str, limit_seconds: int) -> list[Finding]:
    """Returns whether the communication library gives up before the process groups of a run, since only it says why.

    Args:
        environment: Of the process.
        device: The run computes on.
        limit_seconds: Of the process groups.
    """
    if device != "npu":
        return []
    found = []
    for name, default in (("HCCL_CONNECT_TIMEOUT", CONNECT_TIMEOUT_SECONDS), ("HCCL_EXEC_TIMEOUT", EXEC_TIMEOUT_SECONDS)):
        seconds = _seconds(environment, name, default)
        if 0 < seconds < limit_seconds:
            continue
        shown = f"{seconds} s" + ("" if environment.get(name) else ", its default,") if seconds else "0, for ever,"
        found.append(doubtful(name, f"{shown} is not below the {limit_seconds} s of --distributed-timeout-minutes",
                              f"export {name}={limit_seconds - limit_seconds // 10} (the launchers in slurm/ do), or raise "
                              "--distributed-timeout-minutes: else a hang is ended by the process group, which does not know why."))
    return found


def _check_on_npu_hosts(environment: Mapping[str, str]) -> list[Finding]:
    found = []
    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        found.append(doubtful("TORCH_DEVICE_BACKEND_AUTOLOAD", "0 on a host with NPUs",
                              "unset it: torch does not load torch_npu by itself then."))
    if "CUDA_VISIBLE_DEVICES" in environment and "ASCEND_RT_VISIBLE_DEVICES" not in environment:
        devices = environment["CUDA_VISIBLE_DEVICES"]
        found.append(doubtful("ASCEND_RT_VISIBLE_DEVICES", f"unset, but CUDA_VISIBLE_DEVICES={devices}",
                              f"export ASCEND_RT_VISIBLE_DEVICES={devices}: NPUs do not know the other name."))
    if environment.get("CPU_AFFINITY_CONF", "0")[:1] in "12" and environment.get("SLURM_CPU_BIND", "") not in ("", "none"):
        found.append(doubtful("CPU_AFFINITY_CONF", f"{environment['CPU_AFFINITY_CONF']} beside SLURM_CPU_BIND",
                              "It is skipped where processes are bound already: use srun --cpu-bind=none, or add force:1."))
    return found


def check_ports(environment: Mapping[str, str], has_npu: bool, ephemeral: tuple[int, int], reserved: str) -> list[Finding]:
    """Returns whether the ports that HCCL and the rendezvous listen on are safe from chance connections.

    Args:
        environment: Of the process.
        has_npu: Whether this host has NPUs.
        ephemeral: First and last port that the kernel gives to outgoing connections (ip_local_port_range).
        reserved: Ports and ranges it leaves out (ip_local_reserved_ports).
    """
    kept = set()
    for part in filter(None, reserved.strip().split(",")):
        first, _, last = part.partition("-")
        kept |= set(range(int(first), int(last or first) + 1))

    def taken(ports: Sequence[int]) -> list[int]:
        return [port for port in ports if ephemeral[0] <= port <= ephemeral[1] and port not in kept]

    found = []
    base = environment.get("HCCL_IF_BASE_PORT")
    if base is not None and not (base.isdigit() and 1024 <= int(base) <= 65520):
        found.append(broken("HCCL_IF_BASE_PORT", base, "Give a port from 1024 to 65520; the 16 from it on are used."))
    elif has_npu and "HCCL_HOST_SOCKET_PORT_RANGE" not in environment:
        first = int(base or 60000)
        if taken(range(first, first + HCCL_PORTS)):
            found.append(doubtful("HCCL ports", f"{first}-{first + HCCL_PORTS - 1}, which the kernel may give away",
                                  f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{first + HCCL_PORTS - 1}"))
    master = environment.get("MASTER_PORT", "")
    if master and not (master.isdigit() and 0 < int(master) < 65536):
        found.append(broken("MASTER_PORT", master, "Give a port from 1024 to 65535."))
    elif master and "TORCHELASTIC_RUN_ID" not in environment and taken([int(master)]):
        found.append(doubtful("MASTER_PORT", f"{master} is one the kernel gives to outgoing connections ({ephemeral[0]}-{ephemeral[1]})",
                              f"Take one below {ephemeral[0]}: now and then it is in use when the job starts."))
    return found


def interfaces_named(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings that name network interfaces, by variable."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    return {name: environment[name] for name in names if environment.get(name)}


def check_adapters(environment: Mapping[str, str], adapters: Sequence[str], num_nodes: int) -> list[Finding]:
    """Returns whether the InfiniBand or RoCE adapters of the host are used.

    Args:
        environment: Of the process.
        adapters: Names in /sys/class/infiniband.
        num_nodes: Of the job.
    """
    wanted = environment.get("NCCL_IB_HCA", "")
    found = []
    if wanted and not wanted.startswith("^"):
        exact = wanted.startswith("=")
        for name in filter(None, (word.split(":")[0] for word in wanted.lstrip("=").split(","))):
            if not any(adapter == name or (not exact and adapter.startswith(name)) for adapter in adapters):
                found.append(broken("NCCL_IB_HCA", f"{name} is not on this host ({', '.join(adapters) or 'it has no adapters'})",
                                    "Name adapters that exist (ls /sys/class/infiniband), or unset it."))
    if environment.get("NCCL_IB_DISABLE") == "1" and adapters and num_nodes > 1:
        found.append(doubtful("NCCL_IB_DISABLE", f"1, although the host has {', '.join(adapters)}",
                              "unset it: TCP is several times slower."))
    return found


def visible_devices(environment: Mapping[str, str], device: str) -> int | None:
    """Returns how many devices the environment lets a process see; None if it does not say."""
    value = environment.get({"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(device, os.devnull))
    return None if value is None else len([part for part in value.split(",") if part.strip() and not part.startswith("-")])
