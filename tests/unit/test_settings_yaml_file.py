"""The YAML of a run: scalars of YAML 1.2, and damaged or hostile files."""

import math
import time

import pytest

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.yaml_file import MAX_FILE_BYTES, read_yaml
from tests.rules.sources import ROOT


def values_of(tmp_path, text: str) -> dict:
    (tmp_path / "run.yaml").write_bytes(text.encode())
    return {entry.key: entry.value for entry in read_yaml(str(tmp_path / "run.yaml"))}


# the table of section 10.3.2 of YAML 1.2.2, and words that were something else in YAML 1.1
@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5e+1", -5.0),
        ("12e03", 12000.0),
        ("+12.3", 12.3),
        ("0", 0),
        ("-19", -19),
        ("0o17", 15),
        ("017", 17),
        ("0x3A", 58),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("Null", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("12:30:45", "12:30:45"),
        ("2025-13-01", "2025-13-01"),
        ("2025-01-01", "2025-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("0o8", "0o8"),
        ("=", "="),
        ("tRue", "tRue"),
        ("inf", "inf"),
        ("1e", "1e"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("[1, .5, a]", [1, 0.5, "a"]),
        ("{a: 1}", {"a": 1}),
        ("²", "²"),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_scalars(tmp_path, scalar, value):
    result = values_of(tmp_path, f"key: {scalar}\n")["key"]
    assert result == value and type(result) is type(value)
    assert math.isnan(values_of(tmp_path, "key: .NaN")["key"])


def test_aliases_within_reason_and_lines(tmp_path):
    assert values_of(tmp_path, "a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
    assert [entry.line for entry in read_yaml(str(tmp_path / "run.yaml"))] == [1, 2]
    for text in ("", "# nothing\n", "---\n", "~"):
        assert values_of(tmp_path, text) == {}
    assert values_of(tmp_path, "\ufeffa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


NESTED = (
    "a: [&l0 [1,1,1,1,1,1,1,1,1]"
    + "".join(f", &l{n} [{','.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10))
    + "]"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'a: 1\nnum-layers: !!int "abc"',
            r"line 2: the tag !!int is not supported\. Write the value alone",
        ),
        ('bf16: !!bool "abc"', "line 1: the tag !!bool is not supported"),
        ('save: !!timestamp "x"', "the tag !!timestamp is not supported"),
        ("save: !!str 5", "the tag !!str is not supported"),
        ("save: !own x", "the tag !own is not supported"),
        ("save: ! x", "the tag ! is not supported"),
        (
            "save: !!python/object/apply:os.system [x]",
            "the tag !!python/object/apply:os.system is not supported",
        ),
        ("save: !!set {a}", "is not supported"),
        ("save: !<tag:x\x1b[2J> y", r"the character '\\x1b' is not one of YAML"),
        ("a: 1\nb: \x07", r"line 2: the character '\\x07' is not one of YAML\. Remove it"),
        ("a: 1\n# \u2028b: 2", r"line 2: the character '\\u2028'"),
        ("a: " + "[" * 100_000, "line 1: lists and mappings are nested more than 20 deep"),
        ("- " * 5000, "holds something else"),
        ("a:\n  " + "- " * 5000, "line 2: lists and mappings are nested more than 20 deep"),
        ("a: {b: " + "{c: " * 500, "nested more than 20 deep"),
        (NESTED, "stands for more than 10,000 values, aliases counted each time"),
        ("a: *x", r"the alias \*x stands for nothing"),
        ("a: &a [*a]", r"the alias \*a stands for nothing that is complete"),
        ("b: &b {a: 1}\n<<: *b", "line 2: the merge key << is not supported"),
        ("? [a]\n: 1", r"line 1: the key \['a'\] is not text"),
        ("1: a", "the key 1 is not text"),
        ("a: 1\n\na: 2", "line 3: a is already on line 1"),
        ("a-b: 1\na_b: 2", "a_b is already on line 1"),
        ("a: {b: 1, b: 2}", "b is already"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: " + "1" * 5000, "a number of 5,000 digits, more than 40"),
        ("a: 0x" + "1" * 5000, "a number of 5,002 digits"),
        (r'a: "\Uffffffff"', "not valid YAML"),
        (r'a: "\ud800"', "half of a UTF-16 pair"),
        ("a: [1", "not valid YAML .line 1, column 6"),
        ("a: b: c", "not valid YAML .line 1, column 5"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", "not valid YAML"),
        ("@", "not valid YAML"),
        ("#" * (MAX_FILE_BYTES + 1), "more than 262,144 bytes"),
        ("a", "a run is a mapping"),
        ("[a]", "a run is a mapping"),
    ],
)
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, text, message):
    began = time.process_time()
    with pytest.raises(SettingsError, match=message) as caught:
        values_of(tmp_path, text)
    assert time.process_time() - began < 5
    assert (
        str(caught.value).isprintable()
        and len(str(caught.value)) < 700
        and str(caught.value).startswith(str(tmp_path / "run.yaml"))
    )


def test_values_of_the_wrong_type_are_refused(tmp_path):
    for text, message in (
        ("bf16: yes", "'yes' is not a value of this setting. Give true or false"),
        ("num-layers: 1_000", "Give a whole number"),
        ("num-layers: [" + "1, " * 2000 + "]", "Give a whole number"),
        ("x" * 900 + ": 1", "there is no such setting"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(SettingsError, match=message) as caught:
            load_settings(["--config", str(tmp_path / "run.yaml")])
        assert len(str(caught.value)) < 900
    (tmp_path / "run.yaml").write_text("wandb-exp-name: 2025-13-01\nlr: 1e-4\nseed: 017\n")
    settings = load_settings(["--config", str(tmp_path / "run.yaml")])
    assert (settings.wandb_exp_name, settings.lr, settings.seed) == ("2025-13-01", 1e-4, 17)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_is_read_as_pyyaml_reads_it(path):
    import yaml

    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    result = {entry.key: entry.value for entry in read_yaml(str(path))}
    assert result.keys() == expected.keys()
    for key, value in result.items():  # PyYAML takes 3e-4 for text, since it reads YAML 1.1
        assert value == (float(expected[key]) if isinstance(value, float) else expected[key])
