"""Commands from preloaded servers behave as real processes, and no child harms its server."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support import commands, ranks
from tests.support.commands import ROOT, environment, run, start_command
from tests.support.own_warnings import warn_as
from tests.support.preloaded import session
from tests.support.preloaded.session import MAX_PARENT_BYTES, stand_in

FORK = {"SORTED_FORK_CODE": 1}
"""Makes the stand-in have `-c CODE` forked too."""


@pytest.fixture
def script(tmp_path):
    """Return what runs lines of Python: in the real interpreter, or as a fork of a server."""

    def run_lines(
        text: str, cold: bool, *arguments: str, **variables: object
    ) -> subprocess.CompletedProcess:
        command = [sys.executable if cold else stand_in(), "-c", text, *arguments]
        return run(command, cwd=tmp_path, env=environment(**variables, **({} if cold else FORK)))

    return run_lines


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize(
    ("text", "status", "out", "err"),
    [
        ("print(1)", 0, "1\n", ""),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("import sys; sys.exit('no such thing')", 1, "", "no such thing\n"),
        ("raise ValueError('wrong')", 1, "", "ValueError: wrong"),
        ("import os; os._exit(9)", 9, "", ""),
        ("raise SystemExit", 0, "", ""),
        ("import atexit; atexit.register(print, 'end')", 0, "end\n", ""),
        (
            "import threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
            0,
            "late\n",
            "",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, "", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "", ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "", "KeyboardInterrupt"),
        (
            "import os; print(os.environ['SENT'], os.getcwd() == os.environ['PLACE'])",
            0,
            "heard True\n",
            "",
        ),
        ("import sys; print(sys.stdin.read(), sys.argv[1:])", 0, " ['a', 'b c']\n", ""),
        ("print('\\u00e9')", 0, "\u00e9\n", ""),
        (
            "import multiprocessing as m; m.set_start_method('spawn')\n"
            "print(m.Pool(1).apply(abs, (-3,)))",
            0,
            "3\n",
            "",
        ),
        (
            "import concurrent.futures as f\n"
            "with f.ProcessPoolExecutor(1) as pool: print(pool.submit(abs, -4).result())",
            0,
            "4\n",
            "",
        ),
    ],
)
def test_a_fork_is_as_a_process(script, tmp_path, cold, text, status, out, err):
    done = script(text, cold, "a", "b c", SENT="heard", PLACE=tmp_path)
    assert (done.returncode, done.stdout) == (status, out), done.stderr
    assert err in done.stderr and bool(done.stderr) == bool(err), done.stderr


@pytest.mark.parametrize("cold", [True, False])
def test_encodings_are_those_of_the_environment(script, cold):
    done = script("print('\\u732b')", cold, PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "UnicodeEncodeError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_a_fork(tmp_path, number):
    text = (
        "import os, signal, time\n"
        f"signal.signal({int(number)}, lambda *_: (os.write(1, b'got\\n'), exit(5)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [stand_in(), "-c", text],
        cwd=tmp_path,
        env=environment(**FORK),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "got\n" and process.wait(20) == 5


def test_a_fork_ends_with_who_started_it(tmp_path):
    text = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen(
        [stand_in(), "-c", text],
        cwd=tmp_path,
        env=environment(**FORK),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        fork = psutil.Process(int(process.stdout.readline()))
        process.kill()
    assert not psutil.wait_procs([fork], timeout=20)[1]


def test_a_command_that_hangs_or_floods_fails_its_test_with_its_output(script, tmp_path):
    for text, limit in (
        ("print('before', flush=True)\nimport time\ntime.sleep(60)", "its time"),
        ("print('before', flush=True)\nwhile True: print('x' * 100000)", "64 MB"),
    ):
        began = time.monotonic()
        with pytest.raises(AssertionError, match=f"exceeded {limit}; its output ends"):
            run(
                [stand_in(), "-c", text],
                cwd=tmp_path,
                env=environment(**FORK),
                seconds=2 if limit == "its time" else 60,
            )
        assert time.monotonic() - began < 50
    assert script("print('the server lives')", False).stdout == "the server lives\n"


def crash(how: str) -> None:
    """Raise in rank 1, or kill it by a signal."""
    print("last words", flush=True)
    if os.environ["RANK"] == "0":
        time.sleep(60)
    if how == "raise":
        raise ValueError("rank 1 is wrong")
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1:.*ValueError: rank 1 is wrong"), ("die", "rank 1 ended without an answer")],
)
def test_a_rank_that_fails_fails_its_test_and_ends_the_others(how, message, capfd):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        ranks.run_ranks(2, crash, how)
    assert time.monotonic() - began < 30 and "last words" in capfd.readouterr().out
    assert ranks.run_ranks(2, abs, -1) == [1, 1]


def test_ranks_that_hang_fail_their_test(monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT_SECONDS", 1)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not answer within 1 s"):
        ranks.run_ranks(2, time.sleep, 30)


def test_torchrun_and_its_ranks_are_forks_with_the_variables_of_torchrun(tmp_path):
    done = commands.run_command(
        "pretrain_sorted.py",
        "--config",
        ROOT / "examples" / "quickstart.yaml",
        "--train-iters",
        1,
        "--no-such-option",
        1,
        cwd=tmp_path,
        processes=2,
    )
    assert done.returncode == 1 and "no-such-option" in done.stderr, done.stderr


def test_what_is_no_script_of_the_project_runs_in_the_real_interpreter(tmp_path):
    (tmp_path / "own.py").write_text("import sys\nprint('torch' in sys.modules, sys.executable)\n")
    done = run([stand_in(), "own.py"], cwd=tmp_path, env=environment())
    assert done.stdout == f"False {sys.executable}\n", done.stderr


def test_standard_input_reaches_a_fork(tmp_path):
    with start_command(
        "tools/prepare_data.py",
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert (
            "required: --input" in process.communicate("", timeout=60)[1]
            and process.returncode == 2
        )


@pytest.mark.parametrize("module", ["megatron_sorted.training.run.loop", "lab.demo"])
def test_a_warning_of_our_own_is_an_error_in_commands_and_ranks(script, module):
    lines = f"import warnings\nwarnings.warn_explicit('mend', FutureWarning, 'f', 1, {module!r})"
    done = script(lines, False)
    assert done.returncode == 1 and "FutureWarning: mend" in done.stderr
    with pytest.raises(AssertionError, match="DeprecationWarning: to be mended"):
        ranks.run_ranks(1, warn_as, module, DeprecationWarning)
    ranks.run_ranks(1, warn_as, "torch.nn", DeprecationWarning)


def test_the_address_of_a_server_is_short_enough_in_any_temporary_folder(tmp_path, monkeypatch):
    for parent, is_taken in ((tmp_path / "a", True), (tmp_path / ("b" * 60), False)):
        parent.mkdir()
        monkeypatch.setattr(session.tempfile, "tempdir", str(parent))
        monkeypatch.setattr(session, "MAX_PARENT_BYTES", len(str(tmp_path)) + 40)
        chosen = session._parent_for_sockets()
        assert (chosen == str(parent)) == is_taken
    longest = "x" * (MAX_PARENT_BYTES - 1)
    assert len(f"{longest}/preloaded_abcdefgh/transformers.socket.new") <= 107


def test_a_server_that_ended_is_reported_with_its_output(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "megatron.pid").write_text(str(ended.pid))
    (tmp_path / "megatron.log").write_text("OSError: AF_UNIX path too long")
    sys.path.insert(0, str(session.HERE))
    try:
        import stand_in as client
    finally:
        sys.path.remove(str(session.HERE))
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"has ended.*AF_UNIX path too long"):
        client.connect("megatron", sys.executable, tmp_path)
    assert time.monotonic() - start < 5
