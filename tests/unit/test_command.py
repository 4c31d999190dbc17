"""How commands begin and end: closed and broken streams, any encoding, Ctrl-C, mistakes in one line; faults of ours in full."""

import ast
import os
import re
import signal
import subprocess
import sys

import pytest

from megatron_sorted import __version__
from megatron_sorted.commands import COMMANDS
from tests.support.commands import ROOT, environment

LAB = sorted(path for path in ROOT.glob("lab/*.py") if path.name != "__init__.py")
ENTRIES = sorted(
    [
        *(path for path in ROOT.glob("tools/*.py") if path.stem != "entry"),
        ROOT / "pretrain_sorted.py",
    ]
)
MOST_LINES, MOST_COLUMNS = 50, 104
WATCHED = """\
import atexit, os, sys
heavy = {"torch", "transformers", "megatron", "numpy", "fastapi", "matplotlib"}
tell = atexit.register(lambda: print(*["imported", *sorted(heavy & set(sys.modules))], file=sys.stderr, flush=True))
end = os._exit  # what training ends with
os._exit = lambda status: (tell(), end(status))
from megatron_sorted.__main__ import main
main()
"""
NEAREST = {
    "train": (["--trian-iters", "1"], "--train-iters"),
    "prepare": (["--inptu", "a"], "--input"),
    "split": (["--ouput", "a"], "--output"),
    "convert": (["export", "a", "b", "--dytpe", "float16"], "--dtype"),
    "extract": (["a", "b", "--dpeth", "1"], "--depth"),
    "evaluate": (["m", "--txet", "a"], "--text"),
    "generate": (["m", "--promt", "a"], "--prompt"),
    "serve": (["m", "--prot", "1"], "--port"),
    "tune": (["m", "--prompt-flie", "a"], "--prompt-file"),
    "benchmark": (["m", "--question", "a", "--swep"], "--sweep"),
    "report": (["a", "--outptu", "b"], "--output"),
    "plan": (["a.yaml", "--serach"], "--search"),
    "doctor": (["--netwrok"], "--network"),
    "launch": (["slurm", "--hlep"], "--help"),
    "examples": (["a", "--overwirte"], "--overwrite"),
}
"""Command -> words with an option that there is not, and the one that is meant."""
BEGIN = "from megatron_sorted.command_line import run_main, start_command; start_command(); import sys, time, os\n"


