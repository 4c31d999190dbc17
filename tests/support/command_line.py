"""The entry point on several ranks of the fork server: what torchrun does, without its seven seconds."""

import os
import random
import socket
from contextlib import suppress
from pathlib import Path

from tests.support.ranks import run_ranks

CHANCE = random.SystemRandom()  # other sessions on this machine must not draw the same ports


def free_port() -> int:
    """Return a port of this host that nobody listens on.

    It lies below those that the kernel gives to outgoing connections (from 32768 on), so that none takes it before it
    is used, and below those of SLURM jobs (from 20000 on).
    """
    while True:
        port = CHANCE.randrange(10240, 20000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _rank(words: list[str], port: int, folder: str) -> None:
    from pretrain_sorted import main

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    with open(f"console.{os.environ['RANK']}", "w", encoding="utf-8") as console:
        for stream in (1, 2):
            os.dup2(console.fileno(), stream)
    main(words)


def pretrain(world_size: int, folder: Path, *words: object) -> list[str]:
    """Returns the lines that ``pretrain_sorted.py words...``, run in ``folder``, printed; only the first rank may print any."""
    run_ranks(world_size, _rank, [str(word) for word in words], free_port(), str(folder))
    printed = [(folder / f"console.{rank}").read_text() for rank in range(world_size)]
    assert not any(printed[1:]), printed[1:]
    return printed[0].splitlines()
