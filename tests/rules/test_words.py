"""Words that only some files may contain, and names that no file may have."""

import io
import re
import tokenize

import pytest

from tests.rules.sources import ROOT, files, name_of, program_files

DEVICE_NAME = re.compile(r"(?<![a-z])(cuda|nccl|npu|hccl)(?![a-z])", re.IGNORECASE)
DEVICE_FILES = (
    "megatron_sorted/platform/",
    "megatron_sorted/settings/",
    "megatron_sorted/planning/launch.py",
    "tools/accept_npu.py",
    "lab/accept_npu.py",
    "lab/acceptance/",
    "megatron_sorted/doctor/devices/",
    "megatron_sorted/serving/vllm/worker.py",
)
"""Files that may name devices: they implement one, let a user choose one, judge some, or
subclass what another program has for each."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/" + r"work(?![\w-])")


def device_names(source: str) -> list[str]:
    """Return the device names in code and its strings; comments and docstrings may have them."""
    names, statement_starts = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and statement_starts
        # From Python 3.12 on, the text of an f-string is a token of its own, FSTRING_MIDDLE.
        if not is_docstring and (
            token.type == tokenize.NAME or "STRING" in tokenize.tok_name[token.type]
        ):
            names += [
                f"line {token.start[0]}: {name}" for name in DEVICE_NAME.findall(token.string)
            ]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            statement_starts = (
                token.type
                in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
                or is_docstring
            )
    return names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x.cuda()\n", ["line 1: cuda"]),
        ('backend = "nccl"\n', ["line 1: nccl"]),
        ("import torch_npu\n", ["line 1: npu"]),
        ('def f():\n    """On cuda."""\n    return input(x)  # nccl\n', []),
    ],
)
def test_device_names_are_reported(source, names):
    assert device_names(source) == names


def test_only_platform_names_devices():
    breaches = {
        name_of(path): names
        for path in program_files()
        if not name_of(path).startswith(DEVICE_FILES)
        and (names := device_names(path.read_text(encoding="utf-8")))
    }
    assert not breaches, "use megatron_sorted.platform instead"


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
    breaches = [
        name_of(path)
        for path in texts
        if path.is_file() and MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not breaches
