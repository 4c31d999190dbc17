"""Messages over a Unix socket: a length, then JSON or pickled bytes; with file descriptors."""

import array
import socket
import struct

HEADER = struct.Struct("!Q")


def send(connection: socket.socket, body: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message, with open files if there are any."""
    files = (
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        if descriptors
        else []
    )
    connection.sendmsg([HEADER.pack(len(body))], files)
    connection.sendall(body)


def receive(connection: socket.socket, num_descriptors: int = 0) -> tuple[bytes | None, list[int]]:
    """Return the next message and its open files; None if the connection is closed."""
    descriptors = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(
        HEADER.size, socket.CMSG_SPACE(num_descriptors * descriptors.itemsize)
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    header += _exactly(connection, HEADER.size - len(header)) if header else b""
    if len(header) < HEADER.size:
        return None, list(descriptors)
    (size,) = HEADER.unpack(header)
    body = _exactly(connection, size)
    return (body if len(body) == size else None), list(descriptors)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            break
        parts += part
    return bytes(parts)
