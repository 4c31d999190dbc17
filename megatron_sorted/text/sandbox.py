"""Jinja's sandbox for templates that come with a model: plain data only, at a bounded cost.

A template is not trusted. It ends with an error where it loops, calls or writes more than any chat
needs. The filters, globals and loop controls it can use are those of transformers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

MAX_RENDERED_CHARACTERS = 33_554_432
MAX_WORK = 2_000_000
"""Largest number of loop passes and calls while one conversation is rendered."""
WIDEST = 10_000
"""Largest number by which a template may multiply a text, or that it may give as a width."""
BEGIN, END = "\U000f0000", "\U000f0001"
"""Private characters that mark `{% generation %}` blocks while their spans are determined."""
LARGE_NUMBER = re.compile(r"[%{][^%{}]*?\d{5}")
FORMATS, WIDTHS = (
    ("format", "format_map"),
    ("center", "indent", "wordwrap", "ljust", "rjust", "zfill", "expandtabs"),
)


class _Needed(jinja2.Undefined):
    """An undefined variable: templates may test whether it is defined, but not write it."""

    def __str__(self) -> str:
        if self._undefined_obj is missing:
            raise UndefinedError(
                f"the template needs the variable {self._undefined_name!r}, which is not defined"
            )
        return ""


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _Dictionary:
    """The `dict` of templates: it builds dictionaries and exposes nothing else."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        """Return a dictionary of these keys."""
        return dict.fromkeys(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}` ... `{% endgeneration %}`: the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser) -> nodes.CallBlock:
        """Return the node of one block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller) -> str:
        return f"{BEGIN}{caller()}{END}" if self.environment.marks else caller()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, which counts loops, calls and characters.

    Attributes:
        marks: Whether `{% generation %}` blocks are marked.
    """

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=_Needed,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.marks, self.work = False, 0
        self.filters |= {"tojson": _tojson, "_counted": self._counted, "_joined": self._joined}
        for name in (*WIDTHS, *FORMATS, "replace"):
            if name in self.filters:
                self.filters[name] = _narrow(name, self.filters[name])
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _now,
            "dict": _Dictionary(),
            "namespace": _Namespace,
        }

    def _parse(self, source, name, filename) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(
                loop.iter, "_counted", [], [], None, None, lineno=loop.lineno, environment=self
            )
        for joined in list(tree.find_all(nodes.Concat)):
            listed = nodes.List(joined.nodes, lineno=joined.lineno, environment=self)
            joined.nodes = [
                nodes.Filter(
                    listed, "_joined", [], [], None, None, lineno=joined.lineno, environment=self
                )
            ]
        return tree

    def count(self, amount: int) -> None:
        """Count work; raise `SecurityError` if a template does too much."""
        self.work += amount
        if self.work > MAX_WORK:
            raise SecurityError(
                f"the template takes more than {MAX_WORK:,} steps for one conversation"
            )

    def _counted(self, items: Any) -> Any:
        if hasattr(items, "__len__"):
            self.count(len(items))
            return items
        if isinstance(items, jinja2.Undefined):
            return items
        return self._one_by_one(items)

    def _one_by_one(self, items: Any):
        for item in items:
            self.count(1)
            yield item

    def _joined(self, parts: list) -> str:
        return _bounded("".join(map(str, parts)))

    def call(self, *args, **kwargs) -> Any:
        """Call a function of a template."""
        self.count(1)
        function = args[1]
        bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        _check_call(
            getattr(function, "__name__", ""), getattr(bound, "__self__", ""), args[2:], kwargs
        )
        return _bounded(super().call(*args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, product, power or format of a template."""
        if operator in ("*", "**") and not all(
            isinstance(side, int | float) and abs(side) <= WIDEST for side in (left, right)
        ):
            sizes = [side for side in (left, right) if isinstance(side, int | float)]
            if operator == "**" or not sizes or abs(sizes[0]) > WIDEST:
                raise SecurityError(
                    f"the template computes {operator} of numbers beyond {WIDEST:,}"
                )
        if operator == "%" and isinstance(left, str):
            _check_call("format", left, (), {})
        return _bounded(super().call_binop(context, operator, left, right))


def _bounded(value: Any) -> Any:
    """Return a value; raise `SecurityError` if it is too large."""
    if isinstance(value, str) and len(value) > MAX_RENDERED_CHARACTERS:
        raise SecurityError(
            f"the template writes more than {MAX_RENDERED_CHARACTERS:,} characters for one "
            "conversation"
        )
    if isinstance(value, list | tuple) and len(value) > MAX_WORK:
        raise SecurityError(f"the template makes a list of more than {MAX_WORK:,} entries")
    return value


def _check_call(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a method or filter of this name cannot make a text that is too long."""
    if name in WIDTHS and any(
        isinstance(number, int) and abs(number) > WIDEST for number in (*args, *kwargs.values())
    ):
        raise SecurityError(f"the template fills a text to more than {WIDEST:,} characters")
    if name in FORMATS and isinstance(value, str) and LARGE_NUMBER.search(value):
        raise SecurityError(f"the template fills a text to more than {WIDEST:,} characters")
    new = args[1] if name == "replace" and len(args) > 1 else ""
    if isinstance(new, str) and (len(str(value)) + 1) * len(new) > MAX_RENDERED_CHARACTERS:
        raise SecurityError(
            f"the template may write more than {MAX_RENDERED_CHARACTERS:,} characters for one "
            "conversation"
        )


def _narrow(name: str, function):
    """Return a filter whose arguments are checked before it runs."""
    mark = getattr(function, "jinja_pass_arg", None)
    first = 0 if mark is None else 1  # after the environment, if the filter takes it

    def bounded(*args, **kwargs):
        _check_call(name, args[first], args[first + 1 :], kwargs)
        return function(*args, **kwargs)

    if mark is not None:
        bounded.jinja_pass_arg = mark
    return bounded


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not write {name!r} into a namespace")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own filter writes < and > as entities
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
