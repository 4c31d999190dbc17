"""The start and end of commands: streams, encodings, Ctrl-C, one line for a mistake."""

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

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
MAX_LINES, MAX_COLUMNS = 50, 104
WATCHED = """\
import atexit, os, sys
heavy = {"torch", "transformers", "megatron", "numpy", "fastapi", "matplotlib"}
def report():
    print(*["imported", *sorted(heavy & set(sys.modules))], file=sys.stderr, flush=True)
atexit.register(report)
end = os._exit  # the end of training
os._exit = lambda status: (report(), end(status))
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
"""Command -> arguments with a misspelled option, and the option that is meant."""
BEGIN = (
    "from megatron_sorted.command_line import run_main, start_command; start_command(); "
    "import sys, time, os\n"
)


def started(body: str, *arguments: str, stdout=subprocess.PIPE, **variables) -> subprocess.Popen:
    """Return a process that runs ``body`` as a command's main."""
    source = (
        BEGIN
        + "def main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "run_main(main, 'Nothing was written.')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
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
def test_every_command_of_the_lab_starts_before_its_slow_imports_and_ends_like_others(path):
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


@pytest.mark.parametrize("options", [[], ["-P"], ["-I"], ["-u", "-X", "dev"], ["-Wignore", "-EsB"]])
def test_entry_points_import_nothing_of_the_current_folder(options, tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    for name in ("entry", "json", "megatron_sorted", "runpy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    command = [sys.executable, *options, ROOT / "tools" / "plan.py", "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage:"), (
        done.stderr
    )


def test_entry_points_keep_the_options_of_python():
    path = str(ROOT / "tools" / "plan.py")
    source = (
        "import os, runpy, sys; os.execve = lambda _, arguments, __: print(arguments[1:3]); "
        f"sys.argv = [{path!r}]; sys.orig_argv = ['python', '-u', '-Iq', '-Wignore', {path!r}]; "
        f"runpy.run_path({path!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "['-u', '-Wignore']\n", done.stderr


def test_every_command_has_its_file_and_every_file_its_command():
    files = {path.stem for path in (ROOT / "megatron_sorted" / "commands").glob("[a-z]*.py")}
    assert files == {*COMMANDS, "parser"}


def run_watched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command; its last line of error output names the slow packages that it imported."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
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
        assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_COLUMNS, [
            line for line in lines if len(line) > MAX_COLUMNS
        ]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_names_the_nearest_and_is_quick(name):
    wrong, meant = NEAREST[name]
    done = run_watched(name, *wrong)
    *lines, imported = done.stderr.splitlines()
    assert done.returncode == (1 if name in ("train", "plan") else 2) and imported == "imported", (
        done.stderr
    )
    assert (
        len(lines) == 1
        and lines[0].startswith("error: ")
        and lines[0].endswith(f" Did you mean {meant}?")
    ), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "exprot", "a", "b"), "invalid choice: 'exprot'. Did you mean export?"),
        (
            ("evaluate", "model", "--tasks", "no_such_task"),
            "--tasks: lm-evaluation-harness knows no 'no_such_task'",
        ),
        (("evaluate", "model"), "nothing to measure"),
        (("generate", "absent", "--prompt", "a"), "absent: no such directory. Give"),
        (("convert", "export", "absent", "b"), "absent: no such directory. Give"),
        (("convert", "verify", "/", "absent"), "absent: no such directory. Give"),
        (("extract", "absent", "b", "--all"), "absent: no such directory. Give"),
        (("tune", "absent", "--prompt-file", "a"), "absent: no such directory. Give"),
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
            "--num-tokens: needs a tokenizer to count tokens.",
        ),
        (("report", "a", "b", "c", "d", "e", "f", "g"), "more than one picture can distinguish"),
        (("launch", "slum", "gpu"), "Did you mean slurm?"),
        (("plan",), "no run. Give its YAML file"),
        (("train", "--config", "missing.yaml"), "missing.yaml: cannot be read"),
    ],
)
def test_early_refusals(arguments, message):
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    done = run_watched(*arguments)
    *lines, imported = done.stderr.splitlines()
    assert (
        done.returncode in (1, 2)
        and imported == "imported"
        and len(lines) == 1
        and message in lines[0]
    ), done.stderr


