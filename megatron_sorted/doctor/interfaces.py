"""Network interfaces, the ones that communication is told to use, and what the host's own name leads to."""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine

GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


@dataclass(frozen=True)
class Interface:
    """A network interface; the speed in Mb/s is None where the driver does not tell."""

    name: str
    address: str
    up: bool
    speed_megabits: int | None


def read_interfaces(root: Path = Path("/sys/class/net")) -> list[Interface]:
    """Return this host's interfaces (Linux), with their IPv4 addresses."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            state = (folder / "operstate").read_text().strip()
        except OSError:
            continue
        try:
            speed = int((folder / "speed").read_text())
        except (OSError, ValueError):
            speed = -1
        found.append(
            Interface(
                folder.name,
                _address_of(folder.name),
                state in ("up", "unknown"),
                speed if speed > 0 else None,
            )
        )
    return found


def _address_of(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(
                asking.fileno(), GET_ADDRESS, struct.pack("256s", name.encode()[:15])
            )
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def read_ports() -> tuple[tuple[int, int], str]:
    """Return the first and last port given to outgoing connections, and those left out of them, as the kernel writes them."""
    folder = Path("/proc/sys/net/ipv4")
    first, last = map(int, (folder / "ip_local_port_range").read_text().split())
    reserved = folder / "ip_local_reserved_ports"
    return (first, last), reserved.read_text() if reserved.is_file() else ""


def addresses_of(host: str) -> list[str]:
    """Return the addresses a name leads to; none if it is not known."""
    try:
        return sorted(
            {str(info[4][0]) for info in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)}
        )
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def check_interfaces(
    interfaces: Sequence[Interface], named: Mapping[str, str], num_nodes: int
) -> list[Finding]:
    """Check that there are interfaces, and those that variables name.

    Args:
        interfaces: The host's interfaces.
        named: Variables such as GLOO_SOCKET_IFNAME with their values.
        num_nodes: Number of nodes of the job.
    """
    usable = [one for one in interfaces if one.up and one.address and not _is_loopback(one.address)]
    shown = ", ".join(
        f"{one.name} {one.address}"
        + (f" {one.speed_megabits / 1000:g} Gb/s" if one.speed_megabits else "")
        for one in usable
    )
    found = []
    if not usable:
        found.append(
            (broken if num_nodes > 1 else fine)(
                "interfaces",
                "none but the loop-back",
                *(["Bring one up: nodes cannot reach this one."] if num_nodes > 1 else []),
            )
        )
    elif num_nodes > 1 and len(usable) > 1 and "GLOO_SOCKET_IFNAME" not in named:
        found.append(
            doubtful(
                "interfaces",
                shown,
                "export GLOO_SOCKET_IFNAME (and the device library's) with the one between the nodes: "
                "with several, each process guesses.",
            )
        )
    else:
        found.append(fine("interfaces", shown))
    for variable, value in named.items():
        found += _check_named(variable, value, interfaces, num_nodes)
    return found


def chosen_names(value: str, names: Sequence[str], exact: bool = False) -> dict[str, list[str]]:
    """Return which of ``names`` each word of a variable chooses.

    Communication libraries take words as beginnings of names unless the value begins with "="; those that are ``exact``
    (gloo, tensorpipe) always take whole names.
    """
    exact = exact or value.startswith("=")
    words = [word.split(":")[0] for word in value.lstrip("=").split(",")]
    return {
        word: [name for name in names if name == word or (not exact and name.startswith(word))]
        for word in words
        if word
    }


def _check_named(
    variable: str, value: str, interfaces: Sequence[Interface], num_nodes: int
) -> list[Finding]:
    if value.startswith("^"):
        return [fine(variable, value)]
    existing = ", ".join(one.name for one in interfaces)
    found, meant = [], []
    for word, names in chosen_names(
        value, [one.name for one in interfaces], exact=variable.startswith(("GLOO", "TP"))
    ).items():
        fits = [one for one in interfaces if one.name in names]
        meant += fits
        if not fits:
            found.append(
                broken(variable, f"{word} does not exist on this host", f"Name one of: {existing}.")
            )
        elif not any(one.up and one.address for one in fits):
            found.append(
                broken(
                    variable,
                    f"{word} is down or has no IPv4 address",
                    f"Bring it up, or name another of: {existing}.",
                )
            )
    if (
        not found
        and num_nodes > 1
        and all(one.address and _is_loopback(one.address) for one in meant)
    ):
        found.append(
            broken(
                variable,
                f"{value} is the loop-back",
                f"Other nodes cannot reach it: name another of: {existing}.",
            )
        )
    return found or [
        fine(variable, f"{value}: {', '.join(one.address for one in meant if one.address)}")
    ]


def check_host_name(
    name: str, addresses: Sequence[str], num_nodes: int, named: Mapping[str, str]
) -> list[Finding]:
    """Check that the host's own name leads to an address that other nodes can reach."""
    remedy = "Mend /etc/hosts or the name server, or export GLOO_SOCKET_IFNAME with the interface between the nodes."
    if not addresses:
        value = f"{name} has no address"
        return [
            broken("host name", value, remedy)
            if num_nodes > 1 and not named
            else doubtful("host name", value, remedy)
        ]
    shown = f"{name}: {', '.join(addresses)}"
    if all(map(_is_loopback, addresses)) and num_nodes > 1 and not named:
        return [
            broken(
                "host name",
                f"{shown}, the loop-back; other nodes would be told that address",
                remedy,
            )
        ]
    return [fine("host name", shown)]


def check_master(address: str | None, addresses: Sequence[str], num_nodes: int) -> list[Finding]:
    """Check that MASTER_ADDR is one at which all nodes can meet.

    Args:
        address: MASTER_ADDR.
        addresses: What it leads to from here.
        num_nodes: Number of nodes of the job.
    """
    if address is None:
        return []
    if not addresses:
        return [
            broken(
                "MASTER_ADDR",
                f"{address} is not known to this host",
                "Give a name or address that every node can resolve.",
            )
        ]
    if num_nodes > 1 and all(map(_is_loopback, addresses)):
        return [
            broken(
                "MASTER_ADDR",
                f"{address} leads to {', '.join(addresses)}, with {num_nodes} nodes",
                "Give the first node's name or address: each node would wait at its own.",
            )
        ]
    return [fine("MASTER_ADDR", address)]
