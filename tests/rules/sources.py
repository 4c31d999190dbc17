"""The project's source files, for the rules."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"runs", "build", "dist", "_build", "__pycache__"}


def files(*suffixes: str) -> list[Path]:
    """Return the project's files with one of these suffixes, except generated and hidden ones."""
    paths = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix in suffixes and not any(
            part.startswith(".") or part in GENERATED or part.endswith(".egg-info")
            for part in parts
        ):
            paths.append(path)
    return sorted(paths)


def program_files() -> list[Path]:
    """Return the Python files of the program: package, lab, tools and entry points, no tests."""
    return [
        path
        for path in files(".py")
        if path.relative_to(ROOT).parts[0] not in ("tests", "setup.py")
    ]


def name_of(path: Path) -> str:
    """Return the path from the project's root, with slashes."""
    return path.relative_to(ROOT).as_posix()


def functions(
    tree: ast.Module,
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, list[ast.AST]]]:
    """Yield every function and class with the functions and classes around it, outermost first."""

    def visit(node: ast.AST, around: list[ast.AST]) -> Iterator:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield child, around
                yield from visit(child, [*around, child])
            else:
                yield from visit(child, around)

    return visit(tree, [])
