"""The options of a server: limits in their ranges, a warning, and the examples that start one."""

import configparser
import os
import shlex
import shutil
import socket
import subprocess
import threading
from dataclasses import replace

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from megatron_sorted.commands import serve as command
from megatron_sorted.commands.options.batching import limits_line
from megatron_sorted.commands.serve import read_arguments
from megatron_sorted.decoding.batching.options import BatchingOptions
from megatron_sorted.errors import SettingsError
from megatron_sorted.serving import listening, worker
from megatron_sorted.serving.keys import KEY_VARIABLE
from megatron_sorted.serving.listening import open_warning
from tests.rules.sources import ROOT

UNIT = ROOT / "examples" / "serving" / "megatron-sorted.service"
JOB = ROOT / "slurm" / "serve.sbatch"
USUAL = BatchingOptions(drafts_by_load=True)
KEY = "secret-key-0123456789"


def test_options_are_the_limits_of_batching():
    assert read_arguments(["model"]).batching == USUAL
    limits = {"--max-num-seqs": "8", "--cache-memory": "1.5", "--max-wait": "2.5"}
    given = [word for pair in limits.items() for word in pair]
    given = read_arguments(["model", *given, "--prefill-tokens", "64", "--share-prefixes"])
    assert given.batching == BatchingOptions(8, 1_500_000_000, 2.5, 64, True, True, True)
    assert read_arguments(["model", "--prefix-caching", "off"]).batching == replace(
        USUAL, prefix_caching=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-num-seqs 0", "--max-num-seqs: 0 is not in 1..4096. Change it."),
        ("--max-num-seqs 4097", "--max-num-seqs: 4097 is not in 1..4096. Change it."),
        ("--cache-memory 0", "--cache-memory: 0.0 is not in 0.001..1e+06 GB. Change it."),
        ("--cache-memory nan", "--cache-memory: nan is not in"),
        ("--cache-memory inf", "--cache-memory: inf is not in"),
        ("--max-wait 0", "--max-wait: 0.0 is not in 0.001..86400 seconds. Change it."),
        ("--max-wait -1", "--max-wait: -1.0 is not in"),
        ("--max-wait nan", "--max-wait: nan is not in"),
        ("--prefill-tokens 0", "--prefill-tokens: 0 is not in 1.."),
        ("--prefix-caching off --share-prefixes", "--share-prefixes: it has no effect with"),
    ],
)
def test_limits_out_of_range_are_refused(arguments, message):
    with pytest.raises(SettingsError) as refused:
        read_arguments(["model", *arguments.split()])
    assert str(refused.value).startswith(message)


def test_the_line_of_limits():
    line = limits_line(BatchingOptions(8, 2_500_000_000, 30, 64, True, True))
    for part in ("8 texts", "2.5 GB", "30 s", "64 tokens", "all keys"):
        assert part in line
    assert "no text is kept" in limits_line(BatchingOptions(prefix_caching=False))


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("::1", False), ("0.0.0.0", True), ("::", True)],
)
def test_other_machines_without_a_key_are_warned_of(host, warns):
    try:
        bound = listening.bind(host, 0)
    except SettingsError:
        pytest.skip("IPv6 missing")
    with bound:
        warning = open_warning(bound)
    assert (warning is not None) is warns
    assert not warns or ("--api-key-file" in warning and host in warning)


class Served(Exception):
    """Raised in place of serving."""


@pytest.fixture
def start(monkeypatch, capsys):
    """Return a function that starts a server of a stand-in for a model, and what it printed."""
    seen = {}

    def serve(app, served_by, bound, seconds, announce):
        seen.update(app=app, worker=served_by)
        announce()
        bound.close()
        raise Served

    class Worker:
        def __init__(self, generator, adaptation=None, options=None):
            self.generator, self.adaptation, self.options = generator, adaptation, options
            self.is_ready = threading.Event()
            self.is_ready.set()

    from megatron_sorted.decoding.text_generator import TextGenerator
    from megatron_sorted.serving import api, request_log
    from tests.support.decoding import plain_network
    from tests.unit.test_decoding_server import NamedLetters

    def open_generator(values):
        values.device, values.dtype = "cpu", "float32"
        return TextGenerator(plain_network()[1], NamedLetters())

    monkeypatch.setattr(command, "open_generator", open_generator)
    monkeypatch.setattr(listening, "serve", serve)
    monkeypatch.setattr(worker, "GenerationWorker", Worker)
    monkeypatch.setattr(request_log, "write_request_log", lambda: seen.update(log=True))
    monkeypatch.setattr(
        api, "make_app", lambda *given: seen.update(keys=given[-1], name=given[1]) or given
    )

    plain_network()  # a first start says that it compiles the library
    capsys.readouterr()

    def run(*arguments: str):
        with pytest.raises(Served):
            command.main(["model", "--port", "0", *arguments])
        return seen, capsys.readouterr()

    return run


