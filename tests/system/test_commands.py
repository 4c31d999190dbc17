"""Every command with missing files and output in ASCII; some interrupted or without a reader."""

import os
import signal
import socket
import subprocess

import pytest

from tests.support.commands import ROOT, run_command, start_command

MISSING = "\u00e9.none"
GIVEN = {
    "pretrain_sorted.py": ("--config", MISSING),
    "tools/benchmark_decoding.py": (MISSING, "--questions", MISSING),
    "tools/bench_decoding.py": ("--model", MISSING),
    "tools/convert.py": ("export", MISSING, "out"),
    "tools/doctor.py": (f"{MISSING}.yaml",),
    "tools/evaluate.py": (MISSING, "--text", MISSING),
    "tools/extract_submodel.py": (MISSING, "out", "--depth", 1),
    "tools/generate.py": (MISSING, "--prompt", "a"),
    "tools/launch_facts.py": ("--world-size", 1, "--", "--config", MISSING),
    "tools/plan.py": (MISSING,),
    "tools/plot_exits.py": (MISSING,),
    "tools/prepare_data.py": (
        "--input",
        MISSING,
        "--output-prefix",
        "out",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        9,
    ),
    "tools/prove_decoding.py": (MISSING, "--prompt-file", MISSING),
    "tools/report.py": (MISSING,),
    "tools/serve.py": (MISSING,),
    "tools/split_text.py": ("--input", MISSING, "--output", "out", "--separator", "|"),
    "tools/tune_decoding.py": (MISSING, "--prompt-file", MISSING),
}
"""Commands that read files; the others read none, or make what they need."""


@pytest.mark.parametrize("script", GIVEN)
def test_a_missing_file_is_one_line_in_any_encoding(script, tmp_path):
    done = run_command(script, *GIVEN[script], cwd=tmp_path, PYTHONIOENCODING="ascii")
    *before, line = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and "error: " in line and r"\xe9.none" in line, done.stderr
    assert "Traceback" not in done.stderr and (not before or done.returncode == 2), done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_reader_of_the_output_has_ended(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run = ROOT / "examples" / "quickstart.yaml"
    process = start_command(
        "tools/plan.py", run, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (141, "")


def test_ctrl_c_while_a_command_starts_or_waits_is_one_line(tmp_path):
    arguments = ("model", "--prompt-file", "-")
    process = start_command(
        "tools/generate.py",
        *arguments,
        cwd=tmp_path,
        cold=True,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.strip() == "stopped."


def test_an_unusable_port_is_refused_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for given, message in ((port, "Address already in use"), (99999, "is not in 0..65535")):
            done = run_command("tools/serve.py", "no_model", "--port", given, cwd=tmp_path)
            assert (
                done.returncode == 1
                and message in done.stderr
                and len(done.stderr.splitlines()) == 1
            ), done.stderr


def test_workers_of_data_preparation_print_nothing_when_it_is_stopped(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "1 2 3"}\n' * 400_000)
    arguments = (
        "--input",
        "texts.jsonl",
        "--output-prefix",
        "out",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        9,
        "--workers",
        2,
    )
    process = start_command(
        "tools/prepare_data.py",
        *arguments,
        cwd=tmp_path,
        cold=True,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # a terminal signals the whole group, of which forks are not
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (
        process.returncode == 130
        and errors.strip().splitlines()[-1] == "stopped."
        and "Traceback" not in errors
    ), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"], (
        "nothing is half written"
    )
