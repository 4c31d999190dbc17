"""Warnings that a user can do nothing about."""

import warnings


def silence_library_warnings() -> None:
    """Hides what Megatron says on every rank. Call it before Megatron is imported.

    It says that Apex and Transformer Engine are missing, which are optional here, and calls torch's checkpoint functions and
    collectives by deprecated names, as we do where the new ones are younger than the oldest torch supported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.(checkpoint\.|c10d_logger)")
