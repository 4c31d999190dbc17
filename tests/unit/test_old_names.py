"""Old names of options and keys work, print one note, and are refused beside the new names."""

import json
from importlib import import_module

import pytest

from megatron_sorted import old_names
from megatron_sorted.commands import COMMANDS
from megatron_sorted.commands.parser import Parser
from megatron_sorted.decoding.strategies import Full, SelfSpeculative
from megatron_sorted.decoding.tuning.tuned_options import read_tuned_options, write_tuned_options
from megatron_sorted.errors import DataError, SettingsError, SortedError
from megatron_sorted.old_names import FLAGS, KEYS, rename_flags, rename_keys
from megatron_sorted.settings.flags import known_flags

MINIMAL = {
    "benchmark": ["model", "--questions", "questions.jsonl"],
    "generate": ["model", "--prompt", "once"],
    "serve": ["model"],
}
"""Command with a renamed option -> its required arguments."""


class Captured(Exception):
    """A parser was about to read a command line."""


@pytest.fixture(autouse=True)
def no_earlier_notes(monkeypatch):
    monkeypatch.setattr(old_names, "_printed", set())


def parser_of(command: str) -> Parser:
    """Return the parser of a command, captured before it reads a command line."""

    def capture(self, *_):
        raise Captured(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured) as captured:
        patch.setattr(Parser, "parse_known_args", capture)
        import_module(f"megatron_sorted.commands.{command}").main([])
    return captured.value.args[0]


def options_of(command: str) -> set[str]:
    """Return all options of a command and of its verbs."""
    options, parsers = set(), [parser_of(command)]
    while parsers:
        parser = parsers.pop()
        options |= parser._option_string_actions.keys()
        if parser._subparsers is not None:
            parsers += parser._subparsers._group_actions[0].choices.values()
    return options


OLD_FLAGS = [
    (command, old)
    for command in COMMANDS
    if command != "train"  # its options are settings
    for old, new in FLAGS.items()
    if new in options_of(command)
]


def test_every_old_flag_belongs_to_a_command_and_is_free():
    assert {old for _, old in OLD_FLAGS} == FLAGS.keys()
    assert {command for command, _ in OLD_FLAGS} == MINIMAL.keys()
    taken = set(known_flags()).union(*(options_of(name) for name in COMMANDS if name != "train"))
    assert not FLAGS.keys() & taken, "an old name that an option has would never be renamed"


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "with ="])
@pytest.mark.parametrize(("command", "old"), OLD_FLAGS)
def test_an_old_flag_works_and_prints_one_note(command, old, joined, capsys):
    parser, new = parser_of(command), FLAGS[old]
    value = str(parser._option_string_actions[new].choices[0])
    given, expected = (
        parser.parse_args([*MINIMAL[command], *([f"{flag}={value}"] if joined else [flag, value])])
        for flag in (old, new)
    )
    assert given == expected
    parser.parse_args([*MINIMAL[command], old, value])
    assert capsys.readouterr().err == (
        f"note: {old} is now called {new}; the old name still works.\n"
    )


