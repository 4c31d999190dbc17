"""Ascend's packages that patch Megatron for NPUs, and the branches that fit a megatron-core.

They are on gitcode.com/Ascend, not on PyPI, with a branch for each minor version of megatron-core.
From 0.17 on MindSpeed is built on MegatronAdaptor. None of them has been run with this program.
"""

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.transformer_engine import PACKAGE
from megatron_sorted.platform.versions import megatron_version

BRANCHES = {"0.16": "core_r0.16.0", "0.17": "core_r0.17.0", "0.18": "core_r0.18.0"}
"""Minor version of megatron-core -> the branch that is for it, oldest first (November 2026)."""


@dataclass(frozen=True)
class Adaptor:
    """A package that patches Megatron when it is imported.

    Attributes:
        title: The name, also of the repository.
        module: The module whose import applies its patches.
        first: The oldest minor version of megatron-core that it has a branch for.
        needs: Minor version of megatron-core -> what must be installed before it, of the same
            branch, from that version on.
    """

    title: str
    module: str
    first: str
    needs: tuple[str, str] | None = None


ADAPTORS = {
    "mindspeed": Adaptor(
        "MindSpeed", "mindspeed.megatron_adaptor", "0.16", ("0.17", "MegatronAdaptor")
    ),
    "megatron_adaptor": Adaptor("MegatronAdaptor", "megatron_adaptor", "0.17"),
}
"""Value of --npu-adaptor -> the package."""


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def branch_for(adaptor: Adaptor, version: str) -> str | None:
    """Return the branch of an adaptor that is for a megatron-core; None if there is none."""
    if _minor(version) < _minor(adaptor.first):
        return None
    return BRANCHES.get(".".join(version.split(".")[:2]))


def where_to_get(adaptor: Adaptor, version: str) -> str:
    """Return the sentences that say which branch to install for megatron-core ``version``."""
    place = f"gitcode.com/Ascend/{adaptor.title}"
    branch = branch_for(adaptor, version)
    if branch is not None:
        before = ""
        if adaptor.needs and _minor(version) >= _minor(adaptor.needs[0]):
            before = f", after the same branch of {adaptor.needs[1]}"
        return (
            f"It is not on PyPI: clone {place}, branch {branch}, which is for the megatron-core "
            f"{version} that is installed, and pip install it{before}"
        )
    if _minor(version) < _minor(adaptor.first):
        return (
            f"{place} begins with megatron-core {adaptor.first} (branch "
            f"{BRANCHES[adaptor.first]}), and {version} is installed: use --npu-adaptor mindspeed"
        )
    newest, branch = list(BRANCHES.items())[-1]
    return (
        f"{place} has no branch yet for the megatron-core {version} that is installed; the newest "
        f"is {branch}: install megatron-core {newest} and that branch"
    )


@contextmanager
def _command_line(arguments: str) -> Iterator[None]:
    """Replace the arguments in ``sys.argv`` within a context, for another package's parser."""
    original = sys.argv
    sys.argv = [original[0], *shlex.split(arguments)]
    try:
        yield
    finally:
        sys.argv = original


def load_adaptor(name: str, arguments: str) -> None:
    """Import an adaptor, which patches torch, and Megatron when that is imported.

    It reads its options from ``sys.argv``.

    Args:
        name: Value of --npu-adaptor.
        arguments: The adaptor's flags, as on a command line.

    Raises:
        PlatformError: It or what it needs is not installed.
    """
    adaptor = ADAPTORS[name]
    version = megatron_version().partition("+")[0]
    flag, get = f"--npu-adaptor {name}", where_to_get(adaptor, version)
    if importlib.util.find_spec(adaptor.module.partition(".")[0]) is None:
        raise PlatformError(
            f"{flag}: {adaptor.title} is not installed. {get}, or leave --npu-adaptor out."
        )
    try:
        with _command_line(arguments):
            importlib.import_module(adaptor.module)
    except ImportError as error:
        remedy = f"Install what it needs (its own requirements, and triton-ascend). {get}"
        if (error.name or "").partition(".")[0] == PACKAGE:
            remedy = (
                "It asks for TransformerEngineNPU, with which this program has not been tried "
                "(docs/ascend.md)"
            )
        raise PlatformError(f"{flag}: {error}. {remedy}, or leave --npu-adaptor out.") from error