def started(body: str, *words: str, stdout=subprocess.PIPE, **variables) -> subprocess.Popen:
    """Returns a process that runs ``body`` as a command's main."""
    source = (
        BEGIN
        + "def main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "run_main(main, 'Nothing was written.')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", source, *words],
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("path", LAB, ids=lambda path: path.name)
def test_every_command_of_the_lab_begins_before_its_slow_imports_and_ends_the_same_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    assert [ast.unparse(node) for node in guards[0].body] == ["start_command()"]
    assert ast.unparse(guards[-1].body[-1]).startswith("run_main(main")
    before = {
        name.name.partition(".")[0]
        if isinstance(node, ast.Import)
        else node.module.partition(".")[0]
        for node in tree.body[: tree.body.index(guards[0])]
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert before <= set(sys.stdlib_module_names) | {"megatron_sorted"}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_every_entry_point_is_a_few_lines_that_start_a_command(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 20
    module, command = re.search(
        r'^    run\((?:"([\w.]+)", )?"([\w.]+)"\)$', source, re.MULTILINE
    ).groups()
    if command.startswith("lab."):
        assert command == f"lab.{path.stem}" and (ROOT / "lab" / path.name).is_file()
    else:
        assert (module, command) == (None, "megatron_sorted.launching.facts") or command in COMMANDS


def test_every_command_has_its_file_and_every_file_its_command():
    files = {path.stem for path in (ROOT / "megatron_sorted" / "commands").glob("[a-z]*.py")}
    assert files == {*COMMANDS, "parser"}


def run_watched(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command, whose last line of error output then names the slow packages that it imported."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_ends_with_an_example_and_is_quick(name):
    done = run_watched(name, "--help")
    lines = done.stdout.rstrip().splitlines()
    assert done.returncode == 0 and done.stderr == "imported\n", done.stderr
    example = "torchrun" if name == "doctor" else f"megatron-sorted {name}"
    assert lines[0].startswith(f"usage: megatron-sorted {name}") and lines[-1].startswith(
        f"example: {example}"
    )
    if name != "train":  # 196 settings
        assert len(lines) <= MOST_LINES and max(map(len, lines)) <= MOST_COLUMNS, [
            line for line in lines if len(line) > MOST_COLUMNS
        ]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_names_the_nearest_and_is_quick(name):
    wrong, meant = NEAREST[name]
    done = run_watched(name, *wrong)
    *said, imported = done.stderr.splitlines()
    assert done.returncode == (1 if name in ("train", "plan") else 2) and imported == "imported", (
        done.stderr
    )
    assert (
        len(said) == 1
        and said[0].startswith("error: ")
        and said[0].endswith(f" Did you mean {meant}?")
    ), done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "exprot", "a", "b"), "invalid choice: 'exprot'. Did you mean export?"),
        (
            ("evaluate", "model", "--tasks", "no_such_task"),
            "--tasks: lm-evaluation-harness knows no 'no_such_task'",
        ),
        (("evaluate", "model"), "nothing to measure"),
        (("generate", "model"), "Give --prompt, --prompt-file or --chat."),
        (
            ("generate", "model", "--prompt", "a", "--temperature", "-1"),
            "temperature: -1.0 is not 0 or more",
        ),
        (("serve", "model", "--adapt", "--strategy", "tree"), "--adapt beside --strategy tree"),
        (
            ("prepare", "--input", "a", "--output-prefix", "b", "--workers", "0"),
            "--workers: 0 is not at least 1",
        ),
        (
            ("split", "--input", "a", "--output", "b", "--num-tokens", "3"),
            "--num-tokens: which tokens?",
        ),
        (("report", "a", "b", "c", "d", "e", "f", "g"), "more than one picture can tell apart"),
        (("launch", "slum", "gpu"), "Did you mean slurm?"),
        (("plan",), "no run. Give its YAML file"),
        (("train", "--config", "missing.yaml"), "missing.yaml: cannot be read"),
    ],
)
def test_what_can_be_refused_early_is(words, message):
    if "--tasks" in words:
        pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    done = run_watched(*words)
    *said, imported = done.stderr.splitlines()
    assert (
        done.returncode in (1, 2)
        and imported == "imported"
        and len(said) == 1
        and message in said[0]
    ), done.stderr


def test_a_command_that_goes_well():
    assert ended(started("print('done')")) == (0, "done\n", "")
    assert ended(started("print('judged'); return 3")) == (3, "judged\n", "")
    assert ended(started("raise SystemExit('error: this')")) == (1, "", "error: this\n")


def test_the_version_has_one_place():
    assert ended(started("print('not reached')", "--version")) == (
        0,
        f"megatron_sorted {__version__}\n",
        "",
    )
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "__init__.py" in setup and __version__ not in setup


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            "from megatron_sorted.errors import DataError; raise DataError('x: 3. Change it.')",
            "error: x: 3. Change it.",
        ),
        (
            "open('/nowhere/a')",
            "error: /nowhere/a: No such file or directory. Check the path, its permissions and the free space.",
        ),
        (
            "open('/')",
            "error: /: Is a directory. Check the path, its permissions and the free space.",
        ),
        (
            "raise OSError(28, 'No space left on device')",
            "error: No space left on device. Check the path, its permissions and the free space.",
        ),
        (
            "raise MemoryError",
            "error: out of memory. Ask for less at once, or use a machine with more.",
        ),
        (
            "open('a' * 300)",
            f"error: {'a' * 300}: File name too long. Check the path, its permissions and the free space.",
        ),
        (
            "open('/dev/null', 'w').write('\\udcff')",
            r"error: '\udcff' is not text: it holds bytes that are not UTF-8. Correct it.",
        ),
    ],
)
def test_a_mistake_is_one_line(body, line):
    assert ended(started(body)) == (1, "", line + "\n")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            r"from megatron_sorted.errors import DataError; raise DataError('a\x1b[2J\nerror: \u202eforged')",
            r"error: a\x1b[2J\nerror: \u202eforged",
        ),
        (
            r"open('/nowhere\n/\x1b[2J')",
            r"error: /nowhere\n/\x1b[2J: No such file or directory. Check the path, its permissions and the free space.",
        ),
        (
            r"raise SystemExit('error: one\x1b[2J\nand a line of ours')",
            "error: one\\x1b[2J\nand a line of ours",
        ),
        (
            r"import argparse; argparse.ArgumentParser(usage='x').parse_args(['\x1b[2J\nerror: forged'])",
            "usage: x\n-c: error: unrecognized arguments: \\x1b[2J\\nerror: forged",
        ),
    ],
)
def test_names_cannot_clear_the_screen_or_forge_a_line(body, line):
    status, out, err = ended(started(body))
    assert (status, out, err) == (2 if "usage" in line else 1, "", line + "\n")


