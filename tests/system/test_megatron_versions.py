"""The oldest supported megatron-core trains and resumes exactly, in a separate environment."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_sorted.platform.versions import OLDEST

ROOT = Path(__file__).parents[2]
VERSION = ".".join(map(str, OLDEST))
ROWS = (
    "tests/ranks/test_layouts.py::test_layout_equals_reference[pp2 chunks2 own selective]",
    "tests/ranks/test_layouts.py::test_layout_equals_reference[tp2 sequence parallel untied own]",
    "tests/ranks/test_checkpoint.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit[pp2]",
)


def run(*command: object, **environment: object) -> subprocess.CompletedProcess:
    """Return the finished command, with its output."""
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def test_layouts_and_a_checkpoint_under_the_oldest_megatron_core(tmp_path):
    python = tmp_path / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    installed = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--retries",
        1,
        "--timeout",
        20,
        f"megatron-core=={VERSION}",
    )
    if installed.returncode:
        pytest.skip(
            f"pip brings no megatron-core {VERSION}: {installed.stdout.strip().splitlines()[-1]}"
        )
    # before this project's own, whose other packages it uses
    [packages] = tmp_path.glob("lib/python*/site-packages")
    (packages / "project.pth").write_text(sysconfig.get_path("purelib"))
    seen = run(
        python,
        "-c",
        "from megatron_sorted.platform.versions import megatron_version; print(megatron_version())",
        PYTHONPATH=ROOT,
    )
    assert seen.stdout.splitlines()[-1] == VERSION
    done = run(python, "-m", "pytest", "-rs", *ROWS)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
