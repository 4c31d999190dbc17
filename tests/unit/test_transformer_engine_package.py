"""Whose ``transformer_engine`` is installed, and which of them a device refuses."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform.cuda import CudaPlatform
from megatron_sorted.platform.npu import start
from megatron_sorted.platform.transformer_engine import TRIAL, check_engine, installed_engine
from tests.support.engines import write_distribution, write_engine


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    monkeypatch.delenv(TRIAL, raising=False)


def test_without_the_package_nothing_is_refused(tmp_path):
    (tmp_path / "transformer_engine").mkdir()  # a folder of this name is no package
    assert installed_engine([str(tmp_path)]) is None
    check_engine(None, "npu")


@pytest.mark.parametrize("for_npus", [True, False], ids=["TENPU", "NVIDIA"])
def test_a_package_is_recognised_and_not_imported(for_npus, tmp_path):
    folder = write_engine(tmp_path, for_npus=for_npus)
    engine = installed_engine([str(tmp_path)])
    assert (engine.folder, engine.for_npus, engine.beside) == (folder, for_npus, "")
    assert "transformer_engine" not in sys.modules


def test_tenpu_is_recognised_by_what_it_imports(tmp_path):
    folder = write_engine(tmp_path, for_npus=False)
    (folder / "pytorch" / "__init__.py").write_text("import torch_npu\n")
    assert installed_engine([str(tmp_path)]).for_npus


def test_an_editable_installation_can_have_its_own_finder(tmp_path, monkeypatch):
    folder = write_engine(tmp_path, for_npus=True)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            place = [str(tmp_path)] if name == "transformer_engine" else []
            return importlib.machinery.PathFinder.find_spec(name, place)

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert installed_engine([]).folder == folder


def test_tenpu_is_refused_on_npus_before_torch_npu_is_loaded(tmp_path, monkeypatch):
    folder = write_engine(tmp_path, for_npus=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(start, "is_started", lambda: False)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    monkeypatch.setattr(start, "load_torch_npu", lambda: pytest.fail("too late"))
    with pytest.raises(PlatformError) as refusal:
        start.start_npu()
    message = str(refusal.value)
    assert f"--device npu: {folder} is TransformerEngineNPU (TENPU)" in message
    assert "has not been tried with it" in message and "pip uninstall transformer_engine" in message
    assert "docs/ascend.md" in message


def test_a_trial_may_use_tenpu(tmp_path, monkeypatch):
    write_engine(tmp_path, for_npus=True)
    monkeypatch.setenv(TRIAL, "1")
    check_engine(installed_engine([str(tmp_path)]), "npu")
    write_distribution(tmp_path, "transformer-engine-cu12", "2.9.0")
    with pytest.raises(PlatformError, match="two packages"):
        check_engine(installed_engine([str(tmp_path)]), "npu")


def test_nvidias_package_is_refused_on_npus_and_counts_on_gpus(tmp_path, monkeypatch):
    write_engine(tmp_path, for_npus=False, nvidia_part=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(PlatformError, match=r"NVIDIA's Transformer Engine, which needs a GPU"):
        check_engine(installed_engine(), "npu")
    assert CudaPlatform().has_transformer_engine()


def test_tenpu_does_not_count_on_gpus(tmp_path, monkeypatch):
    write_engine(tmp_path, for_npus=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not CudaPlatform().has_transformer_engine()


def test_without_transformer_engine_a_gpu_has_none(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert not CudaPlatform().has_transformer_engine()


def both(tmp_path, how: str) -> list[str]:
    """Install both packages in one of the orders and forms that occur; return the path."""
    first, second = tmp_path / "first", tmp_path / "second"
    tenpu_first = how != "NVIDIA's first" and not how.startswith("editable")
    folder = write_engine(first, for_npus=tenpu_first, nvidia_part=how == "distribution")
    if how == "library":
        (folder / "libtransformer_engine.so").touch()
    if how in ("TENPU first", "NVIDIA's first"):
        write_engine(second, for_npus=how == "NVIDIA's first")
    if how == "editable TENPU":
        write_distribution(
            first, "transformer_engine", "2.13.0", "Summary: for models on Ascend NPUs"
        )
    return [str(first), str(second)]


FORMS = ["distribution", "library", "TENPU first", "NVIDIA's first", "editable TENPU"]


@pytest.mark.parametrize("device", ["npu", "cuda"])
@pytest.mark.parametrize("how", FORMS)
def test_both_packages_are_refused_with_the_reason(how, device, tmp_path, monkeypatch):
    path = both(tmp_path, how)
    with pytest.raises(PlatformError) as refusal:
        check_engine(installed_engine(path), device)
    message = str(refusal.value)
    assert f"--device {device}: two packages have the name transformer_engine" in message
    assert str(tmp_path / "first" / "transformer_engine") in message and "TENPU" in message
    assert "Remove both (pip uninstall transformer_engine" in message
    monkeypatch.setattr(sys, "path", path)
    with pytest.raises(PlatformError, match="--device cuda: two packages"):
        CudaPlatform().has_transformer_engine()


def test_megatron_does_not_import_beside_a_package_that_lacks_a_module(tmp_path):
    """Show why the package is refused and not ignored: Megatron looks at its name alone."""
    write_engine(tmp_path, for_npus=True)
    program = f"import sys, megatron_sorted; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}import megatron.core"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1 and "No module named 'transformer_engine." in done.stderr
