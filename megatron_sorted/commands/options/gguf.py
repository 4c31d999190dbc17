"""The options of ``convert gguf``."""

import argparse
from pathlib import Path

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m")


def add_gguf_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    command.add_argument(
        "--depth",
        type=int,
        nargs="+",
        metavar="N",
        help="exits to write, a file each (default: every exit)",
    )
    command.add_argument(
        "--type",
        dest="types",
        nargs="+",
        choices=TYPES,
        default=["bf16"],
        metavar="TYPE",
        help=f"types of weights: {', '.join(TYPES)} (default: bf16)",
    )
    command.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="llama.cpp's sources, or the folder of its build (default: "
        "MEGATRON_SORTED_LLAMA_CPP, else the PATH)",
    )
    command.add_argument(
        "--threads", type=int, metavar="N", help="threads of llama-server (default: all cores)"
    )
