"""Who imports whom."""

import os
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

from tests.rules.sources import ROOT


def test_imports_go_down(capsys):
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("folder", ["settings", "exits", "planning"])
def test_light_folders_import_neither_torch_nor_megatron(folder):
    modules = [f"megatron_sorted.{folder}.{path.stem}" for path in (ROOT / "megatron_sorted" / folder).glob("[a-z]*.py")]
    assert len(modules) >= 4
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'megatron', 'numpy'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
