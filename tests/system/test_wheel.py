"""An installation from a wheel has every command, examples and launchers, and needs no clone."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from megatron_sorted import __version__
from tests.support.clean_environment import clean_environment
from tests.support.commands import ROOT
from tests.support.evaluated import TEXTS

BUILT_FROM = (
    "megatron_sorted",
    "examples",
    "slurm",
    "tests",
    "lab",
    "tools",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "pretrain_sorted.py",
)
TRAINING = (
    "--no-mock-data",
    "--data-path",
    "data_text_document",
    "--tokenizer-type",
    "SentencePieceTokenizer",
    "--tokenizer-model",
    "data_tokenizer.model",
    "--train-iters",
    "2",
    "--log-interval",
    "1",
    "--eval-interval",
    "none",
    "--save",
    "run",
    "--save-interval",
    "2",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return a wheel, built in a copy: setuptools leaves its work beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        folder / "source",
    ]
    subprocess.run(command, check=True, env=clean_environment(), timeout=240)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Return a function that runs commands in an empty folder, in an environment with the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    env = clean_environment(
        OMP_NUM_THREADS=1, HF_HUB_OFFLINE=1, PATH=f"{python.parent}:{os.environ['PATH']}"
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(command, check=True, env=env, timeout=240)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    # dependencies of this interpreter come after the venv's own; .pth files there, such as that of
    # an editable clone, are not read
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others) + "\n")
    (folder / "empty").mkdir()

    def started(*arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in arguments],
            cwd=folder / "empty",
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    started.folder = folder / "empty"
    return started


def test_a_wheel_holds_what_runs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"megatron_sorted", f"megatron_sorted-{__version__}.dist-info"}
    for name in (
        "examples/quickstart.yaml",
        "examples/sites/slurm_gpu.site",
        "slurm/job.sh",
        "slurm/judge.awk",
    ):
        assert f"megatron_sorted/{name}" in names
    native = "megatron_sorted/decoding/native/source"
    assert {name for name in names if name.startswith(f"{native}/")} == {
        f"{native}/{path.name}" for path in (ROOT / native).iterdir()
    }
    assert any(
        name.endswith("/licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in names
    )
    sources = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_sorted").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_a_life_in_an_empty_folder(run):
    assert "usage: megatron-sorted COMMAND" in run("megatron-sorted", "--help")
    assert run("megatron-sorted", "--version") == f"megatron_sorted {__version__}\n"
    where = run(
        "python",
        "-c",
        "import megatron_sorted.installation as f; print(f.__file__, f.shipped_folder('slurm'), "
        "f.shipped_folder('examples'))",
    )
    assert (
        str(ROOT) not in where.replace(str(run.folder.parent), "")
        and where.count("site-packages") == 3
    )
    assert "wrote here/examples/quickstart.yaml" in run("megatron-sorted", "examples", "here")
    assert "exists already" in run("megatron-sorted", "examples", "here", status=1)
    run("megatron-sorted", "examples", "here", "--overwrite")
    (run.folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8)
    )
    run(
        "megatron-sorted",
        "prepare",
        "--input",
        "train.jsonl",
        "--output-prefix",
        "data",
        "--train-tokenizer",
        290,
    )
    assert "step 2" in run(
        "megatron-sorted", "train", "--config", "here/examples/quickstart.yaml", *TRAINING
    )
    assert "verified" in run("megatron-sorted", "convert", "export", "run", "exported")
    assert "[full: 4 tokens in" in run(
        "megatron-sorted", "generate", "exported", "--prompt", "a b", "--max-new-tokens", 4
    )
    planned = run("megatron-sorted", "plan", "here/examples/quickstart.yaml")
    assert "memory of one rank" in planned
    assert planned.splitlines()[-1].startswith(
        "torchrun --nproc-per-node 1 -m megatron_sorted train "
    )
    message = run(
        "megatron-sorted",
        "launch",
        "slurm",
        "gpu",
        "--print",
        "--site",
        "here/examples/sites/slurm_gpu.site",
        "here/examples/llama3_8b.yaml",
    )
    assert (
        "-m torch.distributed.run" in message
        and " -m megatron_sorted train --config " in message
        and str(ROOT) not in message
    )
