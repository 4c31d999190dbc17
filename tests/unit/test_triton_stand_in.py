"""The stand-in for Megatron's module that needs triton, where triton is hidden and where not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.triton_stand_in import MODULES, _StandIn, install_finder

MODULE = next(iter(MODULES))
CORE = Path(importlib.util.find_spec("megatron.core").origin).parent
HAS_MODULE = (CORE / "transformer" / "moe" / "paged_stash.py").exists()
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] == "triton" else found(name, package))
"""


def run(program: str, *path: Path) -> subprocess.CompletedProcess:
    paths = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", paths + program],
        text=True,
        capture_output=True,
        check=False,
    )


def test_megatron_is_imported_where_triton_is_hidden():
    done = run(
        HIDE + "import megatron_sorted\n"
        "from megatron.core.pipeline_parallel import get_forward_backward_func\n"
        "import inspect, torch\n"
        "inspect.getmodule(run_all := lambda: None)\n"  # asks every module for its file
        "print(type(sys.modules.get('" + MODULE + "')).__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("_StandIn", "NoneType")
    assert not HAS_MODULE or done.stdout.split()[-1] == "_StandIn"


@pytest.mark.parametrize(("module", "option"), MODULES.items())
def test_what_a_stand_in_offers_refuses_with_the_remedy(module, option):
    with pytest.raises(RuntimeError, match=rf"{module}.any needs triton, .*leave out {option}"):
        _StandIn(module).any(enabled=True)


def test_megatrons_own_module_is_taken_where_there_is_triton(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    stash = tmp_path / "megatron" / "core" / "transformer" / "moe"
    stash.mkdir(parents=True)
    for folder in (stash, *list(stash.parents)[:3]):
        (folder / "__init__.py").write_text("")
    (stash / "paged_stash.py").write_text("import triton\npaged_stash_reset = 'their own'\n")
    program = (
        f"import megatron_sorted\nfrom {MODULE} import paged_stash_reset as taken\nprint(taken)"
    )
    done = run(program, tmp_path)
    assert done.stdout.strip() == "their own", done.stderr
    done = run(HIDE + program, tmp_path)
    assert "their own" not in done.stdout and "refuse" in done.stdout, done.stderr


def test_the_finder_is_installed_once_and_answers_for_one_module():
    before = list(sys.meta_path)
    install_finder()
    assert sys.meta_path == before
    for name in ("triton", "triton.backends", f"{MODULE}.more", "megatron.core.transformer"):
        assert not any(
            type(finder).__name__ == "_StandInFinder" and finder.find_spec(name, None)
            for finder in sys.meta_path
        ), name


@pytest.mark.parametrize("name", ["__file__", "__path__", "_private"])
def test_the_stand_in_has_no_names_that_python_asks_for(name):
    assert not hasattr(_StandIn(MODULE), name) and callable(_StandIn(MODULE).anything)
