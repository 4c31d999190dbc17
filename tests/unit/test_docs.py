"""Every command that README and docs show is understood by the real parsers; every page says what
it is for.
"""

import argparse
import re
import sys
from importlib import import_module

import pytest

from megatron_sorted.commands import COMMANDS
from megatron_sorted.commands.parser import Parser
from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.flags import parse_flags
from tests.rules.sources import ROOT
from tests.support.documented_commands import commands_of, pages

DOCUMENTED = [command for page in pages() for command in commands_of(page)]


class ParsedError(Exception):
    """Raised in place of running a command whose arguments were accepted."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Make every parser raise ``ParsedError`` once it has accepted its arguments."""

    def stop(parse):
        def parse_and_stop(*args, **options):
            parse(*args, **options)
            raise ParsedError

        return parse_and_stop

    monkeypatch.setattr(Parser, "parse_some", stop(Parser.parse_some))
    monkeypatch.setattr(Parser, "parse_args", stop(Parser.parse_args))
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args)
    )


def check_command(arguments: list[str], monkeypatch) -> None:
    """Check that a command is accepted as far as its arguments go."""
    program, *rest = arguments
    if program == "torchrun" or program == "srun":
        entry = next(
            (n for n, word in enumerate(rest) if word in ("-m", "pretrain_sorted.py")), None
        )
        if entry is None and "bash" in rest:
            return None
        if entry is None:
            entry = rest.index("megatron-sorted")
            return check_command(rest[entry:], monkeypatch)
        rest = rest[entry:]
        if rest[0] == "-m":
            assert rest[1] == "megatron_sorted"
            return check_command(["megatron-sorted", *rest[2:]], monkeypatch)
        return check_command(["megatron-sorted", "train", *rest[1:]], monkeypatch)
    if program in ("python", "python3"):
        assert rest[0] == "-m", arguments
        if rest[1] == "megatron_sorted":
            return check_command(["megatron-sorted", *rest[2:]], monkeypatch)
        if rest[1].startswith("lab."):
            monkeypatch.setattr(sys, "argv", rest[1:])
            with pytest.raises(ParsedError):
                import_module(rest[1]).main()
        return None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), arguments
        return None
    if program == "pip":
        return None
    if program.startswith("slurm/"):
        assert (ROOT / program).is_file(), program
        return None
    if not rest or rest == ["--version"] or rest == ["--help"]:
        return None
    if rest[0] == "COMMAND":
        return None
    assert rest[0] in COMMANDS, arguments
    if rest[0] == "train":
        parse_flags(rest[1:])
        return None
    with pytest.raises((ParsedError, SystemExit)) as ended:
        import_module(f"megatron_sorted.commands.{rest[0]}").main(rest[1:])
    assert ended.type is ParsedError or ended.value.code in (0, None), arguments
    return None


@pytest.mark.parametrize("command", DOCUMENTED, ids=str)
def test_a_documented_command_is_accepted(command, stop_after_parsing, monkeypatch):
    arguments = list(command.arguments)
    arguments[0] = arguments[0].removeprefix(".venv/bin/")
    check_command(arguments, monkeypatch)


def test_the_pages_show_commands():
    assert len(DOCUMENTED) > 80
    assert {command.page for command in DOCUMENTED} > {"README.md", "docs/tutorial.md"}


@pytest.mark.parametrize("arguments", [["megatron-sorted", "extract", "a", "b", "--deep", "2"]])
def test_a_wrong_command_is_refused(arguments, stop_after_parsing, monkeypatch):
    with pytest.raises(AssertionError):
        check_command(arguments, monkeypatch)
    with pytest.raises(SettingsError):
        check_command(["megatron-sorted", "train", "--exit-layers-num", "2"], monkeypatch)


@pytest.mark.parametrize(
    "page",
    [
        path
        for path in sorted((ROOT / "docs").rglob("*.md"))
        if not {"_build", "reference"} & set(path.parts)
        and path.stem not in ("architecture", "contributing", "changelog")
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_a_page_says_what_it_is_for_and_what_to_read_first(page):
    head = page.read_text(encoding="utf-8").split("\n", 9)[:9]
    assert head[0].startswith("# ")
    quoted = " ".join(line.removeprefix("> ") for line in head[1:] if line.startswith("> "))
    assert "**What this is for**: " in quoted
    assert "**Read first**: " in quoted
