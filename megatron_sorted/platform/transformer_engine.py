"""Whose ``transformer_engine`` Python would import, NVIDIA's or Ascend's, without importing it.

TransformerEngineNPU (TENPU, gitcode.com/Ascend) has the names of NVIDIA's module and distribution.
Megatron takes its Adam, its clipping of gradients and its norms from whatever has that name, and
its import fails where that lacks a module of NVIDIA's.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sorted.errors import PlatformError

PACKAGE = "transformer_engine"
SOURCES = ("__init__.py", "common/__init__.py", "pytorch/__init__.py")
"""Files of the package in which TENPU names Ascend or imports torch_npu, and NVIDIA's does not."""
OF_ASCEND = re.compile(r"torch_npu|\bAscend\b|\bHuawei\b")
SHARED_NAME = re.compile(r"transformer[-_.]engine")
"""The distribution's name, which both packages have."""
NVIDIA_DISTRIBUTION = re.compile(r"transformer[-_.]engine[-_.](torch|cu\d+)")
NVIDIA_LIBRARIES = ("libtransformer_engine*.so", "wheel_lib/*.so", "transformer_engine_torch*.so")
TRIAL = "SORTED_TRY_TENPU"
"""The variable that lets a trial use TENPU."""
REMOVE = "pip uninstall transformer_engine"
REMOVE_BOTH = f"{REMOVE} transformer_engine_torch transformer_engine_cu12 (or cu13), repeatedly"


@dataclass(frozen=True)
class InstalledEngine:
    """The installed packages ``transformer_engine``.

    Attributes:
        folder: The package that Python imports.
        for_npus: Whether that is TENPU.
        beside: What shows that the other one is installed too; empty if it is not.
    """

    folder: Path
    for_npus: bool
    beside: str = ""


def _is_for_npus(folder: Path) -> bool:
    """Return whether a package's sources are those of TENPU."""
    texts = (folder / name for name in SOURCES)
    return any(
        OF_ASCEND.search(path.read_text(encoding="utf-8", errors="replace"))
        for path in texts
        if path.is_file()
    )


def _part_of_nvidia(folder: Path, path: Sequence[str]) -> str:
    """Return a distribution or library of NVIDIA's that is installed; empty if there is none."""
    for distribution in importlib.metadata.distributions(path=list(path)):
        name = (distribution.metadata.get("Name") or "").lower()
        if NVIDIA_DISTRIBUTION.fullmatch(name):
            return f"the distribution {name} {distribution.version}"
    for place in (folder, folder.parent, *map(Path, path)):
        for pattern in NVIDIA_LIBRARIES:
            for library in sorted(place.glob(pattern)):
                return str(library)
    return ""


def _distribution_of_tenpu(path: Sequence[str]) -> str:
    """Return TENPU's distribution if it is installed, also as editable; empty if it is not."""
    for distribution in importlib.metadata.distributions(path=list(path)):
        metadata = distribution.metadata
        described = " ".join(
            metadata.get(field) or "" for field in ("Summary", "Home-page", "Author")
        )
        if SHARED_NAME.fullmatch((metadata.get("Name") or "").lower()) and OF_ASCEND.search(
            described
        ):
            return f"the distribution {metadata['Name']} {distribution.version}"
    return ""


def installed_engine(path: Sequence[str] | None = None) -> InstalledEngine | None:
    """Return the installed ``transformer_engine``; None if there is none.

    Args:
        path: Folders to import from, as in ``sys.path``, which is the default.
    """
    path = [entry or "." for entry in (sys.path if path is None else path)]
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, path)
    if spec is None and PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)  # an editable installation can have its own finder
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    for_npus = _is_for_npus(folder)
    copies = {(Path(entry) / PACKAGE).resolve() for entry in path} - {folder}
    others = (
        str(copy)
        for copy in sorted(copies)
        if (copy / "__init__.py").is_file() and _is_for_npus(copy) != for_npus
    )
    part = _part_of_nvidia(folder, path) if for_npus else _distribution_of_tenpu(path)
    return InstalledEngine(folder, for_npus, next(others, part))


def why_refused(engine: InstalledEngine, device: str) -> tuple[str, str] | None:
    """Return why a run on ``device`` may not find this package, and the remedy; None if it may."""
    if engine.beside:
        first, second = ("TENPU", "NVIDIA's") if engine.for_npus else ("NVIDIA's", "TENPU")
        return (
            f"two packages have the name {PACKAGE}, and Megatron would take parts of both: {first} "
            f"in {engine.folder}, which Python imports, and {second}: {engine.beside}",
            f"Remove both ({REMOVE_BOTH}), then install the one for this device, if any.",
        )
    if device != "npu":
        return None
    if not engine.for_npus:
        return (
            f"{engine.folder} is NVIDIA's Transformer Engine, which needs a GPU, and Megatron "
            "imports it wherever it is installed",
            f"Remove it: {REMOVE_BOTH}.",
        )
    if os.environ.get(TRIAL) == "1":
        return None
    return (
        f"{engine.folder} is TransformerEngineNPU (TENPU), from which Megatron takes its Adam, "
        "gradient clipping and norms; this program has not been tried with it",
        f"Use an environment without it ({REMOVE}); docs/ascend.md says how to try it.",
    )


def check_engine(engine: InstalledEngine | None, device: str) -> None:
    """Check that a run on ``device`` may find the installed package.

    Raises:
        PlatformError: It may not.
    """
    refused = engine and why_refused(engine, device)
    if refused:
        reason, remedy = refused
        raise PlatformError(f"--device {device}: {reason}. {remedy}")


def has_nvidia_engine(device: str) -> bool:
    """Return whether NVIDIA's Transformer Engine is what Python imports.

    Raises:
        PlatformError: TENPU is installed beside it.
    """
    engine = installed_engine()
    check_engine(engine, device)
    return engine is not None and not engine.for_npus
