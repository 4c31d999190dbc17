"""The oldest and the newest tested megatron-core: rows of ranks, and a whole program.

One of the two is this environment's own, under which all other tests run. The other one is
installed here, into an environment of its own.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lab.reliability.compare import differing_tensors
from lab.versions.environment import python_with
from lab.versions.virtual_environment import NotInstalledError
from megatron_sorted.errors import PlatformError
from megatron_sorted.monitoring.json_lines import read_json_lines
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED
from megatron_sorted.platform.versions import megatron_version
from tests.support.commands import ROOT, environment, run
from tests.support.preloaded.session import FOLDER
from tests.system.test_pretrain import untimed

OTHERS = [v for v in (MEGATRON_CORE_TESTED[0], MEGATRON_CORE_TESTED[-1]) if v != megatron_version()]
ROWS = (
    "tests/ranks/test_layouts.py::test_layout_equals_reference[pp2 chunks2 own selective]",
    "tests/ranks/test_layouts.py::test_layout_equals_reference"
    "[tp2 sequence parallel sandwich full recompute]",
    "tests/ranks/test_layouts.py::test_layout_equals_reference[dp2 distributed overlap untied own]",
    "tests/ranks/test_checkpoint.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit"
    "[bf16 dp2 distributed own]",
    "tests/ranks/test_checkpoint.py::test_ten_steps_equal_five_and_five_in_another_layout"
    "[own heads pp2 -> own heads tp2]",
    "tests/ranks/test_fsdp.py::test_layout_equals_reference[dp2 untied own full recompute]",
    "tests/ranks/test_lora.py::test_adapters_in_a_layout_equal_the_reference"
    "[one process mlp recompute of mlp]",
    "tests/ranks/test_precision.py::test_bf16[2-changes1]",
    "tests/ranks/test_weight_average.py::test_average_is_the_mean_of_the_steps"
    "[dp2 distributed overlap]",
)
"""At least one row of each kind of numbers and files, with every mend for newer versions in use."""
VERSION_SEEN = """\
import megatron_sorted, megatron.core
from megatron_sorted.platform.versions import megatron_version
print(megatron_version(), megatron.core.__version__, megatron_sorted.__file__)
"""


@pytest.fixture(scope="module", params=OTHERS)
def other(request, tmp_path_factory) -> tuple[str, Path]:
    """Return another version, and the Python of an environment that has it."""
    try:
        python = python_with(request.param, tmp_path_factory.mktemp("other") / request.param)
    except NotInstalledError as error:
        pytest.skip(str(error))
    return request.param, python


def test_python_sees_the_other_version_and_this_project(other):
    version, python = other
    done = run([str(python), "-c", VERSION_SEEN], cwd=ROOT, env=environment())
    expected = f"{version} {version} {ROOT / 'megatron_sorted' / '__init__.py'}"
    assert done.stdout.strip() == expected, done.stdout + done.stderr
    # a finished environment is taken as it is
    before = (python.parents[1] / ".ready").stat().st_mtime_ns
    assert python_with(version, python.parents[1]) == python
    assert (python.parents[1] / ".ready").stat().st_mtime_ns == before


def test_another_python_has_its_own_preloaded_servers(other):
    """Otherwise the rows below would run under this environment's version and prove nothing."""
    _, python = other
    seen = run(
        [str(python), "-c", "from tests.support.preloaded import session as s; import os\n"
         "s.open_session(); print(os.environ[s.FOLDER]); s.close_session()"],
        cwd=ROOT,
        env=environment(**{FOLDER: os.environ[FOLDER]}),
    )  # fmt: skip
    assert seen.stdout.strip() not in ("", os.environ[FOLDER]), seen.stderr


def test_layouts_and_checkpoints(other, tmp_path):
    _, python = other
    done = subprocess.run(
        [python, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *ROWS],
        cwd=ROOT,
        env=environment(TMPDIR=tmp_path),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ROWS)} passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_a_program_continues_a_checkpoint_of_this_environments_version(other, trained, tmp_path):
    _, python = other
    folder, _ = trained
    shutil.copytree(folder / "whole" / "iter_0000002", tmp_path / "iter_0000002")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    done = run(
        [
            *(str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(ROOT / "pretrain_sorted.py"), "--config", "run.yaml", "--save", str(tmp_path)),
            *("--load", str(tmp_path)),
        ],
        cwd=folder,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2, " in done.stdout and "Warning" not in done.stderr, done.stdout + done.stderr
    number, differing = differing_tensors(folder / "whole", tmp_path, 4)
    assert number >= 24 and not differing, differing
    whole, continued = (
        read_json_lines(save / "metrics.jsonl") for save in (folder / "whole", tmp_path)
    )
    expected = [untimed(line) for line in whole if line["step"] > 2]
    assert expected and [untimed(line) for line in continued] == expected


@pytest.mark.parametrize(("version", "reason"), [
    ("0.15.3", "was the last release that ran on 0.12.1 to 0.15"),
    ("0.20.0", "newer ones are untried"),
])  # fmt: skip
def test_make_refuses_a_version_outside_the_range_before_it_installs(version, reason):
    """The recipe runs alone, for the rest of make would set up this environment."""
    done = run(
        ["make", "-s", "-o", ".venv/.ready", "test-megatron", f"VERSION={version}"],
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode != 0 and reason in done.stderr, done.stdout + done.stderr
    assert f"megatron-core {version}" in done.stderr and "pip install" in done.stderr
    assert not (ROOT / ".venv-megatron" / version).exists()


def test_a_version_outside_the_range_is_refused(tmp_path):
    with pytest.raises(PlatformError, match=r"0\.15\.3: .* pip install "):
        python_with("0.15.3", tmp_path / "other")
    assert not (tmp_path / "other").exists()
