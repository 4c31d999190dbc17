"""Python and its packages: versions, and the copies of a package that Python could import."""

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from megatron_sorted.doctor.finding import Finding, fail, ok, warn
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import supported, versions

REQUIRED = {
    "numpy": (),
    "pydantic": (2,),
    "PyYAML": (),
    "sentencepiece": (),
    "safetensors": (),
    "psutil": (),
}
"""Packages that training imports -> the oldest version."""
WHY = {"psutil": "; without it megatron's checkpoint writer hangs for ever"}


@dataclass(frozen=True)
class InstalledCopy:
    """A copy of a package.

    Attributes:
        folder: The entry of the path, or the checkout of an editable installation.
        version: The version from its files or its installation; "unknown" without one.
        editable: Whether it is an editable installation that is not itself on the path.
    """

    folder: str
    version: str
    editable: bool = False

    def __str__(self) -> str:
        return f"{self.version} in {self.folder}" + (" (editable)" if self.editable else "")


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> version_numbers("2.13.0+cpu")
    (2, 13, 0)
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def check_python(version: Sequence[int], executable: str) -> list[Finding]:
    """Check that this Python is new enough."""
    shown = f"{supported.shown(tuple(version[:3]))}, {executable}"
    if tuple(version[:2]) < supported.PYTHON:
        return [fail("python", shown, f"Use Python {supported.shown(supported.PYTHON)} or newer.")]
    return [ok("python", shown)]


def copies_of(package: str, distribution: str, path: Sequence[str]) -> list[InstalledCopy]:
    """Return all copies of a package that Python could import, starting with the one it imports.

    Args:
        package: The package's folder below an entry of the path: "megatron/core".
        distribution: The name under which it is installed.
        path: Folders, as in ``sys.path``.
    """
    copies: dict[Path, InstalledCopy] = {}

    def add(folder: Path, version: str = "", editable: bool = False) -> None:
        place = folder / package
        if (place / "__init__.py").is_file():
            copy = InstalledCopy(str(folder), version or versions.version_in(place), editable)
            copies.setdefault(place.resolve(), copy)

    for entry in path:
        add(Path(entry or ".").resolve())
    for installed in importlib.metadata.distributions(name=distribution, path=list(path)):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            root = Path(unquote(urlparse(origin["url"]).path))
            for folder in (root, root / "src"):
                add(folder, installed.version, editable=True)
    return list(copies.values())


def check_megatron_copies(copies: Sequence[InstalledCopy]) -> list[Finding]:
    """Check that there is one copy of megatron-core, of a supported version.

    Args:
        copies: All copies, the one that Python imports first.
    """
    name = "megatron-core"
    if not copies:
        return [fail(name, "not found", versions.INSTALL)]
    first, *others = copies
    remove = f"Take {first.folder} out of PYTHONPATH, or pip uninstall what put it on the path"
    shown = str(first)
    if others:
        shown = f"{len(copies)} copies; taken: {first}; also: {'; '.join(map(str, others))}"
    try:
        versions.check_megatron_version(first.version)
    except PlatformError:
        return [fail(name, shown, f"{versions.INSTALL}; {remove}, if it is a checkout.")]
    if others:
        remedy = (
            "Keep one: the folder and command of a program decide which it imports. "
            f"{remove} or remove {others[0].folder}."
        )
        return [warn(name, shown, remedy)]
    return [ok(name, first)]


def check_own_copies(copies: Sequence[InstalledCopy]) -> list[Finding]:
    """Check that there is one copy of this project's package."""
    first, *others = copies
    if not others:
        return [ok("megatron_sorted", first)]
    shown = f"taken: {first}; also: {'; '.join(map(str, others))}"
    remedy = f"pip install -e {first.folder}: programs outside its folder import the other one."
    return [warn("megatron_sorted", shown, remedy)]


def check_required(installed: Mapping[str, str]) -> list[Finding]:
    """Check that the packages that training imports are installed.

    Args:
        installed: Versions of installed distributions, by name in lower case.
    """
    wrong = []
    for name, oldest in REQUIRED.items():
        version = installed.get(name.lower())
        if version is None:
            wrong.append(fail(name, f"not installed{WHY.get(name, '')}", f"pip install {name}"))
        elif version_numbers(version) < oldest:
            remedy = f"pip install '{name}>={supported.shown(oldest)}'"
            wrong.append(fail(name, version, remedy))
    shown = ", ".join(f"{name} {installed.get(name.lower())}" for name in REQUIRED)
    return wrong or [ok("packages", shown)]


def installed_versions(path: Sequence[str]) -> dict[str, str]:
    """Return the version of every installed distribution by its name in lower case.

    Of several with one name, the first on the path counts.
    """
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        if name := distribution.metadata.get("Name"):
            installed.setdefault(name.lower(), distribution.version)
    return installed
