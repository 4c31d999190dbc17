"""The versions of megatron-core that this program runs on, and what differs between them.

What was run under which version stands in docs/megatron_versions.md.
"""

import importlib.util
import inspect
import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sorted.errors import PlatformError

OLDEST, ALL, NEWEST = (0, 12, 1), (0, 15), (0, 16)
"""The oldest tried; the oldest that can do all that this program does; the newest tried."""


def shown(bound: tuple[int, ...]) -> str:
    """Return a version as it is written."""
    return ".".join(map(str, bound))


INSTALL = f"pip install 'megatron-core=={shown(NEWEST)}.*'"


@cache
def megatron_version() -> str:
    """Return the version of the megatron-core that Python would import, without importing it; it may stand beside an installed one.

    Raises:
        PlatformError: There is none.
    """
    found = importlib.util.find_spec("megatron")
    for folder in found.submodule_search_locations if found is not None else ():
        described = Path(folder) / "core" / "package_info.py"
        if described.is_file():
            return runpy.run_path(str(described))["__version__"]
    raise PlatformError(f"megatron-core: not installed. Training needs it: {INSTALL}.")


def is_at_least(major: int, minor: int) -> bool:
    """Return whether the megatron-core that is there is that version or a later one."""
    return _numbers(megatron_version()) >= (major, minor)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def check_megatron_version(version: str | None = None) -> None:
    """Check that this program runs on that version of megatron-core, by default the one that is there.

    Raises:
        PlatformError: It does not, or nobody has tried.
    """
    version = version or megatron_version()
    numbers = _numbers(version)
    if not numbers >= OLDEST or numbers[:2] > NEWEST:
        raise PlatformError(
            f"megatron-core {version}: this version of megatron_sorted runs on {shown(OLDEST)} to {shown(NEWEST)}. "
            f"Install one of them: {INSTALL}."
        )


def can_do_all(version: str) -> bool:
    """Return whether everything that this program does works with that version of megatron-core."""
    return _numbers(version) >= ALL


def is_newest(version: str) -> bool:
    """Return whether that version of megatron-core is of the newest tried."""
    return _numbers(version)[:2] == NEWEST


def check_megatron_can(*asked: tuple[str, bool], version: str | None = None) -> None:
    """Check that megatron-core can do what is asked for, of what only 0.15 and later can.

    Earlier checkpoints hold no tensor in parts of unequal shape, as each rank's part of a sharded optimizer is, earlier parallel layers
    keep no group, which adapters communicate over, and 0.12 takes no layout of its stages.

    Args:
        asked: (flag, whether it is given) of such things.
        version: Version of megatron-core, by default that of the one that is there.

    Raises:
        PlatformError: It cannot.
    """
    version = version or megatron_version()
    for flag, given in asked:
        if given and not can_do_all(version):
            raise PlatformError(
                f"{flag}: needs megatron-core {shown(ALL)} or later, and {version} is here. Install one, or leave it out."
            )


def known_arguments(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Return those of ``arguments`` that ``function`` takes in this megatron-core; only for those that older ones do without."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def chunk_arguments(function: Callable, chunk: int | None) -> dict[str, int | None]:
    """Return the argument that tells ``function``, which builds layers, of which virtual chunk they are; before 0.13 it is told globally.

    Args:
        function: A function of Megatron's.
        chunk: None without virtual chunks.
    """
    if known_arguments(function, vp_stage=chunk):
        return {"vp_stage": chunk}
    if chunk is not None:
        from megatron.core import (
            parallel_state,
        )  # not at the top: the check above must run where megatron is missing

        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
    return {}


def builds_linear_qkv() -> bool:
    """Return whether attention is told by a specification what its first matrix is; later ones call what they find."""
    return not is_at_least(0, 16)


RULES_OF_GROUPS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "weight_decay")
"""What a group of parameters is told because of the parameters in it."""


@contextmanager
def rules_of_groups_kept(optimizer: Any) -> Iterator[None]:
    """Keep the rules of an optimizer's groups of parameters while a checkpoint is loaded into it.

    Before 0.13 a rank's groups are loaded in the order of the first rank's, which may be another one: weight decay would change places
    between matrices and norms. Later ones find each group's own.

    Args:
        optimizer: Torch's, of one rank.
    """
    before = [
        {name: group[name] for name in RULES_OF_GROUPS if name in group}
        for group in optimizer.param_groups
    ]
    yield
    if not is_at_least(0, 13):
        for group, rules in zip(optimizer.param_groups, before, strict=True):
            group.update(rules)
