"""What the system allows: open files, locked memory, processes, shared memory, memory, CPU cores, a container's shares, locale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from doctor.finding import Finding, broken, doubtful, fine, gibibytes

UNLIMITED = -1
MEBIBYTE, GIBIBYTE = 2**20, 2**30
DOCKER_SHARED_BYTES = 64 * MEBIBYTE


def check_limits(nofile: int, memlock: int, stack: int, nproc: int, has_device: bool) -> list[Finding]:
    """Returns whether the shell's limits will do; -1 means unlimited.

    Args:
        nofile: Open files (ulimit -n).
        memlock: Bytes of locked memory (ulimit -l).
        stack: Bytes of a stack (ulimit -s).
        nproc: Processes and threads of this user (ulimit -u).
        has_device: Whether the host has accelerators, or adapters that read its memory.
    """

    def shown(value: int, unit: int = 1) -> str:
        return "unlimited" if value == UNLIMITED else str(value) if unit == 1 else f"{value // unit} KiB"

    where = "in /etc/security/limits.conf, the service of the scheduler (LimitNOFILE= and the like), or docker run --ulimit"
    found = []
    if nofile != UNLIMITED and nofile < 8192:
        verdict = broken if nofile < 256 else doubtful
        found.append(verdict("ulimit -n (files)", shown(nofile), f"ulimit -n 65536; {where}. Connections and data files take one each."))
    if memlock != UNLIMITED and memlock < GIBIBYTE and has_device:
        found.append(doubtful("ulimit -l (locked)", shown(memlock, 1024), f"ulimit -l unlimited; {where}. RDMA pins memory."))
    if stack != UNLIMITED and stack < 4 * MEBIBYTE:
        found.append(doubtful("ulimit -s (stack)", shown(stack, 1024), f"ulimit -s 8192; {where}. Deep recursion crashes without a word."))
    if nproc != UNLIMITED and nproc < 4096:
        found.append(doubtful("ulimit -u (processes)", shown(nproc), f"ulimit -u 65536; {where}. Every thread counts."))
    return found or [fine("limits", f"files {shown(nofile)}, locked {shown(memlock, 1024)}, stack {shown(stack, 1024)}, "
                                    f"processes {shown(nproc)}")]


def check_shared_memory(total: int | None, free: int, has_device: bool) -> list[Finding]:
    """Returns whether /dev/shm is large enough for processes of a node to talk through it; ``total`` is None where it is missing."""
    remedy = ("docker run --shm-size=16g (or --ipc=host); in a pod an emptyDir of medium Memory at /dev/shm; "
              "else mount -o remount,size=16g /dev/shm")
    if total is None:
        return [broken("/dev/shm", "missing or not writable", remedy)]
    shown = f"{gibibytes(free)} free of {gibibytes(total)}"
    if total <= DOCKER_SHARED_BYTES and has_device:
        return [broken("/dev/shm", shown, remedy)]
    if free < GIBIBYTE:
        return [doubtful("/dev/shm", shown, remedy if total < 2 * GIBIBYTE else "Remove what dead processes left there (ls -l /dev/shm).")]
    return [fine("/dev/shm", shown)]


@dataclass(frozen=True)
class Container:
    """Limits of the control group this process is in; None: not limited.

    Attributes:
        memory_bytes: Most memory.
        memory_used_bytes: Of it in use.
        cpus: Share of processors.
        processes: Most processes and threads.
    """

    memory_bytes: int | None = None
    memory_used_bytes: int = 0
    cpus: float | None = None
    processes: int | None = None


def read_container(root: Path) -> Container:
    """Returns the limits in the control group files below ``root`` (of the system: /sys/fs/cgroup), of version 2 or 1."""

    def number(name: str) -> int | None:
        try:
            word = (root / name).read_text().split()[0]
        except (OSError, IndexError):
            return None
        # version 1 writes a number near 2^63 for "no limit"
        return int(word) if word.isdigit() and int(word) < 2**60 else None

    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = str(number("cpu/cpu.cfs_quota_us") or "max"), str(number("cpu/cpu.cfs_period_us") or 1)
    cpus = int(quota) / int(period) if quota.isdigit() else None
    memory = number("memory.max") or number("memory/memory.limit_in_bytes")
    used = number("memory.current") or number("memory/memory.usage_in_bytes") or 0
    return Container(memory, used, cpus, number("pids.max") or number("pids/pids.max"))


def check_memory(total: int, available: int, container: Container) -> list[Finding]:
    """Returns whether there is memory to work with, in a container too."""
    shown = f"{gibibytes(available)} free of {gibibytes(total)}"
    if container.memory_bytes is not None and container.memory_bytes < total:
        left = max(0, container.memory_bytes - container.memory_used_bytes)
        shown += f"; the container may use {gibibytes(container.memory_bytes)}"
        available = min(available, left) if left > 0 else available
    if available < GIBIBYTE:
        return [doubtful("memory", shown,
                         "End other programs, or raise the job's or container's memory (srun --mem=0, docker run --memory).")]
    return [fine("memory", shown)]


def check_processors(cores: int, usable: int, container: Container, environment: Mapping[str, str], local_processes: int) -> list[Finding]:
    """Returns whether processes and threads fit the processors they may use.

    Args:
        cores: Of the host.
        usable: Those this process is bound to.
        container: Limits of the container.
        environment: Of the process.
        local_processes: Of the job on this host.
    """
    found = []
    share = min(usable, container.cpus or usable)
    shown = f"{usable} of {cores} usable" + (f", a share of {container.cpus:g}" if container.cpus else "")
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not all(part.isdigit() and int(part) > 0 for part in threads.split(",")):
        return [broken("OMP_NUM_THREADS", threads, "Give a number of 1 or more.")]
    if local_processes > 1 and usable == 1 and cores > 1:
        found.append(doubtful("CPU cores", f"{shown}: every process on one core",
                              "srun --cpus-per-task=ALL (since SLURM 22.05 srun does not inherit it), or --cpu-bind=none."))
    else:
        found.append(fine("CPU cores", shown))
    remedy = f"export OMP_NUM_THREADS={max(1, int(share) // local_processes)}"
    if threads is None and local_processes > 1:
        found.append(doubtful("OMP_NUM_THREADS", f"unset, with {local_processes} processes on the host",
                              f"{remedy}: each process would start {usable} threads."))
    elif threads is not None and int(threads.split(",")[0]) * local_processes > max(share, local_processes):
        found.append(doubtful("OMP_NUM_THREADS", f"{threads} x {local_processes} processes on {share:g} cores", remedy))
    else:
        found.append(fine("OMP_NUM_THREADS", threads or "unset"))
    if container.processes is not None and container.processes < 1024:
        found.append(doubtful("processes", f"the container allows {container.processes}", "Raise it: docker run --pids-limit=-1."))
    return found


def check_backlogs(syn: int | None, device: int | None, num_processes: int) -> list[Finding]:
    """Returns whether the kernel's queues of new connections hold those of a large job (tcp_max_syn_backlog, netdev_max_backlog)."""
    low = [f"net.{name}={value}" for name, value in (("ipv4.tcp_max_syn_backlog", syn), ("core.netdev_max_backlog", device))
           if value is not None and value < num_processes * 16]
    if num_processes >= 64 and low:
        return [doubtful("connection queues", ", ".join(low),
                         "sysctl -w net.ipv4.tcp_max_syn_backlog=65536 net.core.netdev_max_backlog=65536, against 'Gloo connectFullMesh "
                         "failed'.")]
    return []


def check_locale(encoding: str, environment: Mapping[str, str]) -> list[Finding]:
    """Returns whether files are read as UTF-8 where nothing says otherwise."""
    if encoding.lower().replace("-", "") == "utf8":
        return [fine("locale", encoding)]
    named = next((f"{name}={environment[name]}" for name in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(name)), "none set")
    return [doubtful("locale", f"{encoding} ({named})", "export LC_ALL=C.UTF-8, or PYTHONUTF8=1.")]


def check_year(year: int) -> list[Finding]:
    """Returns whether the host's clock can be right at all."""
    if year < 2025:
        return [broken("clock", f"the year {year}", "Set the clock (chronyc makestep): certificates and the order of files go by it.")]
    return []
