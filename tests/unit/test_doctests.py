"""The examples in docstrings print what they show."""

import doctest
import importlib

import pytest

from tests.rules.sources import name_of, program_files

MODULES = [
    name_of(path).removesuffix(".py").replace("/", ".")
    for path in program_files()
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_show(name):
    ended = doctest.testmod(importlib.import_module(name))
    assert ended.attempted > 0
    assert ended.failed == 0
