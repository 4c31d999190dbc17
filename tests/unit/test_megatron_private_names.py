"""The private names of Megatron in docs/megatron_versions.md are used here and are there."""

import re
from pathlib import Path

import megatron.core
import pytest

from megatron_sorted.platform.megatron_names import NAMES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sorted"
NOT_IN_EVERY_VERSION = {
    "transformer.moe.paged_stash",
    "_EMERGING_OPTIMIZERS",
    "MegatronOptimizer.get_grads_for_grad_norm",
    "get_main_grads_for_grad_norm",
}


def rows() -> list[tuple[str, str]]:
    """Return each private name, and the places that use it."""
    page = (ROOT / "docs" / "megatron_versions.md").read_text(encoding="utf-8")
    section = page.split("## Private names in use")[1].split("\n## ")[0]
    cells = [line.split(" | ") for line in section.split("\n") if line.startswith("| `")]
    return [(name, users) for names, users, _ in cells for name in re.findall(r"`([\w.]+)`", names)]


@pytest.fixture(scope="module")
def names_in_megatron() -> set[str]:
    """Return every word in the sources of the installed megatron-core."""
    folder = Path(megatron.core.__file__).parent
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return set().union(*(re.findall(r"\w+", text) for text in texts))


def test_the_page_lists_what_a_start_checks():
    listed = {name.rpartition(".")[2] for name, _ in rows()}
    checked = {path.rpartition(".")[2] for _, paths in NAMES for path in paths.split("|")}
    assert checked <= listed


def test_the_page_lists_names():
    assert len(rows()) > 20


@pytest.mark.parametrize(("name", "users"), rows())
def test_a_private_name_is_there_and_in_use(name, users, names_in_megatron):
    word = name.rpartition(".")[2]
    assert word in names_in_megatron or name in NOT_IN_EVERY_VERSION
    files: list[Path] = []
    for place in (PACKAGE / user for user in re.findall(r"`([\w./]+)`", users)):
        files += place.rglob("*.py") if place.is_dir() else [place]
    assert any(re.search(rf"\b{word}\b", file.read_text(encoding="utf-8")) for file in files)