def test_a_server_starts_with_its_limits_keys_and_log(start, tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"alice {KEY}\n")
    path.chmod(0o600)
    seen, printed = start("--api-key-file", str(path), "--max-num-seqs", "3", "--host", "0.0.0.0")
    assert seen["worker"].options == replace(USUAL, max_num_seqs=3) and seen["log"]
    assert seen["keys"].owner(f"Bearer {KEY}") == "alice"
    assert "[at most 3 texts at once" in printed.out and "API keys: 1]" in printed.out
    assert "http://0.0.0.0:" in printed.out.splitlines()[-1]
    assert printed.err == "" and KEY not in printed.out


def test_a_server_without_keys_says_so(start, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    seen, printed = start("--host", "0.0.0.0", "--no-request-log")
    assert "log" not in seen and len(seen["keys"]) == 0
    assert printed.err.startswith("warning: ") and "API keys: none]" in printed.out
    _, printed = start()
    assert printed.err == "", "this machine alone can connect"


def test_a_wrong_key_file_ends_the_start_before_the_model_is_read(start, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "open_generator", lambda _: pytest.fail("it was read"))
    with pytest.raises(SettingsError, match="--api-key-file"):
        command.main(["model", "--api-key-file", str(tmp_path / "none")])


def unit_of(path) -> configparser.RawConfigParser:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(path)
    return unit


def test_the_systemd_unit_starts_a_server_and_waits_for_its_end(tmp_path):
    service = unit_of(UNIT)["Service"]
    program, name, *arguments = shlex.split(service["ExecStart"].replace("${MODEL}", "model"))
    assert program.endswith("/megatron-sorted") and name == "serve"
    values = read_arguments(arguments)
    assert values.host == "127.0.0.1"
    assert int(service["TimeoutStopSec"]) >= values.shutdown_timeout + 10
    assert service["KillSignal"] == "SIGTERM" and service["NoNewPrivileges"] == "yes"
    assert service["User"] and service["EnvironmentFile"]
    assert KEY_VARIABLE in UNIT.read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze missing")
def test_systemd_understands_the_unit(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/megatron-sorted/bin/megatron-sorted", "/bin/sh"))
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.fixture
def run_job(tmp_path):
    """Return a function that runs the SLURM job with a stand-in for ``megatron-sorted``."""
    program = tmp_path / "bin" / "megatron-sorted"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "pid $$"\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess:
        environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", **more}
        return subprocess.run(
            ["bash", JOB, *arguments], text=True, capture_output=True, env=environment, check=False
        )

    run.program = program
    return run


def test_the_slurm_job_becomes_a_server_that_drains_before_its_limit(run_job):
    done = run_job(
        "my model",
        "--max-num-seqs",
        "4",
        SLURM_CPUS_PER_TASK="6",
        PORT="8123",
        **{KEY_VARIABLE: KEY},
    )
    assert done.returncode == 0 and done.stderr == "" and KEY not in done.stdout
    announced, _, *given = done.stdout.splitlines()
    assert announced == f"[clients of this job: http://{socket.gethostname()}:8123/v1]"
    assert given.pop(0) == "serve"
    values = read_arguments(given)
    assert (values.model.name, values.threads, values.port) == ("my model", 6, 8123)
    assert values.batching.max_num_seqs == 4
    [warning] = [line for line in JOB.read_text().splitlines() if "--signal=" in line]
    seconds = int(warning.rpartition("@")[2])
    assert "B:TERM@" in warning and values.shutdown_timeout + 10 <= seconds


def test_the_slurm_jobs_process_is_the_server_itself(tmp_path):
    program = tmp_path / "megatron-sorted"
    program.write_text('#!/bin/sh\necho "pid $$"\n')
    program.chmod(0o755)
    process = subprocess.Popen(
        ["bash", JOB, "model", "--api-key-file=keys"],
        text=True,
        stdout=subprocess.PIPE,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    output, _ = process.communicate()
    assert f"pid {process.pid}" in output, "SLURM's signal must reach the server"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no MODEL comes first"),
        (["--port", "1"], {}, "no MODEL comes first"),
        (["model"], {}, "every user of the cluster could use this server"),
        (["model"], {KEY_VARIABLE: ""}, "every user of the cluster could use this server"),
        (["model", "--api-key-files", "a"], {}, "every user of the cluster could use this server"),
    ],
)
def test_the_slurm_job_refuses_what_is_incomplete(run_job, arguments, environment, message):
    done = run_job(*arguments, **environment)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_the_slurm_job_needs_the_command_and_explains_itself(run_job):
    run_job.program.unlink()
    done = run_job("model", **{KEY_VARIABLE: KEY})
    assert done.returncode == 2 and "Activate its environment" in done.stderr
    done = run_job("--help")
    assert done.returncode == 0 and "slurm/serve.sbatch MODEL" in done.stdout
    assert len(done.stdout.splitlines()) == 3
