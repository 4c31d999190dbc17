"""How commands begin and end: closed and broken streams, any encoding, Ctrl-C, mistakes in one line; faults of ours in full."""

import ast
import os
import signal
import subprocess
import sys

import pytest

from megatron_sorted import __version__
from tests.support.commands import ROOT, environment

PROGRAMS = sorted([*ROOT.glob("tools/*.py"), ROOT / "pretrain_sorted.py"])
BEGIN = "from megatron_sorted.command import run_main, start_command; start_command(); import sys, time, os\n"


def started(body: str, *words: str, stdout=subprocess.PIPE, **variables) -> subprocess.Popen:
    """Returns a process that runs ``body`` as a command's main."""
    source = BEGIN + "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "run_main(main, 'Nothing was written.')"
    return subprocess.Popen([sys.executable, "-c", source, *words], env=environment(**variables), stdin=subprocess.DEVNULL, stdout=stdout,
                            stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_command_begins_before_its_slow_imports_and_ends_the_same_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert [ast.unparse(node) for node in guards[0].body] == ["start_command()"]
    assert ast.unparse(guards[-1].body[-1]).startswith("run_main(main")
    before = {name.name.partition(".")[0] if isinstance(node, ast.Import) else node.module.partition(".")[0]
              for node in tree.body[: tree.body.index(guards[0])] if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}
    assert before <= set(sys.stdlib_module_names) | {"megatron_sorted"}


def test_a_command_that_goes_well():
    assert ended(started("print('done')")) == (0, "done\n", "")
    assert ended(started("print('judged'); return 3")) == (3, "judged\n", "")
    assert ended(started("raise SystemExit('error: this')")) == (1, "", "error: this\n")


def test_the_version_has_one_place():
    assert ended(started("print('not reached')", "--version")) == (0, f"megatron_sorted {__version__}\n", "")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "__init__.py" in setup and __version__ not in setup


@pytest.mark.parametrize(("body", "line"), [
    ("from megatron_sorted.errors import DataError; raise DataError('x: 3. Change it.')", "error: x: 3. Change it."),
    ("open('/nowhere/a')", "error: /nowhere/a: No such file or directory. Check the path, its permissions and the free space."),
    ("open('/')", "error: /: Is a directory. Check the path, its permissions and the free space."),
    ("raise OSError(28, 'No space left on device')", "error: No space left on device. Check the path, its permissions and the free space."),
    ("raise MemoryError", "error: out of memory. Ask for less at once, or use a machine with more."),
    ("open('a' * 300)", f"error: {'a' * 300}: File name too long. Check the path, its permissions and the free space."),
    ("open('/dev/null', 'w').write('\\udcff')", r"error: '\udcff' is not text: it holds bytes that are not UTF-8. Correct it.")])
def test_a_mistake_is_one_line(body, line):
    assert ended(started(body)) == (1, "", line + "\n")


@pytest.mark.parametrize(("body", "line"), [
    (r"from megatron_sorted.errors import DataError; raise DataError('a\x1b[2J\nerror: \u202eforged')",
     r"error: a\x1b[2J\nerror: \u202eforged"),
    (r"open('/nowhere\n/\x1b[2J')",
     r"error: /nowhere\n/\x1b[2J: No such file or directory. Check the path, its permissions and the free space."),
    (r"raise SystemExit('error: one\x1b[2J\nand a line of ours')", "error: one\\x1b[2J\nand a line of ours"),
    (r"import argparse; argparse.ArgumentParser(usage='x').parse_args(['\x1b[2J\nerror: forged'])",
     "usage: x\n-c: error: unrecognized arguments: \\x1b[2J\\nerror: forged")])
def test_names_cannot_clear_the_screen_or_forge_a_line(body, line):
    status, out, err = ended(started(body))
    assert (status, out, err) == (2 if "usage" in line else 1, "", line + "\n")


def test_a_fault_of_the_program_is_told_in_full():
    for body in ("raise ValueError('broken')", "raise ConnectionResetError(104, 'reset')", "raise BrokenPipeError(32, 'of a socket')"):
        status, _, err = ended(started(body))
        assert status == 1 and "Traceback" in err and body[6:12] in err


@pytest.mark.parametrize("body", ["print('a' * 100_000)", "print('a')", "print('a', flush=True)", "raise SystemExit(print('help'))"])
def test_nobody_reads_the_output(body):
    reader, writer = os.pipe()
    os.close(reader)
    process = started(body, stdout=writer)
    os.close(writer)
    assert ended(process)[::2] == (141, "")


def test_the_disk_is_full():
    with open("/dev/full", "w") as full:
        status, _, err = ended(started("print('a')", stdout=full))
    assert (status, err) == (1, "error: standard output: No space left on device. What was printed is not complete.\n")


@pytest.mark.parametrize(("encoding", "text"), [("ascii", r"\xe9\u20ac\udcff"), ("latin-1", "é\\u20ac\\udcff"), ("utf-8", "é€\\udcff")])
def test_any_text_can_be_printed_in_any_encoding(encoding, text):
    body = "print('\\u00e9\\u20ac\\udcff'); print('\\u00e9', file=sys.stderr)"
    source = BEGIN + body
    done = subprocess.run([sys.executable, "-c", source], env=environment(PYTHONIOENCODING=encoding), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.decode(encoding)) == (0, text + "\n") and b"Traceback" not in done.stderr


def test_closed_streams_are_not_taken_by_files(tmp_path):
    body = f"open({str(tmp_path / 'a')!r}, 'w').write('mine'); print('not into it'); os.system('echo nor this'); sys.stdin.read()"
    source = f"{BEGIN}\ndef main():\n    {body}\nrun_main(main)"
    line = f"{sys.executable} -c \"$0\" <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line, source], env=environment(), timeout=60).returncode == 0
    assert (tmp_path / "a").read_text() == "mine"


def test_words_that_are_no_text_are_refused_unless_they_name_a_file(tmp_path):
    odd = os.fsdecode(b"\xff")
    assert ended(started("print('read')", odd)) == (1, "", "error: '\\udcff' on the command line is not UTF-8, and no file has this name. "
                                                           "Write it in UTF-8.\n")
    path = tmp_path / odd
    path.write_text("a")
    assert ended(started("print(open(sys.argv[1]).read())", str(path))) == (0, "a\n", "")


@pytest.mark.parametrize(("body", "begin", "line"), [
    ("print('here', flush=True); time.sleep(60)", "", "stopped. Nothing was written."),
    ("pass", "print('here', flush=True); time.sleep(60)\n", "stopped.")], ids=["at work", "during imports"])
def test_ctrl_c_is_one_line(body, begin, line):
    source = f"{BEGIN}{begin}def main():\n    {body}\nrun_main(main, 'Nothing was written.')"
    process = subprocess.Popen([sys.executable, "-c", source], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", f"\n{line}\n")
