"""Which versions of megatron-core are taken, and calls that differ between versions."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import megatron.core
import pytest
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import megatron_names, supported, versions

ROOT = Path(__file__).resolve().parents[2]
OLDEST, END = supported.shown(supported.MEGATRON_CORE), supported.shown(supported.MEGATRON_CORE_END)


def test_the_version_is_that_of_the_package_that_is_imported():
    # Megatron may add the commit of a repository around it
    assert versions.megatron_version() == megatron.core.__version__.partition("+")[0]
    versions.check_megatron_version()
    versions.check_megatron_names()


@pytest.mark.parametrize(
    "version", [*supported.MEGATRON_CORE_TESTED, "0.16.9rc0", "0.17.0", "0.18.0rc1", "0.19.99"]
)
def test_versions_that_are_taken(version):
    versions.check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.11.0", "0.12.1", "0.15.3", "0.16.0", "unknown"])
def test_older_versions_are_refused_with_the_last_release_that_took_them(version):
    with pytest.raises(
        PlatformError,
        match=rf"megatron-core {version}: this program runs on >={OLDEST},<{END}. "
        rf"Install one of them: pip install 'megatron-core>={OLDEST},<{END}'. "
        r"megatron_sorted 0.10.0 was the last release that ran on 0.12.1 to 0.15.",
    ):
        versions.check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.20.0", "0.20.0rc0", "1.0"])
def test_newer_versions_are_refused(version):
    with pytest.raises(
        PlatformError, match=rf"{version}: .*<{END}, and newer ones are untried\. I"
    ):
        versions.check_megatron_version(version)


def test_an_installed_newer_version_is_refused_with_the_names_that_it_lacks(monkeypatch):
    monkeypatch.setattr(versions, "megatron_copies", lambda: (("0.20.0", "/x/megatron/core"),))
    with pytest.raises(
        PlatformError,
        match=rf"0.20.0 in /x/megatron/core: .*<{END}, and newer ones are untried\. It has all \d+",
    ):
        versions.check_megatron_version()
    lost, no_module = ("optimizer.optimizer", "MegatronOptimizer.lost"), ("no_such_module", "name")
    monkeypatch.setattr(megatron_names, "NAMES", (*megatron_names.NAMES, lost, no_module))
    with pytest.raises(
        PlatformError,
        match=r"it lacks megatron.core.optimizer.optimizer.MegatronOptimizer.lost, "
        r"megatron.core.no_such_module.name \(ModuleNotFoundError: .*Install one of them",
    ):
        versions.check_megatron_version()
    with pytest.raises(
        PlatformError, match=r"it lacks .*MegatronOptimizer.lost.*Install a release"
    ):
        versions.check_megatron_names()


def test_two_copies_of_megatron(tmp_path):
    """The first on the path is the one that is judged and imported, and the others are named."""
    older = tmp_path / "megatron" / "core"
    older.mkdir(parents=True)
    (older / "__init__.py").write_text("")
    (older / "package_info.py").write_text("__version__ = '0.15.3'\n")
    program = (
        "from megatron_sorted.platform import versions\n"
        "print(versions.copies_note())\nversions.check_megatron_version()"
    )

    def judged(**options):
        return subprocess.run(
            [sys.executable, "-c", program], text=True, capture_output=True, check=False, **options
        )

    own = versions.megatron_copies()
    both = judged(env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert both.stdout.strip() == (
        f"{len(own) + 1} copies of megatron-core: 0.15.3 in {older} is used, not "
        + ", ".join(f"{version} in {folder}" for version, folder in own)
    )
    assert f"PlatformError: megatron-core 0.15.3 in {older}: this program runs on" in both.stderr
    one = judged(env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert one.stdout.strip() == str(versions.copies_note()) and one.returncode == 0, one.stderr


def test_only_known_arguments_are_passed():
    def function(one, *, two=2):
        return one + two

    assert versions.known_arguments(function, two=3, three=4) == {"two": 3}


def test_the_parts_of_an_mlp_in_both_forms_of_a_specification():
    parts = SimpleNamespace(linear_fc1=object)

    def layer(mlp):
        return SimpleNamespace(submodules=SimpleNamespace(mlp=mlp))

    assert versions.mlp_parts(layer(ModuleSpec(object, submodules=parts))) is parts
    assert versions.mlp_parts(layer(functools.partial(dict, submodules=parts))) is parts


def test_a_class_with_options_can_be_called_and_built():
    class Kind:
        def __init__(self, size, *, rank=0):
            self.made = size, rank

    adapted = versions.with_options(Kind, rank=4)
    assert adapted(2).made == build_module(adapted, 2).made == (2, 4)
    assert issubclass(adapted, Kind) and adapted.__name__ == "Kind" and Kind(2).made == (2, 0)


def test_the_gradients_of_a_norm_by_both_names():
    renamed = SimpleNamespace(get_grads_for_grad_norm=lambda: ["new"])
    assert versions.gradients_for_norm(renamed) == ["new"]
    older = SimpleNamespace(get_main_grads_for_grad_norm=lambda: ["old"])
    assert versions.gradients_for_norm(older) == ["old"]


def test_the_readme_names_the_supported_versions():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    newest = supported.MEGATRON_CORE_TESTED[-1].rpartition(".")[0]
    assert f"megatron-core {OLDEST} to {newest}" in text
    assert supported.MEGATRON_CORE_TESTED[0] == OLDEST


def test_requirements_are_read_from_one_place():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert not re.search(r"(torch|transformers|megatron-core)[<>=]+\d", setup)
