"""The rules of imports between modules."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import grimp
import pytest

from tests.rules.sources import ROOT, files, name_of, program_files


def test_imports_go_down():
    # in a process of its own: under Python 3.12 the linter closes pytest's captured output
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "pyproject.toml")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def cycles(importers: Mapping[str, Collection[str]]) -> list[str]:
    """Return the modules that are part of an import cycle, given {module: its imports}."""
    left = {module: set(names) & set(importers) - {module} for module, names in importers.items()}
    while free := [module for module, names in left.items() if not names & set(left)]:
        for module in free:
            del left[module]
    while free := [
        module for module in left if not any(module in names for names in left.values())
    ]:
        for module in free:
            del left[module]
    return sorted(left)


def test_cycles_are_reported():
    assert cycles({"a": ["b"], "b": ["c"], "c": []}) == []
    assert cycles({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == ["b", "c"]


def test_no_module_imports_itself_through_others():
    """Imports inside functions and those for type checkers count."""
    graph = grimp.build_graph("megatron_sorted", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    assert len(graph.modules) > 300
    assert (
        cycles(
            {
                module: graph.find_modules_directly_imported_by(module)
                for module in graph.modules - packages
            }
        )
        == []
    )


def named_files(page: str) -> list[str]:
    """Return the paths of the package in a page: folders of its table, and files in its walks."""
    paths = re.findall(r"^\| `([\w/.]+)`", page, re.MULTILINE)
    for block in re.findall(
        r"^    ([\w/]+/)  +(.+(?:\n {16,}.+)*)",
        page.split("## Walks")[1].split("## Tests")[0],
        re.MULTILINE,
    ):
        paths += [block[0] + name for name in re.findall(r"[\w/]+\.py", block[1])]
    return paths


def test_the_map_names_what_is_there():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = named_files(page)
    assert len(names) > 40
    assert [name for name in names if not (ROOT / "megatron_sorted" / name).exists()] == []
    folders = {path.parent.name for path in (ROOT / "megatron_sorted").glob("*/__init__.py")}
    assert folders <= {
        part for name in re.findall(r"`([\w/.]+/)`", page) for part in name.split("/")
    }


@pytest.mark.parametrize("folder", ["settings", "exits", "planning"])
def test_light_folders_import_neither_torch_nor_megatron(folder):
    modules = [
        f"megatron_sorted.{folder}.{path.stem}"
        for path in (ROOT / "megatron_sorted" / folder).glob("[a-z]*.py")
    ]
    assert len(modules) >= 4
    code = (
        f"import sys, {', '.join(modules)};"
        "print(sorted({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def imported(source: str) -> set[str]:
    """Return the top packages that a source imports, also inside functions."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


def edits_of_the_path(source: str) -> list[int]:
    """Return the lines on which a source assigns, deletes or calls a method of ``sys.path``."""

    def is_path(node: ast.AST) -> bool:
        node = node.value if isinstance(node, ast.Subscript) else node
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "path"
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )

    lines = []
    for node in ast.walk(ast.parse(source)):
        changed = (
            [node.func.value]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            else getattr(node, "targets", [])
        )
        changed = [node.target] if isinstance(node, ast.AugAssign) else changed
        lines += [node.lineno for part in changed if is_path(part)]
    return lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import sys\nsys.path.insert(0, x)", [2]),
        ("sys.path[0] = x", [1]),
        ("del sys.path[0]", [1]),
        ("sys.path += [x]", [1]),
        ("sys.path = []", [1]),
        ("y = sys.path[1:]", []),
        ("os.path.join(x)", []),
        ("f('sys.path.append(x)')", []),
    ],
)
def test_edits_of_the_path_are_reported(source, lines):
    assert edits_of_the_path(source) == lines


def test_no_program_file_edits_the_search_path():
    edits = {
        name_of(path): lines
        for path in program_files()
        if (lines := edits_of_the_path(path.read_text(encoding="utf-8")))
    }
    assert not edits, "start a module of ours with `python -m` (command_line.own_module)"


def test_nothing_imports_the_lab():
    """The documentation, whose reference pages the lab writes, is the exception."""
    outside = [path for path in program_files() if not name_of(path).startswith(("lab/", "docs/"))]
    assert len(outside) > 100
    assert [
        name_of(path) for path in outside if "lab" in imported(path.read_text(encoding="utf-8"))
    ] == []


def defined(path: Path) -> set[str]:
    """Return the names that a source defines, assigns or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_every_imported_name_of_the_project_exists():
    """Also in functions and in tests that run on devices alone."""
    names, missing = {}, []
    for path in files(".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").partition(".")[0] in ("megatron_sorted", "lab", "tests")
            ):
                continue
            place = ROOT / node.module.replace(".", "/")
            source = (
                place.with_suffix(".py")
                if place.with_suffix(".py").is_file()
                else place / "__init__.py"
            )
            if source not in names:
                names[source] = defined(source) if source.is_file() else set()
            for alias in node.names:
                inside = place / alias.name
                if (
                    alias.name not in names[source]
                    and not inside.is_dir()
                    and not inside.with_suffix(".py").is_file()
                ):
                    missing.append(
                        f"{name_of(path)}, line {node.lineno}: {node.module}.{alias.name}"
                    )
    assert len(names) > 300 and missing == []
