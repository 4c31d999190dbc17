"""Which megatron-core would be imported, whether it will do, and calls that differ by version.

Where versions differ, the code asks what is there and not for the version's number.
"""

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.megatron_names import NAMES, missing_names
from megatron_sorted.platform.supported import (
    LAST_FOR_OLDER_MEGATRON,
    MEGATRON_CORE,
    MEGATRON_CORE_END,
    MEGATRON_CORE_RANGE,
)

INSTALL = f"pip install 'megatron-core{MEGATRON_CORE_RANGE}'"


def version_in(folder: Path) -> str:
    """Return the version in a package's own files; nothing in them is executed."""
    for path in (folder / "package_info.py", folder / "__init__.py"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE)
        written = re.findall(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
        if len(numbers) == 3 or written:
            return ".".join(numbers) or written[0]
    return "unknown"


@cache
def megatron_copies() -> tuple[tuple[str, str], ...]:
    """Return (version, folder) of every megatron-core that Python sees, without importing it.

    The first is the one that Python imports: a checkout may precede an installed one.
    """
    package = importlib.util.find_spec("megatron")
    folders = () if package is None else package.submodule_search_locations or ()
    cores = [Path(folder) / "core" for folder in dict.fromkeys(folders)]
    return tuple(
        (version_in(core), str(core)) for core in cores if (core / "__init__.py").is_file()
    )


def megatron_version() -> str:
    """Return the version of the megatron-core that Python would import, without importing it.

    Raises:
        PlatformError: There is none.
    """
    if not megatron_copies():
        raise PlatformError(f"megatron-core: not installed. Training needs it: {INSTALL}.")
    return megatron_copies()[0][0]


def copies_note() -> str | None:
    """Return a sentence about further copies of megatron-core; None where there is one."""
    taken, *others = megatron_copies()
    if not others:
        return None
    return (
        f"{len(others) + 1} copies of megatron-core: {taken[0]} in {taken[1]} is used, not "
        + ", ".join(f"{version} in {folder}" for version, folder in others)
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def check_megatron_version(version: str | None = None) -> None:
    """Check that this program supports a version of megatron-core, by default the installed one.

    Raises:
        PlatformError: The version is older or newer than the supported ones.
    """
    is_installed = version is None
    version = version or megatron_version()
    where = f" in {megatron_copies()[0][1]}" if is_installed else ""
    numbers = _numbers(version)
    reason = f"megatron-core {version}{where}: this program runs on {MEGATRON_CORE_RANGE}"
    if numbers < MEGATRON_CORE:
        raise PlatformError(
            f"{reason}. Install one of them: {INSTALL}. megatron_sorted {LAST_FOR_OLDER_MEGATRON} "
            "was the last release that ran on 0.12.1 to 0.15."
        )
    if numbers[:2] >= MEGATRON_CORE_END:
        # The run ends here in any case, so the time to import the installed one does not matter.
        names = f" {_names_sentence()}" if is_installed else ""
        raise PlatformError(
            f"{reason}, and newer ones are untried.{names} Install one of them: {INSTALL}."
        )


def _names_sentence() -> str:
    """Return a sentence about the names that the installed megatron-core lacks."""
    missing = missing_names()
    return (
        f"Of the names of Megatron that this program uses, it lacks {', '.join(missing)}."
        if missing
        else f"It has all {len(NAMES)} names of Megatron that this program looks for."
    )


def check_megatron_names() -> None:
    """Check that the installed megatron-core has the names of ``megatron_names``; imports it.

    Raises:
        PlatformError: It lacks one, as a checkout between two releases may.
    """
    missing = missing_names()
    if missing:
        raise PlatformError(
            f"megatron-core {megatron_version()}: it lacks {', '.join(missing)}, which training "
            f"uses. Install a release: {INSTALL}."
        )


def known_arguments(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Return the ``arguments`` that ``function`` takes in this megatron-core.

    Use it only for arguments that other versions work without.
    """
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def mlp_parts(spec: Any) -> Any:
    """Return the parts of the MLP, or of each expert, in a layer specification of Megatron's.

    From 0.18 on the MLP is a partial function instead of a ``ModuleSpec``; experts from 0.17 on.
    """
    parts = _parts(spec.submodules.mlp)
    return _parts(parts.experts) if hasattr(parts, "experts") else parts


def _parts(part: Any) -> Any:
    return part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules


def with_options(kind: type, **options: Any) -> type:
    """Return a subclass of ``kind`` whose constructor is given ``options``.

    Every version of Megatron takes a class for a part of a layer. Some call a part, others build it
    as a ``ModuleSpec``, and which of them they call has changed with the versions.
    """
    initialize = functools.partialmethod(kind.__init__, **options)
    return type(kind.__name__, (kind,), {"__init__": initialize})


def gradients_for_norm(part: Any) -> list:
    """Return the gradients whose norm an optimizer of Megatron's clips; 0.19 renamed the method."""
    renamed = getattr(part, "get_grads_for_grad_norm", None)
    return renamed() if renamed is not None else part.get_main_grads_for_grad_norm()
