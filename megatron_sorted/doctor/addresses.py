"""Addresses of the host's name and of MASTER_ADDR."""

import ipaddress
import socket
from collections.abc import Sequence

from megatron_sorted.doctor.finding import Finding, fail, ok


def addresses_of(host: str) -> list[str]:
    """Return the addresses that a host name resolves to; none if it is unknown."""
    try:
        infos = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except OSError:
        return []
    return sorted({str(info[4][0]) for info in infos})


def _all_loopback(addresses: Sequence[str]) -> bool:
    return all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)


def check_host_name(
    name: str, addresses: Sequence[str], num_nodes: int, has_named_interface: bool
) -> list[Finding]:
    """Check that the host's own name resolves to an address that other nodes can reach.

    Args:
        name: The host's name.
        addresses: The addresses that it resolves to.
        num_nodes: Number of nodes of the job.
        has_named_interface: Whether a variable names the interface, so the name is not used.
    """
    shown = f"{name}: {', '.join(addresses) or 'no address'}"
    if num_nodes == 1 or has_named_interface or not _all_loopback(addresses):
        return [ok("host name", shown)]
    remedy = (
        "Correct /etc/hosts or the name server, or export GLOO_SOCKET_IFNAME with the interface "
        "between the nodes."
    )
    return [fail("host name", f"{shown}; other nodes cannot connect to it", remedy)]


def check_master(
    address: str | None, port: str | None, addresses: Sequence[str], num_nodes: int
) -> list[Finding]:
    """Check that every node can connect to MASTER_ADDR and MASTER_PORT.

    Args:
        address: The variable MASTER_ADDR.
        port: The variable MASTER_PORT.
        addresses: The addresses that MASTER_ADDR resolves to on this host.
        num_nodes: Number of nodes of the job.
    """
    findings = []
    if port is not None and not (port.isdecimal() and 0 < int(port) < 65536):
        findings.append(fail("MASTER_PORT", port, "Set a port from 1024 to 65535."))
    if address is None:
        return findings
    if not addresses:
        remedy = "Set a name or address that every node can resolve."
        return [*findings, fail("MASTER_ADDR", f"{address} is unknown to this host", remedy)]
    if num_nodes > 1 and _all_loopback(addresses):
        value = f"{address} resolves to {', '.join(addresses)}, with {num_nodes} nodes"
        remedy = "Set the first node's name or address: each node would wait at its own."
        return [*findings, fail("MASTER_ADDR", value, remedy)]
    return [*findings, ok("MASTER_ADDR", address)]
