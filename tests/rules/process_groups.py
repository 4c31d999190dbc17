"""Calls of Megatron, or of torch.distributed, that leave out a process group.

A source is parsed, not run. Names that it imports are looked up in the packages that are installed,
so signatures are those of the installed Megatron.
"""

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch.distributed as dist

import megatron_sorted  # noqa: F401  it lets Megatron be imported without triton

GROUP = re.compile(
    r"(.*_)?(group|pg_collection|communicator)|(tp|pp|vp|cp|dp|ep|etp)_(size|rank|world_size)"
)
"""Names of parameters that take a process group, several, or what Megatron else asks of them."""
OPTIONAL_ARGUMENTS = "known_arguments"
"""Our function that passes the arguments which the installed Megatron knows."""


@dataclass(frozen=True)
class Omission:
    """A process group that a call leaves out.

    Attributes:
        line: Line of the call.
        function: Name of the function or class that is called.
        parameter: The parameter that it leaves out.
    """

    line: int
    function: str
    parameter: str


def _is_megatrons(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("megatron.")


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function or a constructor, without ``self``.

    A constructor that passes further arguments on takes those of the next class too.
    """
    if not inspect.isclass(function):
        return dict(inspect.signature(function).parameters)
    accepted: dict[str, inspect.Parameter] = {}
    for owner in function.__mro__:
        if "__init__" not in vars(owner):
            continue
        own = list(inspect.signature(owner.__init__).parameters.values())[1:]
        accepted |= {one.name: one for one in own if one.name not in accepted}
        if not any(one.kind is one.VAR_KEYWORD for one in own):
            break
    return accepted


def _group_parameters(function: Callable) -> list[str]:
    """Return the parameters that take a process group and may be left out."""
    return [
        name
        for name, one in _parameters(function).items()
        if GROUP.fullmatch(name) and one.default is None
    ]


def _called(value: Any) -> list[Callable]:
    """Return the functions that run when an object which a call of ``value`` returned is called."""
    if getattr(value, "__name__", "") == "get_forward_backward_func":
        schedules = importlib.import_module(value.__module__)
        names = ("no_pipelining", "pipelining_without_interleaving", "pipelining_with_interleaving")
        return [getattr(schedules, f"forward_backward_{name}") for name in names]
    kinds = [value] if inspect.isclass(value) else []
    if inspect.isfunction(value):
        answer = typing.get_type_hints(value).get("return")
        kinds = [answer, *typing.get_args(answer)]
    return [
        partial(kind.forward, None)
        for kind in kinds
        if inspect.isclass(kind) and _is_megatrons(kind) and hasattr(kind, "forward")
    ]


def _built(_value: Any) -> list[Callable]:
    """Return what Megatron's ``build_module`` builds in this project."""
    layers = importlib.import_module("megatron.core.transformer.transformer_layer")
    return [layers.TransformerLayer]


@dataclass
class Source:
    """The text of one module, whose calls are judged.

    Attributes:
        text: The source.
        around: {call: functions and classes around it, outermost first}.
    """

    text: str
    around: dict[ast.AST, list[ast.AST]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Parse the source."""
        self.tree = ast.parse(self.text)
        self._visit(self.tree, [])

    def _visit(self, node: ast.AST, around: list[ast.AST]) -> None:
        self.around[node] = around
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for child in ast.iter_child_nodes(node):
            self._visit(child, [*around, node] if inner else around)

    @cached_property
    def imports(self) -> dict[str, Any]:
        """Return {name: module or object} of what the source imports from Megatron and from us."""
        names: dict[str, Any] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and _is_looked_up(node.module or ""):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    value = vars(module).get(alias.name)
                    if alias.name not in vars(module):
                        value = importlib.import_module(f"{node.module}.{alias.name}")
                    names[alias.asname or alias.name] = value
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname and _is_looked_up(alias.name):
                        names[alias.asname] = importlib.import_module(alias.name)
                    elif _is_looked_up(alias.name):
                        importlib.import_module(alias.name)
                        first = alias.name.split(".")[0]
                        names[first] = importlib.import_module(first)
        return names

    @cached_property
    def imports_megatron(self) -> bool:
        """Return whether the source imports anything from Megatron."""
        imported = [
            name
            for node in ast.walk(self.tree)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [one.name for one in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        ]
        return any(name.split(".")[0] == "megatron" for name in imported)

    @cached_property
    def assigned(self) -> dict[tuple[ast.AST | None, str], ast.Call]:
        """Return {(function or class, name): call} of what is assigned to variables and to self."""
        calls = {}
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            for target in node.targets:
                if isinstance(target, ast.Name):
                    calls[self._scope(node, ast.FunctionDef), target.id] = node.value
                elif isinstance(target, ast.Attribute):
                    calls[self._scope(node, ast.ClassDef), ast.unparse(target)] = node.value
        return calls

    def _scope(self, node: ast.AST, kind: type) -> ast.AST | None:
        return next((each for each in reversed(self.around[node]) if isinstance(each, kind)), None)

    def value(self, node: ast.AST) -> Any:
        """Return the imported object that an expression names; None for anything else."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            return getattr(owner, node.attr, None) if owner is not None else None
        return None

    def targets(self, call: ast.Call) -> list[Callable]:
        """Return the functions and classes of Megatron that a call may reach."""
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr == "__init__":
            owner = self._scope(call, ast.ClassDef)
            bases = owner.bases if owner is not None else []
            return [kind for kind in map(self.value, bases) if inspect.isclass(kind)]
        value = self.value(function)
        if getattr(value, "__name__", "") == "build_module":
            return _built(value)
        if value is not None:
            is_ours = not _is_megatrons(value) and not inspect.isclass(value)
            return [] if is_ours or not callable(value) else [value]
        made: ast.AST | None = function if isinstance(function, ast.Call) else None
        if isinstance(function, ast.Name):
            made = self.assigned.get((self._scope(call, ast.FunctionDef), function.id))
        elif isinstance(function, ast.Attribute):
            made = self.assigned.get((self._scope(call, ast.ClassDef), ast.unparse(function)))
        return _called(self.value(made.func)) if isinstance(made, ast.Call) else []

    def omissions(self) -> Iterator[Omission]:
        """Yield the process groups of Megatron's functions that calls leave out."""
        for call in ast.walk(self.tree):
            if not isinstance(call, ast.Call):
                continue
            given = self._given(call)
            for target in self.targets(call):
                names = list(_parameters(target))[: len(call.args)]
                for parameter in _group_parameters(target):
                    if given is not None and parameter not in (*names, *given):
                        name = getattr(target, "__name__", ast.unparse(call.func))
                        yield Omission(call.lineno, name, parameter)

    def _given(self, call: ast.Call) -> set[str] | None:
        """Return the names of a call's keyword arguments; None if it passes on its caller's."""
        names, passed_on = set(), False
        own = self._scope(call, ast.FunctionDef)
        for keyword in call.keywords:
            if keyword.arg is not None:
                names.add(keyword.arg)
            elif isinstance(keyword.value, ast.Call):
                if ast.unparse(keyword.value.func) == OPTIONAL_ARGUMENTS:
                    names |= {one.arg for one in keyword.value.keywords if one.arg}
            elif own is not None and own.args.kwarg is not None:
                passed_on |= ast.unparse(keyword.value) == own.args.kwarg.arg
        return None if passed_on else names

    def collectives_without_group(self) -> Iterator[Omission]:
        """Yield the collectives of torch.distributed that do not name their group."""
        for call in ast.walk(self.tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            name, owner = call.func.attr, ast.unparse(call.func.value)
            if owner in ("dist", "torch.distributed") and name in COLLECTIVES:
                places = list(inspect.signature(getattr(dist, name)).parameters)
                if len(call.args) <= places.index("group") and "group" not in self._given(call):
                    yield Omission(call.lineno, name, "group")


def _is_looked_up(module: str) -> bool:
    return module.split(".")[0] in ("megatron", "megatron_sorted", "lab")


def _collectives() -> frozenset[str]:
    """Return the functions of torch.distributed that communicate over a group, by default all."""
    # by type: to ask a deprecated object whether it is an instance would make it warn
    functions = {name: value for name, value in vars(dist).items() if type(value) is FunctionType}
    return frozenset(
        name
        for name, function in functions.items()
        if not name.startswith(("_", "get_", "is_", "new_", "destroy_"))
        and "group" in inspect.signature(function).parameters
    )


COLLECTIVES = _collectives()
