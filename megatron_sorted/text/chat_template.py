"""Chat templates (jinja) rendered as transformers renders them, with bounds on size and work.

A template comes with a model and is not trusted: it runs in jinja's immutable sandbox, sees plain data only, and ends with an error
where it loops, calls or writes more than any chat needs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from megatron_sorted.errors import DataError

MOST_TEMPLATE_CHARACTERS = 262_144
"""The longest public templates have about 30,000."""
MOST_RENDERED_CHARACTERS = 33_554_432
MOST_WORK = 2_000_000
"""Passes of loops and calls while one conversation is rendered."""
WIDEST = 10_000
"""Largest number that a template may multiply a text by, or give as a width."""
BEGIN, END = "\U000f0000", "\U000f0001"
"""Private characters that mark `{% generation %}` blocks while spans are looked for."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, gpt-oss's the second."""
LARGE_NUMBER = re.compile(r"[%{][^%{}]*?\d{5}")
WIDTHS = ("center", "indent", "wordwrap", "ljust", "rjust", "zfill", "expandtabs")


class TemplateRefusal(ValueError):
    """A template does not take a conversation; its argument says why."""


class _Needed(jinja2.Undefined):
    """A variable that is not there: templates may ask whether it is, but not write it."""

    def __str__(self) -> str:
        if self._undefined_obj is missing:
            raise UndefinedError(f"the template needs the variable {self._undefined_name!r}, which is not there")
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
    """`dict` for templates: makes dictionaries and gives nothing else away."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        """Return a dictionary of these keys."""
        return dict.fromkeys(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser) -> nodes.CallBlock:
        """Return the node of one block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller) -> str:
        return f"{BEGIN}{caller()}{END}" if self.environment.marks else caller()


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, counting loops, calls and characters.

    Attributes:
        marks: Whether `{% generation %}` blocks are marked.
    """

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, undefined=_Needed, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.marks, self.work = False, 0
        self.filters |= {"tojson": _tojson, "_counted": self._counted, "_joined": self._joined}
        for name in (*WIDTHS, "format", "replace"):
            if name in self.filters:
                self.filters[name] = _narrow(self.filters[name], _check_widths if name in WIDTHS else _check_growth)
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dictionary(), "namespace": _Namespace}

    def _parse(self, source, name, filename) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno, environment=self)
        for joined in list(tree.find_all(nodes.Concat)):
            listed = nodes.List(joined.nodes, lineno=joined.lineno, environment=self)
            joined.nodes = [nodes.Filter(listed, "_joined", [], [], None, None, lineno=joined.lineno, environment=self)]
        return tree

    def count(self, amount: int) -> None:
        """Count work and end what does too much of it."""
        self.work += amount
        if self.work > MOST_WORK:
            raise SecurityError(f"the template takes more than {MOST_WORK:,} steps for one conversation")

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
        """Call what a template calls."""
        self.count(1)
        function = args[1]
        if getattr(function, "__name__", "") in WIDTHS:
            _check_widths(args[2:], kwargs)
        if getattr(function, "__name__", "") in ("format", "format_map", "replace"):
            bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            _check_growth(getattr(bound, "__self__", ""), args[2:])
        return _bounded(super().call(*args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """Compute a sum, product, power or format of a template."""
        if operator in ("*", "**") and not all(isinstance(side, int | float) and abs(side) <= WIDEST for side in (left, right)):
            sizes = [side for side in (left, right) if isinstance(side, int | float)]
            if operator == "**" or not sizes or abs(sizes[0]) > WIDEST:
                raise SecurityError(f"the template computes {operator} of numbers beyond {WIDEST:,}")
        if operator == "%" and isinstance(left, str):
            _check_growth(left, ())
        return _bounded(super().call_binop(context, operator, left, right))


def _bounded(value: Any) -> Any:
    """Return a value that is not too large."""
    if isinstance(value, str) and len(value) > MOST_RENDERED_CHARACTERS:
        raise SecurityError(f"the template writes more than {MOST_RENDERED_CHARACTERS:,} characters for one conversation")
    if isinstance(value, list | tuple) and len(value) > MOST_WORK:
        raise SecurityError(f"the template makes a list of more than {MOST_WORK:,} entries")
    return value


def _check_growth(text: Any, args: Sequence[Any]) -> None:
    """Check that a format names no large width, and that a replacement stays within bounds."""
    if isinstance(text, str) and LARGE_NUMBER.search(text):
        raise SecurityError(f"the template fills a text to more than {WIDEST:,} characters")
    if len(args) > 1 and isinstance(args[1], str) and (len(str(text)) + 1) * len(args[1]) > MOST_RENDERED_CHARACTERS:
        raise SecurityError(f"the template may write more than {MOST_RENDERED_CHARACTERS:,} characters for one conversation")


def _check_widths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(value, int) and abs(value) > WIDEST for value in (*args, *kwargs.values())):
        raise SecurityError(f"the template fills a text to more than {WIDEST:,} characters")


def _narrow(function, check):
    """Return a filter whose arguments are checked before it runs."""
    mark = getattr(function, "jinja_pass_arg", None)
    if mark is None:
        def bounded(value, *args, **kwargs):
            check(*((args, kwargs) if check is _check_widths else (value, args)))
            return function(value, *args, **kwargs)
    else:
        def bounded(environment, value, *args, **kwargs):
            check(*((args, kwargs) if check is _check_widths else (value, args)))
            return function(environment, value, *args, **kwargs)

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
    # jinja's own writes < and > as entities
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def as_template_sees(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without keys whose value is None, and with their reasoning under the names that templates read."""
    found = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in REASONING if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        found.append(kept)
    return found


