"""Training on ranks of the preloaded server, like torchrun without its start of seven seconds."""

import os
from pathlib import Path

from tests.support.ports import free_port
from tests.support.ranks import run_ranks


def _rank(arguments: list[str], port: int, folder: str) -> None:
    from megatron_sorted.commands.train import main

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    with open(f"console.{os.environ['RANK']}", "w", encoding="utf-8") as console:
        for stream in (1, 2):
            os.dup2(console.fileno(), stream)
    main(arguments)


def pretrain(world_size: int, folder: Path, *arguments: object) -> list[str]:
    """Run ``pretrain_sorted.py arguments...`` in ``folder`` and return the printed lines.

    Only the first rank may print any.
    """
    run_ranks(
        world_size, _rank, [str(argument) for argument in arguments], free_port(), str(folder)
    )
    printed = [(folder / f"console.{rank}").read_text() for rank in range(world_size)]
    assert not any(printed[1:]), printed[1:]
    return printed[0].splitlines()
