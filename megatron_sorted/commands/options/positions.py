"""The options of ``megatron-sorted evaluate --by-position``."""

import argparse

from megatron_sorted.commands.parser import at_least
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.positions import Positions, cut_positions

POWERS = "powers"


def add_position_options(group: argparse._ArgumentGroup) -> None:
    """Add the options to those of held-out text."""
    group.add_argument(
        "--by-position",
        action="store_true",
        help="measure the loss over the position, in whole windows",
    )
    group.add_argument(
        "--length",
        type=at_least(1),
        metavar="N",
        help="tokens of such a window, also more than trained (--seq-length)",
    )
    group.add_argument(
        "--position-buckets",
        type=_bucket_size,
        metavar="SIZE",
        help=f"positions of a bucket, or {POWERS} of two (default: {POWERS})",
    )
    group.add_argument(
        "--join-documents",
        action="store_true",
        default=None,
        help="cut windows from all documents, one after another",
    )


def _bucket_size(text: str) -> int | str:
    if text == POWERS:
        return POWERS
    try:
        return at_least(1)(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of positions above 0. Give one, or {POWERS}"
        ) from error


def check_position_options(values: argparse.Namespace) -> None:
    """Check that the options are given together with what they need.

    Raises:
        SettingsError: They are not.
    """
    if not values.by_position:
        for name in ("length", "position_buckets", "join_documents"):
            if getattr(values, name) is not None:
                raise SettingsError(
                    f"--{name.replace('_', '-')}: applies to losses by position. "
                    "Give --by-position as well, or leave it out."
                )
        return
    if not values.text:
        raise SettingsError("--by-position: there is no text to measure on. Give --text.")
    if values.stride is not None:
        raise SettingsError(
            f"--stride: {values.stride} with --by-position, whose windows do not overlap. "
            "Leave it out."
        )
    if values.seq_length is not None and not (values.data_path or values.train_heads):
        raise SettingsError(
            f"--seq-length: {values.seq_length} with --by-position, whose windows have a length of "
            "their own. Give it as --length."
        )


def read_positions(values: argparse.Namespace, default_length: int) -> Positions | None:
    """Return the windows and buckets; None without --by-position.

    Raises:
        SettingsError: The buckets do not suit the length.
    """
    if not values.by_position:
        return None
    length = values.length or default_length
    size = None if values.position_buckets in (None, POWERS) else values.position_buckets
    return Positions(length, cut_positions(length, size), bool(values.join_documents))
