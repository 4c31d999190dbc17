"""Which versions of megatron-core are taken, and what only later ones can do."""

import re
from pathlib import Path

import megatron.core
import pytest

from megatron_sorted.doctor.local import OLDEST_TORCH
from megatron_sorted.errors import PlatformError
from megatron_sorted.platform import versions


def test_the_version_is_that_of_the_package_that_is_imported():
    assert versions.megatron_version() == megatron.core.__version__
    versions.check_megatron_version()


@pytest.mark.parametrize("version", ["0.12.1", "0.12.3", "0.13.0", "0.15.3", "0.16.1", "0.16.9rc0"])
def test_versions_that_are_taken(version):
    versions.check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.11.0", "0.12.0", "0.17.0rc0", "1.0"])
def test_other_versions_are_refused_with_value_rule_and_remedy(version):
    with pytest.raises(
        PlatformError,
        match=rf"megatron-core {version}: .* runs on 0.12.1 to 0.16. "
        r".*pip install 'megatron-core==0.16.\*'",
    ):
        versions.check_megatron_version(version)


def test_features_that_an_older_version_lacks_are_refused():
    versions.check_megatron_can(("--lora-rank", False), version="0.14.0")
    versions.check_megatron_can(("--lora-rank", True), version="0.15.0")
    with pytest.raises(
        PlatformError,
        match=r"--lora-rank: needs megatron-core 0.15 or later, and 0.14.0 is installed",
    ):
        versions.check_megatron_can(
            ("--data-parallel fsdp", False), ("--lora-rank", True), version="0.14.0"
        )


def test_only_known_arguments_are_passed():
    def function(one, *, two=2):
        return one + two

    assert versions.known_arguments(function, two=3, three=4) == {"two": 3}
    assert versions.chunk_arguments(lambda config, vp_stage: None, 1) == {"vp_stage": 1}


ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = versions.shown(versions.OLDEST), versions.shown(versions.NEWEST)


@pytest.mark.parametrize(("file", "text"), [
    ("setup.py", f"megatron-core>={OLDEST},<{versions.NEWEST[0]}.{versions.NEWEST[1] + 1}"),
    ("README.md", f"megatron-core {OLDEST} to {NEWEST}"),
    ("constraints.txt", f"megatron-core=={NEWEST}."),
])  # fmt: skip
def test_pages_and_requirements_name_the_same_versions(file, text):
    assert text in (ROOT / file).read_text(encoding="utf-8")


def test_the_oldest_torch_is_the_one_that_is_required():
    assert set(re.findall(r"torch>=([\d.]+)", (ROOT / "setup.py").read_text(encoding="utf-8"))) == {
        versions.shown(OLDEST_TORCH)
    }