class ChatTemplate:
    """A compiled template.

    Args:
        text: Jinja.
        where: Its name, for messages.

    Raises:
        DataError: It is too large, or no template.
    """

    def __init__(self, text: str, where: str):
        if len(text) > MOST_TEMPLATE_CHARACTERS:
            raise DataError(f"{where}: {len(text):,} characters, more than the {MOST_TEMPLATE_CHARACTERS:,} of any sensible template. "
                            "Give a smaller one.")
        self.text, self.where, self.has_generation = text, where, GENERATION.search(text) is not None
        self._environment = _Bounded()
        try:
            self._template = self._environment.from_string(text)
        except (TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise DataError(f"{where}: not a template that jinja can read ({_short(error)}). Mend it, or use --prompt-template "
                            "plain.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], add_generation_prompt: bool = False,
               tools: Sequence[Any] | None = None, documents: Sequence[Any] | None = None) -> str:
        """Return the text of a conversation, equal to transformers' ``apply_chat_template(..., tokenize=False)``.

        Args:
            messages: Role, content and what else the template reads.
            tokens: Names of special tokens (``bos_token`` ...) and how they are written.
            add_generation_prompt: Whether it ends where the assistant begins to answer.
            tools: JSON schemas of functions that may be called.
            documents: What may be looked up.

        Raises:
            TemplateRefusal: The template does not take it.
        """
        return self._render(messages, tokens, add_generation_prompt, tools, documents, False)

    def generation_spans(self, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], tools: Sequence[Any] | None = None,
                         documents: Sequence[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and where the template's `{% generation %}` blocks stand in it.

        Raises:
            TemplateRefusal: The template does not take it.
        """
        marked = self._render(messages, tokens, False, tools, documents, True)
        text, spans, begin = [], [], None
        length = 0
        for piece in re.split(f"([{BEGIN}{END}])", marked):
            if piece == BEGIN:
                begin = length
            elif piece == END:
                if begin is not None and length > begin:
                    spans.append((begin, length))
                begin = None
            else:
                text.append(piece)
                length += len(piece)
        return "".join(text), spans

    def _render(self, messages, tokens, add_generation_prompt, tools, documents, marks) -> str:
        environment = self._environment
        environment.marks, environment.work = marks, 0
        parts, length = [], 0
        try:
            for part in self._template.generate(messages=as_template_sees(messages), tools=tools, documents=documents,
                                                add_generation_prompt=add_generation_prompt, **tokens):
                parts.append(part)
                length += len(part)
                if length > MOST_RENDERED_CHARACTERS:
                    raise SecurityError(f"the template writes more than {MOST_RENDERED_CHARACTERS:,} characters for one conversation")
        except Exception as error:  # templates raise what they like, also TypeError and RecursionError
            raise TemplateRefusal(_short(error)) from error
        return "".join(parts)


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> ChatTemplate:
    """Return a template, compiled once; errors as for ``ChatTemplate``."""
    return ChatTemplate(text, where)


def _short(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:200]
