"""Copies of the project for tests of slurm/, with shorter waits or a trainer without torch."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]
TINY_TRAINER = ROOT / "tests" / "support" / "tiny_trainer.py"
# Lines whose waits only make a test slow -> their replacements.
SHORTER_WAITS = {
    "slurm/job.sh": {
        "START_SECONDS=10": "START_SECONDS=5",
        "FORWARD_SECONDS=10": "FORWARD_SECONDS=2",
    },
    "slurm/launch_hosts.sh": {"STOP_SECONDS=60": "STOP_SECONDS=3"},
    "megatron_sorted/checkpoint/lock.py": {"PATIENCE_SECONDS = 8.0": "PATIENCE_SECONDS = 0.5"},
}


def copy_project(
    target: Path,
    trainer: Path = ROOT / "pretrain_sorted.py",
    lines: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Path:
    """Copy what launchers use to ``target`` and return it.

    Args:
        target: The copy, a new directory.
        trainer: The copy's pretrain_sorted.py.
        lines: {file: {beginning of a line: its replacement}}.
    """
    for name in ("slurm", "megatron_sorted"):
        shutil.copytree(ROOT / name, target / name)  # with compiled files, which stay valid
    shutil.copy2(trainer, target / "pretrain_sorted.py")
    for name, changes in lines.items():
        text = (target / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(f"\n{old}") == 1, f"{name} has no line {old}"
            text = text.replace(f"\n{old}", f"\n{new}")
        (target / name).write_text(text, encoding="utf-8")
    return target
