"""Options that limit what a server decodes at once."""

import argparse

from megatron_sorted.decoding.batching.options import BatchingOptions
from megatron_sorted.errors import SettingsError

DEFAULTS = BatchingOptions()
GIGABYTE = 10**9
MAX_TEXTS, MAX_PREFILL_TOKENS, MAX_GIGABYTES, MAX_WAIT_SECONDS = 4096, 1 << 20, 1e6, 86400


def add_batching_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `BatchingOptions`."""
    group = parser.add_argument_group("texts at once")
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=DEFAULTS.max_num_seqs,
        metavar="N",
        help="texts that are written at once; further ones wait (default: %(default)s)",
    )
    group.add_argument(
        "--cache-memory",
        type=float,
        metavar="GB",
        help="memory for running and kept texts (default: half of what is free)",
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=DEFAULTS.max_wait_seconds,
        metavar="SECONDS",
        help="a request that would wait longer is refused (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-tokens",
        type=int,
        default=DEFAULTS.prefill_tokens,
        metavar="N",
        help="tokens of prompts read between two steps of others (default: %(default)s)",
    )
    group.add_argument(
        "--prefix-caching",
        choices=("on", "off"),
        default="on" if DEFAULTS.prefix_caching else "off",
        metavar="WHEN",
        help="keep texts for others that begin alike: on, off (default: %(default)s)",
    )
    group.add_argument(
        "--share-prefixes",
        action="store_true",
        help="API keys use each other's kept texts, which times of answers show",
    )


def batching_options(values: argparse.Namespace) -> BatchingOptions:
    """Return the limits that the command line sets.

    Raises:
        SettingsError: A value is out of its range, or two options contradict each other.
    """
    for option, value, low, high, unit in (
        ("--max-num-seqs", values.max_num_seqs, 1, MAX_TEXTS, ""),
        ("--cache-memory", values.cache_memory, 0.001, MAX_GIGABYTES, " GB"),
        ("--max-wait", values.max_wait, 0.001, MAX_WAIT_SECONDS, " seconds"),
        ("--prefill-tokens", values.prefill_tokens, 1, MAX_PREFILL_TOKENS, ""),
    ):
        if value is not None and not low <= value <= high:
            raise SettingsError(f"{option}: {value} is not in {low:g}..{high:g}{unit}. Change it.")
    keeps = values.prefix_caching == "on"
    if values.share_prefixes and not keeps:
        raise SettingsError(
            "--share-prefixes: it has no effect with --prefix-caching off. Leave out one of them."
        )
    memory = values.cache_memory
    return BatchingOptions(
        max_num_seqs=values.max_num_seqs,
        cache_bytes=None if memory is None else round(memory * GIGABYTE),
        max_wait_seconds=values.max_wait,
        prefill_tokens=values.prefill_tokens,
        prefix_caching=keeps,
        share_prefixes=values.share_prefixes,
        drafts_by_load=True,
    )


def limits_line(options: BatchingOptions) -> str:
    """Return the limits in words, for the start of a server.

    >>> limits_line(BatchingOptions(cache_bytes=2 * GIGABYTE))
    'at most 32 texts at once in 2 GB; waits of at most 600 s; prompts are read by 128 tokens; \
texts are kept for the same key'
    """
    memory = (
        "a share of the free memory"
        if options.cache_bytes is None
        else f"{options.cache_bytes / GIGABYTE:g} GB"
    )
    kept = (
        "no text is kept"
        if not options.prefix_caching
        else f"texts are kept for {'all keys' if options.share_prefixes else 'the same key'}"
    )
    return (
        f"at most {options.max_num_seqs} texts at once in {memory}; waits of at most "
        f"{options.max_wait_seconds:g} s; prompts are read by {options.prefill_tokens} tokens; "
        f"{kept}"
    )
