"""Muon under the newest megatron-core, in an environment with the package emerging-optimizers.

The package asks for Python 3.12. Its code needs nothing newer than 3.11 but ``typing.override``, so
on an older Python the environment has that name too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.versions.environment import PIP_OPTIONS, python_with
from lab.versions.virtual_environment import NotInstalledError
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED
from tests.support.commands import ROOT, environment

PACKAGE = "emerging-optimizers==0.3.0"
# in a file that Python reads after the one that leads to the project's packages
OVERRIDE = "import typing, typing_extensions; typing.override = typing_extensions.override\n"
ROWS = (
    "test_layout_equals_plain_pytorch[one process]",
    "test_layout_equals_plain_pytorch[tp2 sequence parallel distributed own]",
    "test_layout_equals_plain_pytorch[pp2 untied]",
    "test_layout_equals_plain_pytorch[pp2 blocks and adapters]",
    "test_layout_equals_plain_pytorch[dp2 overlap]",
    "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[tp2 own]",
    "test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[bf16 pp2 frozen base]",
    "test_another_layout_continues_a_checkpoint[tp2 -> pp2 chunks2]",
    "test_an_average_of_weights_is_the_mean_of_the_steps",
    "test_muon_takes_the_matrices_of_layers_and_parts_and_adam_the_rest",
)


def pip(python: Path, *arguments: str) -> None:
    """Install a package into the environment of ``python``, or skip the test."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", *PIP_OPTIONS, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"pip brings no {arguments[-1]}: {done.stdout.strip().splitlines()[-1]}")


def test_muon_equals_plain_pytorch_and_resumes_exactly(tmp_path):
    try:
        python = python_with(MEGATRON_CORE_TESTED[-1], tmp_path / "newest")
    except NotInstalledError as error:
        pytest.skip(str(error))
    pip(python, PACKAGE)
    pip(python, "absl-py")
    if sys.version_info < (3, 12):
        [packages] = python.parents[1].glob("lib/python3*/site-packages")
        (packages / "zz_override.pth").write_text(OVERRIDE, encoding="utf-8")
    done = subprocess.run(
        [python, "-m", "pytest", "-rs", "-p", "no:cacheprovider"]
        + [f"tests/ranks/test_muon.py::{row}" for row in ROWS],
        cwd=ROOT,
        env=environment(TMPDIR=tmp_path),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ROWS)} passed" in done.stdout and "skipped" not in done.stdout, done.stdout