def test_a_fault_of_the_program_is_told_in_full():
    for body in (
        "raise ValueError('broken')",
        "raise ConnectionResetError(104, 'reset')",
        "raise BrokenPipeError(32, 'of a socket')",
    ):
        status, _, err = ended(started(body))
        assert status == 1 and "Traceback" in err and body[6:12] in err


@pytest.mark.parametrize(
    "body",
    [
        "print('a' * 100_000)",
        "print('a')",
        "print('a', flush=True)",
        "raise SystemExit(print('help'))",
    ],
)
def test_nobody_reads_the_output(body):
    reader, writer = os.pipe()
    os.close(reader)
    process = started(body, stdout=writer)
    os.close(writer)
    assert ended(process)[::2] == (141, "")


def test_the_disk_is_full():
    with open("/dev/full", "w") as full:
        status, _, err = ended(started("print('a')", stdout=full))
    assert (status, err) == (
        1,
        "error: standard output: No space left on device. What was printed is not complete.\n",
    )


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii", r"\xe9\u20ac\udcff"), ("latin-1", "é\\u20ac\\udcff"), ("utf-8", "é€\\udcff")],
)
def test_any_text_can_be_printed_in_any_encoding(encoding, text):
    body = "print('\\u00e9\\u20ac\\udcff'); print('\\u00e9', file=sys.stderr)"
    source = BEGIN + body
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.decode(encoding)) == (
        0,
        text + "\n",
    ) and b"Traceback" not in done.stderr


def test_closed_streams_are_not_taken_by_files(tmp_path):
    body = f"open({str(tmp_path / 'a')!r}, 'w').write('mine'); print('not into it'); os.system('echo nor this'); sys.stdin.read()"
    source = f"{BEGIN}\ndef main():\n    {body}\nrun_main(main)"
    line = f'{sys.executable} -c "$0" <&- >&- 2>&-'
    assert (
        subprocess.run(["bash", "-c", line, source], env=environment(), timeout=60).returncode == 0
    )
    assert (tmp_path / "a").read_text() == "mine"


def test_words_that_are_no_text_are_refused_unless_they_name_a_file(tmp_path):
    odd = os.fsdecode(b"\xff")
    assert ended(started("print('read')", odd)) == (
        1,
        "",
        "error: '\\udcff' on the command line is not UTF-8, and no file has this name. "
        "Write it in UTF-8.\n",
    )
    path = tmp_path / odd
    path.write_text("a")
    assert ended(started("print(open(sys.argv[1]).read())", str(path))) == (0, "a\n", "")


@pytest.mark.parametrize(
    ("body", "begin", "line"),
    [
        ("print('here', flush=True); time.sleep(60)", "", "stopped. Nothing was written."),
        ("pass", "print('here', flush=True); time.sleep(60)\n", "stopped."),
    ],
    ids=["at work", "during imports"],
)
def test_ctrl_c_is_one_line(body, begin, line):
    source = f"{BEGIN}{begin}def main():\n    {body}\nrun_main(main, 'Nothing was written.')"
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", f"\n{line}\n")


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ([], 0, "usage: megatron-sorted COMMAND ...", ""),
        (["--help"], 0, "usage: megatron-sorted COMMAND ...", ""),
        (
            ["generat"],
            2,
            "",
            "error: 'generat': there is no such command. Did you mean generate?\n",
        ),
        (
            ["qqq"],
            2,
            "",
            f"error: 'qqq': there is no such command. Choose one of {', '.join(COMMANDS)}.\n",
        ),
    ],
)
def test_commands_are_listed_and_a_wrong_one_names_the_nearest(words, status, out, err):
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sorted", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, printed, told = ended(process)
    assert (code, told) == (status, err) and printed.startswith(out) and bool(printed) == bool(out)