@pytest.mark.parametrize(("command", "old"), OLD_FLAGS)
def test_an_old_flag_beside_the_new_one_is_refused(command, old, capsys):
    parser, new = parser_of(command), FLAGS[old]
    value = str(parser._option_string_actions[new].choices[0])
    with pytest.raises(SettingsError, match=rf"^{old} and {new}: .* Leave out {old}\.$"):
        parser.parse_args([*MINIMAL[command], new, value, f"{old}={value}"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("old", "new"), FLAGS.items())
def test_only_options_of_the_command_before_two_dashes_are_renamed(old, new, capsys):
    assert rename_flags(["a", "--", old], {new}) == ["a", "--", old]
    assert rename_flags([old], set()) == [old], "the command has no such option"
    assert rename_flags([old], {old, new}) == [old], "the command has an option of the old name"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_old_keys(old, new, capsys):
    renamed = rename_keys({"a": 1, old: [2], "b": 3})
    assert list(renamed.items()) == [("a", 1), (new, [2]), ("b", 3)]
    rename_keys({old: None})
    assert capsys.readouterr().err == (
        f"note: the key {old!r} is now called {new!r}; the old name still works.\n"
    )
    with pytest.raises(ValueError, match=rf"^{old} and {new}: .* Leave out {old}\.$"):
        rename_keys({old: 1, new: 1})


def with_old_keys(value: object) -> object:
    """Return JSON data with the old name of every key that has one."""
    old_of = {new: old for old, new in KEYS.items()}
    if isinstance(value, dict):
        return {old_of.get(key, key): with_old_keys(inner) for key, inner in value.items()}
    return [with_old_keys(inner) for inner in value] if isinstance(value, list) else value


def check_notes(content: dict, errors: str) -> None:
    """Check that there is one note for every old key of the content's first level."""
    used = [old for old in KEYS if old in content]
    assert used and errors == "".join(
        f"note: the key {old!r} is now called {KEYS[old]!r}; the old name still works.\n"
        for old in used
    )


def with_both_keys(content: dict) -> dict:
    return {**content, **{KEYS[old]: value for old, value in content.items() if old in KEYS}}


def test_old_keys_of_decoding_json(tmp_path, capsys):
    path = tmp_path / "decoding.json"
    write_tuned_options(path, {"best": "full", "strategies": {"full": {}, "fixed": {"depth": 2}}})
    write_tuned_options(path, {"best": "full", "strategies": {"full": {}}}, "small@1")
    expected = [read_tuned_options(path, key) for key in (None, "small@1")]
    assert capsys.readouterr().err == ""
    content = with_old_keys(json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    assert [read_tuned_options(path, key) for key in (None, "small@1")] == expected
    check_notes(content, capsys.readouterr().err)
    path.write_text(json.dumps(with_both_keys(content)))
    with pytest.raises(DataError, match=r"decoding\.json: .*two names of one value are given"):
        read_tuned_options(path)
    draft = content["drafts"]["small@1"]
    path.write_text(json.dumps({**content, "drafts": {"small@1": with_both_keys(draft)}}))
    with pytest.raises(DataError, match=r"decoding\.json: .*two names of one value are given"):
        read_tuned_options(path)


def test_old_keys_of_decoding_bandit_json(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="serving is an extra")
    from megatron_sorted.serving.adaptation import Adaptation

    path, strategies = tmp_path / "decoding_bandit.json", [Full(), SelfSpeculative(2, 4)]
    origin = {"machine": {"device": "cpu"}, "draft": None}
    adaptation = Adaptation(strategies, path, origin)
    adaptation.learn("default", 1, 8, 2.0)
    adaptation.save()
    content = with_old_keys(json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    assert Adaptation(strategies, path, origin).learned == adaptation.learned
    printed = capsys.readouterr()
    check_notes(content, printed.err)
    assert printed.out == "" and [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_text(json.dumps(with_both_keys(content)))
    with pytest.raises(DataError, match=r"decoding_bandit\.json: .*two names of one value"):
        Adaptation(strategies, path, origin)


@pytest.mark.parametrize("kind", ["CompletionRequest", "ChatRequest"])
def test_old_keys_of_requests(kind, capsys):
    pytest.importorskip("fastapi", reason="serving is an extra")
    from megatron_sorted.serving import requests

    kind = getattr(requests, kind)
    values = {"prompt": "a"} if "prompt" in kind.model_fields else {"messages": []}
    content = with_old_keys({**values, "strategy": "tree"})
    assert requests.read_request(kind, content) == requests.read_request(
        kind, {**values, "strategy": "tree"}
    )
    requests.read_request(kind, content)
    check_notes(content, capsys.readouterr().err)
    with pytest.raises(SortedError, match="two names of one value are given") as refused:
        requests.read_request(kind, with_both_keys(content))
    assert refused.value.field == "strategy" and refused.value.status == 400