REQUIRED = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
    "yaml",
    "tqdm",
    "jinja2",
    "markupsafe",
)
"""What an installation without extras has, with what these need."""


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    """Return a function that runs a command where only the required packages are installed."""
    folder = tmp_path_factory.mktemp("required")
    for name in REQUIRED:
        spec = importlib.util.find_spec(name)
        place = Path(
            spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin
        )
        (folder / place.name).symlink_to(place)

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-m", "megatron_sorted", *arguments]
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{folder}"),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_extra(name, run_alone, tmp_path):
    done = run_alone(name, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "--config", str(ROOT / "examples" / "quickstart.yaml")), None),
        (
            ("prepare", "--input", "a.jsonl", "--output-prefix", "b", "--tokenizer-model", "t"),
            "train",
        ),
        (("plan", str(ROOT / "examples" / "quickstart.yaml"), "--dry-run", "all"), "train"),
        (("convert", "export", "a", "b"), "convert"),
        (("extract", "a", "b", "--all"), "convert"),
        (("generate", "a", "--prompt", "b"), "convert"),
        (("serve", "a"), "serve"),
        (("tune", "a", "--prompt-file", "a.jsonl"), "convert"),
        (("evaluate", "a", "--text", "a.jsonl"), "evaluate"),
        (("benchmark", "a", "--questions", "q.jsonl"), "evaluate"),
        (("report", "run"), "monitoring"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(arguments, extra, run_alone, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "writing", "turns": ["a"]}\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "time": 1.0, "exits": {"2": {"loss": 1.0}}}\n'
    )
    done = run_alone(*arguments, cwd=tmp_path)
    printed = (
        f"pip install 'megatron_sorted[{extra}]'." if extra else "megatron-core: not installed."
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and printed in done.stderr, (
        done.stderr
    )


def test_a_successful_command():
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
            "error: /nowhere/a: No such file or directory. Check the path, its permissions and "
            "the free space.",
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
            f"error: {'a' * 300}: File name too long. "
            "Check the path, its permissions and the free space.",
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
            "from megatron_sorted.errors import DataError; "
            r"raise DataError('a\x1b[2J\nerror: \u202eforged')",
            r"error: a\x1b[2J\nerror: \u202eforged",
        ),
        (
            r"open('/nowhere\n/\x1b[2J')",
            r"error: /nowhere\n/\x1b[2J: No such file or directory. "
            "Check the path, its permissions and the free space.",
        ),
        (
            r"raise SystemExit('error: one\x1b[2J\nand a line of ours')",
            "error: one\\x1b[2J\nand a line of ours",
        ),
        (
            "import argparse; "
            r"argparse.ArgumentParser(usage='x').parse_args(['\x1b[2J\nerror: forged'])",
            "usage: x\n-c: error: unrecognized arguments: \\x1b[2J\\nerror: forged",
        ),
    ],
)
def test_names_cannot_clear_the_screen_or_forge_a_line(body, line):
    status, out, err = ended(started(body))
    assert (status, out, err) == (2 if "usage" in line else 1, "", line + "\n")


def test_a_fault_of_the_program_prints_its_traceback():
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
def test_the_reader_of_the_output_has_ended(body):
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
    body = (
        f"open({str(tmp_path / 'a')!r}, 'w').write('mine'); print('not into it'); "
        "os.system('echo nor this'); sys.stdin.read()"
    )
    source = f"{BEGIN}\ndef main():\n    {body}\nrun_main(main)"
    line = f'{sys.executable} -c "$0" <&- >&- 2>&-'
    assert (
        subprocess.run(["bash", "-c", line, source], env=environment(), timeout=60).returncode == 0
    )
    assert (tmp_path / "a").read_text() == "mine"


def test_arguments_that_are_not_text_are_refused_unless_they_name_a_file(tmp_path):
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
    ("arguments", "status", "out", "err"),
    [
        ([], 0, "usage: megatron-sorted COMMAND ...", ""),
        (["--help"], 0, "usage: megatron-sorted COMMAND ...", ""),
        (
            ["generat"],
            2,
            "",
            "error: 'generat': there is no such command. Did you mean generate?\n",
        ),
        (["help"], 2, "", "error: 'help': there is no such command. Did you mean --help?\n"),
        (
            ["version"],
            2,
            "",
            "error: 'version': there is no such command. Did you mean --version?\n",
        ),
        (
            ["qqq"],
            2,
            "",
            f"error: 'qqq': there is no such command. Choose one of {', '.join(COMMANDS)}.\n",
        ),
    ],
)
def test_commands_are_listed_and_a_wrong_one_names_the_nearest(arguments, status, out, err):
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sorted", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, printed, errors = ended(process)
    assert (
        (code, errors) == (status, err) and printed.startswith(out) and bool(printed) == bool(out)
    )
