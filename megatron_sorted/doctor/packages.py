"""Python, and which copies of a package it could take: the one that is imported is not always the one that was installed."""

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from megatron_sorted.doctor.finding import Finding, broken, doubtful, fine
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import versions

OLDEST_PYTHON = (3, 10)
# what training imports, and the oldest version that will do
REQUIRED = {
    "numpy": (),
    "pydantic": (2,),
    "PyYAML": (),
    "sentencepiece": (),
    "safetensors": (),
    "psutil": (),
}
WHY = {"psutil": "; without it megatron's checkpoint writer hangs for ever"}


@dataclass(frozen=True)
class InstalledCopy:
    """A package found in a folder.

    Attributes:
        folder: Entry of the path, or the checkout an editable installation points to.
        version: What the files or the installation say; "unknown" if they do not.
        editable: Whether it is an editable installation that is not on the path itself.
    """

    folder: str
    version: str
    editable: bool = False

    def __str__(self) -> str:
        return f"{self.version} in {self.folder}" + (" (editable)" if self.editable else "")


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def check_python(
    version: Sequence[int], executable: str, prefix: str, environment: Mapping[str, str]
) -> list[Finding]:
    """Return whether this is a Python that will do, and the one that is meant."""
    shown = f"{'.'.join(map(str, version[:3]))}, {executable}"
    if tuple(version[:2]) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [broken("python", shown, f"Use Python {oldest} or newer.")]
    active = environment.get("VIRTUAL_ENV")
    if active and Path(active).resolve() != Path(prefix).resolve():
        return [
            doubtful(
                "python",
                f"{shown}; VIRTUAL_ENV is {active}",
                f"Start {active}/bin/python, or deactivate that environment: packages installed there are not seen.",
            )
        ]
    return [fine("python", shown)]


def check_python_path(environment: Mapping[str, str], version: Sequence[int]) -> list[Finding]:
    """Check that the entries of PYTHONPATH exist and are for this Python."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(":") if entry]
    missing = [entry for entry in entries if not Path(entry).exists()]
    foreign = [
        entry
        for entry in entries
        if (other := re.search(r"python(\d+)\.(\d+)", entry))
        and tuple(map(int, other.groups())) != tuple(version[:2])
    ]
    if foreign:
        return [
            broken(
                "PYTHONPATH",
                f"{foreign[0]} holds packages of another Python",
                "Take it out of PYTHONPATH.",
            )
        ]
    if missing:
        return [
            doubtful(
                "PYTHONPATH",
                f"{missing[0]} does not exist on this host",
                "Mend or remove the entry.",
            )
        ]
    return [fine("PYTHONPATH", ":".join(entries))] if entries else []


def version_in(folder: Path) -> str:
    """Return the version that a package's own files say, without importing it."""
    for name in ("package_info.py", "__init__.py", "version.py", "_version.py"):
        text = (
            (folder / name).read_text(encoding="utf-8", errors="replace")
            if (folder / name).is_file()
            else ""
        )
        parts = [
            re.search(rf"^{part} = (\d+)", text, re.MULTILINE)
            for part in ("MAJOR", "MINOR", "PATCH")
        ]
        if all(parts):
            return ".".join(part.group(1) for part in parts)
        if said := re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE):
            return said.group(1)
    return "unknown"


def copies_of(package: str, distribution: str, path: Sequence[str]) -> list[InstalledCopy]:
    """Return all copies of a package that Python could take, the one it takes first.

    Args:
        package: Folder below an entry of the path, with slashes: "megatron/core".
        distribution: What it is installed as.
        path: Folders, as in ``sys.path``.
    """
    folders: dict[Path, InstalledCopy] = {}
    for entry in path:
        place = Path(entry or ".") / package
        if (place / "__init__.py").is_file():
            folders.setdefault(
                place.resolve(), InstalledCopy(str(Path(entry or ".").resolve()), version_in(place))
            )
    for installed in importlib.metadata.distributions(name=distribution, path=list(path)):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            root = Path(unquote(urlparse(origin["url"]).path))
            for folder in (root, root / "src"):
                place = folder / package
                if (place / "__init__.py").is_file():
                    folders.setdefault(
                        place.resolve(),
                        InstalledCopy(str(folder), installed.version, editable=True),
                    )
    return list(folders.values())


def check_megatron_copies(copies: Sequence[InstalledCopy]) -> list[Finding]:
    """Return whether there is one copy of megatron-core, of a version that training accepts.

    Args:
        copies: The one Python takes first.
    """
    name = "megatron-core"
    if not copies:
        return [broken(name, "not found", versions.INSTALL)]
    first, *others = copies
    remedy = f"Take {first.folder} out of PYTHONPATH, or pip uninstall what put it on the path"
    shown = (
        f"{len(copies)} copies; taken: {first}; also: {'; '.join(map(str, others))}"
        if others
        else str(first)
    )
    try:
        versions.check_megatron_version(first.version)
    except PlatformError:
        return [broken(name, shown, f"{versions.INSTALL}; {remedy}, if it is a checkout.")]
    if others:
        return [
            doubtful(
                name,
                shown,
                f"Keep one: which is taken depends on the folder and way a program is started. {remedy} "
                f"or remove {others[0].folder}.",
            )
        ]
    if not versions.can_do_all(first.version):
        return [
            doubtful(
                name,
                shown,
                f"Training runs on it, without what needs {versions.shown(versions.ALL)}: {versions.INSTALL}.",
            )
        ]
    return [fine(name, first)]


def check_own_copies(copies: Sequence[InstalledCopy]) -> list[Finding]:
    """Return whether this project's package is the only one of its kind, the checkout's own being first."""
    first, *others = copies
    if others:
        return [
            doubtful(
                "megatron_sorted",
                f"taken: {first}; also: {'; '.join(map(str, others))}",
                f"pip install -e {first.folder}: programs outside its folder take the other one.",
            )
        ]
    return [fine("megatron_sorted", first)]


def check_required(versions: Mapping[str, str]) -> list[Finding]:
    """Return whether the packages that training imports are installed.

    Args:
        versions: Versions of installed distributions, by name in small letters.
    """
    wrong = []
    for name, oldest in REQUIRED.items():
        version = versions.get(name.lower())
        if version is None:
            wrong.append(broken(name, f"not installed{WHY.get(name, '')}", f"pip install {name}"))
        elif numbers_of(version) < oldest:
            wrong.append(
                broken(name, version, f"pip install '{name}>={'.'.join(map(str, oldest))}'")
            )
    shown = ", ".join(
        f"{name} {versions[name.lower()]}" for name in REQUIRED if name.lower() in versions
    )
    return wrong or [fine("packages", shown)]


def installed_versions(path: Sequence[str]) -> dict[str, str]:
    """Return the version of every installed distribution by its name in small letters; the first on the path counts."""
    versions: dict[str, str] = {}
    for installed in importlib.metadata.distributions(path=list(path)):
        name = installed.metadata["Name"]
        if name:
            versions.setdefault(name.lower(), installed.version)
    return versions
