"""The wording rules hold: no retired word or phrase, one sense for each name, a glossary in order.

Line length and imperative docstrings are rules of ruff (E501, D401).
"""

import ast
import re
from collections import defaultdict

import pytest

from tests.rules.language import breaches, phrase_breaches
from tests.rules.sources import ROOT, files, name_of, program_files

PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SAME_SENSE = {"ExitAdapter", "ExitMlp", "ExitReadout"}
"""Classes that stand for one thing in two frameworks: Megatron's and transformers' modules."""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(way):\n    return way\n", ["name way: way (strategy, method, mode)"]),
        ('"""Return nothing if it can be done."""\n', ["'Return nothing': say what"]),
        ("x = 1  # as the user told it\n", ["'told': given"]),
        ('"""A step.\n\nAttributes:\n    step: Of the run.\n"""\n', ["'step: Of': start with"]),
        ('def always(strategy):\n    """Check a strategy; return the given one."""\n', []),
    ],
)
def test_breaches_are_found(source, found):
    listed = [sentence for _, sentence in breaches(source)]
    assert len(listed) == len(found)
    assert all(sentence.startswith(start) for sentence, start in zip(listed, found, strict=True)), (
        listed
    )


def test_no_source_breaks_a_wording_rule():
    sources = [path for path in files(".py") if "language" not in path.stem]
    assert len(sources) > 700
    listed = [
        f"{name_of(path)}:{number}: {sentence}"
        for path in sources
        for number, sentence in breaches(path.read_text(encoding="utf-8"))
    ]
    assert listed == []


def test_no_page_breaks_a_wording_rule():
    listed = [
        f"{name_of(path)}:{number}: {sentence}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        for sentence in phrase_breaches(line)
    ]
    assert listed == []


def test_a_class_name_has_one_sense():
    places = defaultdict(list)
    for path in program_files():
        if name_of(path).startswith("megatron_sorted/"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name_of(path))
    shared = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert {name: paths for name, paths in shared.items() if name not in SAME_SENSE} == {}


def test_the_glossary_is_in_order_and_complete():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)[1:]
    terms = [term for term, _ in rows]
    assert len(terms) > 25 and len(terms) == len(set(terms))
    assert terms == sorted(terms, key=str.lower)
    assert all(len(meaning) > 10 for _, meaning in rows)
