"""Words that may stand in one place only, and names no file may have."""

import io
import re
import tokenize

import pytest

from tests.rules.sources import ROOT, files, name_of, program_files

DEVICE_WORD = re.compile(r"(?<![a-z])(cuda|nccl|npu|hccl)(?![a-z])", re.IGNORECASE)
DOORS = (
    "megatron_sorted/platform/",
    "megatron_sorted/settings/",
    "tools/accept_npu.py",
    "lab/accept_npu.py",
    "lab/acceptance/",
    "megatron_sorted/doctor/devices/",
)
"""Places that may name devices: the first says how each works, the second lets a user choose one, the others judge some."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/" + r"work(?![\w-])")


def device_words(source: str) -> list[str]:
    """Returns the device words in code and in text that code uses; comments and docstrings may explain a hazard."""
    found, statement_starts = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and statement_starts
        # from Python 3.12 on, the text of an f-string is a token of its own, FSTRING_MIDDLE
        if not is_docstring and (
            token.type == tokenize.NAME or "STRING" in tokenize.tok_name[token.type]
        ):
            found += [
                f"line {token.start[0]}: {word}" for word in DEVICE_WORD.findall(token.string)
            ]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement_starts = (
                token.type
                in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
                or is_docstring
            )
    return found


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x.cuda()\n", ["line 1: cuda"]),
        ('backend = "nccl"\n', ["line 1: nccl"]),
        ("import torch_npu\n", ["line 1: npu"]),
        ('def f():\n    """On cuda."""\n    return input(x)  # nccl\n', []),
    ],
)
def test_device_words_are_seen(source, words):
    assert device_words(source) == words


def test_only_platform_names_devices():
    found = {
        name_of(path): words
        for path in program_files()
        if not name_of(path).startswith(DOORS)
        and (words := device_words(path.read_text(encoding="utf-8")))
    }
    assert not found, "ask megatron_sorted.platform instead"


def test_every_file_is_named_after_what_it_holds():
    vague = [
        name_of(path)
        for path in files(".py")
        if path.stem in VAGUE or {part.name for part in path.parents} & VAGUE - set(ROOT.parts)
    ]
    assert not vague


def test_no_path_of_the_machine_it_was_written_on():
    assert MACHINE_PATH.search("see /" + "work/data") and not MACHINE_PATH.search(
        "home/" + "work /network"
    )
    texts = files(".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".txt", ".cfg", "")
    assert len(texts) > 20
    found = [
        name_of(path)
        for path in texts
        if path.is_file() and MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found
