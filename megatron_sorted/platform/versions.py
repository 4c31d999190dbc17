"""The versions of megatron-core that this program runs on, and what differs between them.

docs/megatron_versions.md lists what was run under which version.
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
"""The oldest version tried; the oldest that supports every feature; the newest tried."""


def shown(version: tuple[int, ...]) -> str:
    """Return a version as text.

    >>> shown((0, 12, 1))
    '0.12.1'
    """
    return ".".join(map(str, version))


INSTALL = f"pip install 'megatron-core=={shown(NEWEST)}.*'"


@cache
def megatron_version() -> str:
    """Return the version of the megatron-core that Python would import, without importing it.

    A checkout may precede an installed one.

    Raises:
        PlatformError: There is none.
    """
    package = importlib.util.find_spec("megatron")
    for folder in package.submodule_search_locations if package is not None else ():
        package_info = Path(folder) / "core" / "package_info.py"
        if package_info.is_file():
            return runpy.run_path(str(package_info))["__version__"]
    raise PlatformError(f"megatron-core: not installed. Training needs it: {INSTALL}.")


def is_at_least(major: int, minor: int) -> bool:
    """Return whether the installed megatron-core is that version or a later one."""
    return _numbers(megatron_version()) >= (major, minor)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def check_megatron_version(version: str | None = None) -> None:
    """Check that this program supports a version of megatron-core, by default the installed one.

    Raises:
        PlatformError: The version is older than the oldest or newer than the newest tried.
    """
    version = version or megatron_version()
    numbers = _numbers(version)
    if not numbers >= OLDEST or numbers[:2] > NEWEST:
        raise PlatformError(
            f"megatron-core {version}: this version of megatron_sorted runs on {shown(OLDEST)} to "
            f"{shown(NEWEST)}. Install one of them: {INSTALL}."
        )


def can_do_all(version: str) -> bool:
    """Return whether that version of megatron-core supports every feature of this program."""
    return _numbers(version) >= ALL


def is_newest(version: str) -> bool:
    """Return whether that version of megatron-core belongs to the newest release tried."""
    return _numbers(version)[:2] == NEWEST


def check_megatron_can(*features: tuple[str, bool], version: str | None = None) -> None:
    """Check that megatron-core supports the features in use that only 0.15 and later support.

    Earlier checkpoints cannot hold a tensor in shards of unequal shape, as the shards of a sharded
    optimizer are; earlier parallel layers keep no group for adapters to communicate over; and 0.12
    takes no pipeline layout.

    Args:
        features: (flag of such a feature, whether it is given).
        version: Version of megatron-core; by default the installed one.

    Raises:
        PlatformError: A feature is in use and the version is older.
    """
    version = version or megatron_version()
    for flag, is_given in features:
        if is_given and not can_do_all(version):
            raise PlatformError(
                f"{flag}: needs megatron-core {shown(ALL)} or later, and {version} is installed. "
                "Install one, or leave it out."
            )


def known_arguments(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Return the ``arguments`` that ``function`` takes in this megatron-core.

    Use it only for arguments that older versions work without.
    """
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def chunk_arguments(function: Callable, chunk: int | None) -> dict[str, int | None]:
    """Return the argument that names the model chunk to a function of Megatron that builds layers.

    Before 0.13 the chunk is a global variable, which this function sets.

    Args:
        function: A function of Megatron's.
        chunk: Number of the chunk on this rank; None if the rank holds one chunk.
    """
    if known_arguments(function, vp_stage=chunk):
        return {"vp_stage": chunk}
    if chunk is not None:
        # not at the top of the file: versions are checked where megatron may be missing
        from megatron.core import parallel_state

        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
    return {}


def builds_linear_qkv() -> bool:
    """Return whether attention builds linear_qkv from a specification; 0.16 calls it as a class."""
    return not is_at_least(0, 16)


RULES_OF_GROUPS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "weight_decay")
"""Options of an optimizer's parameter group that follow from the parameters in it."""


@contextmanager
def rules_of_groups_kept(optimizer: Any) -> Iterator[None]:
    """Keep the options of an optimizer's parameter groups while a checkpoint is loaded into it.

    Before 0.13 a rank's groups are loaded in the order of the first rank's, which may differ: the
    options of matrices and norms, such as weight decay, would be exchanged. Later versions match
    the groups.

    Args:
        optimizer: One rank's optimizer of torch.
    """
    before = [
        {name: group[name] for name in RULES_OF_GROUPS if name in group}
        for group in optimizer.param_groups
    ]
    yield
    if not is_at_least(0, 13):
        for group, rules in zip(optimizer.param_groups, before, strict=True):
            group.update(rules)
