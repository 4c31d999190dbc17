"""The pages and requirements name the versions that ``supported.py`` names."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from megatron_sorted.errors import PlatformError
from megatron_sorted.parallel import fsdp
from megatron_sorted.platform import supported

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "torch": (supported.TORCH, supported.TORCH_TRIED),
    "transformers": (supported.TRANSFORMERS, supported.TRANSFORMERS_TRIED),
}


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's numbers."""
    return tuple(map(int, version.split(".")))


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """Return what setup.py passes to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def constrained(package: str) -> str:
    """Return the version of a package in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{package}==(\S+?)(?:; python_version >=.*)?$", text, re.MULTILINE)[1]


def row_of_page(name: str) -> list[str]:
    """Return the versions of a row of the table in docs/start.md."""
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    return re.search(rf"^\| {name} \| (.+) \|$", text, re.MULTILINE)[1].split(" | ")


@pytest.mark.parametrize("package", PACKAGES)
def test_oldest_default_and_newest_are_the_same_everywhere(package, setup_arguments):
    oldest, tried = PACKAGES[package]
    assert list(tried) == sorted(tried, key=numbers)
    assert oldest <= numbers(tried[0])
    assert constrained(package) in tried
    assert row_of_page(package) == [supported.shown(oldest), constrained(package), tried[-1]]
    required = f"{package}>={supported.shown(oldest)}"
    assert required in setup_arguments["extras_require"]["convert"]


def test_versions_of_python(setup_arguments):
    tried = [supported.shown(version) for version in supported.PYTHON_TRIED]
    oldest, default, newest = row_of_page("Python")
    assert (oldest, newest) == (tried[0], tried[-1]) and default in tried
    assert setup_arguments["python_requires"] == f">={supported.shown(supported.PYTHON)}"
    prefix = "Programming Language :: Python :: 3."
    named = [line for line in setup_arguments["classifiers"] if line.startswith(prefix)]
    assert [line.rsplit(" ", 1)[1] for line in named] == tried
    if sys.version_info >= (3, 11):
        import tomllib

        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert settings["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_fully_sharded_training_needs_a_newer_torch_and_says_so(monkeypatch):
    class OldModule:
        """FSDP2's module before it could sum."""

    monkeypatch.setattr(fsdp, "FSDPModule", OldModule)
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with pytest.raises(PlatformError, match=r"torch 2\.7\.1 cannot.*Install torch 2\.8 or later"):
        fsdp.check_torch_can_shard()
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert f"requires torch {supported.shown(supported.TORCH_FOR_FSDP)}" in page
