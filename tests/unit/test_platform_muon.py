"""Where a package is missing Muon is refused with the reason; triton's stand-ins."""

import importlib
import sys
from types import ModuleType

import pytest

from megatron_sorted import triton_stand_in
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import muon


@pytest.fixture
def megatron(monkeypatch) -> ModuleType:
    """Return a stand-in of ``megatron.core.optimizer`` that has Muon."""
    module = ModuleType("megatron.core.optimizer")
    module._EMERGING_OPTIMIZERS, module.HAVE_EMERGING_OPTIMIZERS = {"muon": object()}, True
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Return a function that puts a package emerging_optimizers of one module before others."""

    def write(content: str) -> None:
        folder = tmp_path / "emerging_optimizers"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "orthogonalized_optimizers.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith("emerging_optimizers")]:
            monkeypatch.delitem(sys.modules, name)

    return write


def test_muon_that_is_there_is_taken(megatron):
    muon.check_muon_is_there()


def test_a_megatron_core_with_muons_earlier_form_is_refused(megatron):
    del megatron._EMERGING_OPTIMIZERS
    expected = (
        r"megatron-core [\d.]+ builds Muon in an earlier way, .*pip install .* or use .* adam"
    )
    with pytest.raises(PlatformError, match=f"^--optimizer muon: {expected}.$"):
        muon.check_muon_is_there()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it is not installed"),
        ("from typing import no_such_name", "its import fails: cannot import name 'no_such_name'"),
        ("", "the one that is installed is older"),
    ],
)
def test_a_package_that_is_missing_broken_or_old_is_named(
    megatron, package, monkeypatch, content, reason
):
    megatron.HAVE_EMERGING_OPTIMIZERS = False
    if content is None:
        monkeypatch.setattr(muon.importlib.util, "find_spec", lambda name: None)
    else:
        package(content)
    with pytest.raises(PlatformError) as refused:
        muon.check_muon_is_there()
    text = str(refused.value)
    assert text.startswith("--optimizer muon: megatron-core needs the package emerging-optimizers")
    assert reason in text and "pip install 'megatron_sorted[muon]'" in text


def test_without_triton_the_package_is_imported_with_a_stand_in_for_its_kernels(
    package, monkeypatch
):
    package("from emerging_optimizers import triton_kernels\n")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        triton_stand_in.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "triton" else find_spec(name, *rest),
    )
    imported = importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    with pytest.raises(
        RuntimeError, match=r"triton_kernels.tsyrk_ex needs triton, .* or leave out use_syrk"
    ):
        imported.triton_kernels.tsyrk_ex()
