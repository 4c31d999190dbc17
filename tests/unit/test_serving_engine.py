"""``serve --engine vllm`` without vLLM: the command that it makes, and what it starts.

An installation of vLLM is stood in for by its record of a distribution, which is all that is read
of it, and by a program in its place that prints what it was started with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sorted.commands.serve import main as serve
from megatron_sorted.decoding.tuning.tuned_options import write_draft_schedule
from tests.support.commands import ROOT, environment
from tests.support.vllm_records import TUNED, installation, nested_directory, options_in, printed


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a directory of a nested model."""
    return nested_directory(tmp_path / "model")


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """Return a folder that holds the record of an installed vLLM."""
    return installation(tmp_path / "site", monkeypatch)


PRINTS = """\
import json, os, sys
print(json.dumps({"words": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"),
                  "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER")}))
"""


def test_the_command_is_exact(model, vllm, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line, notes = printed(
        capsys, model, "--strategy", "self_speculative", "--exit-layer", 2, "--cache-memory", 2
    )
    options = {
        "strategy": "self_speculative",
        "depths": [2],
        "thresholds": [],
        "measure": "probability",
        "num_draft_tokens": 4,
        "draft_schedule": [],
    }
    speculation = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 4}
    safe = " -P" if sys.version_info >= (3, 11) else ""
    assert line.rstrip() == (
        f"VLLM_USE_V2_MODEL_RUNNER=0 {sys.executable}{safe} -m vllm.entrypoints.openai.api_server "
        f"--model {model} --host 127.0.0.1 --port 8000 --served-model-name model "
        "--kv-cache-memory-bytes 2000000000 "
        "--worker-cls megatron_sorted.serving.vllm.worker.NestedWorker "
        f"--additional-config '{json.dumps({'megatron_sorted': options})}' "
        f"--speculative-config '{json.dumps(speculation)}'"
    )
    assert notes == ""


def test_settings_come_from_decoding_json(model, vllm, capsys):
    (model / "decoding.json").write_text(json.dumps(TUNED))
    given = json.loads(options_in(printed(capsys, model)[0])["--additional-config"])
    assert given["megatron_sorted"]["depths"] == [2]
    assert given["megatron_sorted"]["num_draft_tokens"] == 3
    line, _ = printed(capsys, model, "--strategy", "sorted_speculative")
    given = json.loads(options_in(line)["--additional-config"])["megatron_sorted"]
    assert (given["depths"], given["thresholds"]) == ([1, 2], [0.7, 0.4])
    assert (given["num_draft_tokens"], given["measure"]) == (6, "margin")
    assert "--no-async-scheduling" in line
    # the command line wins; other exits take the default threshold
    line, _ = printed(
        capsys,
        model,
        "--strategy",
        "sorted_speculative",
        "--exit-layers",
        1,
        "--measure",
        "entropy",
    )
    given = json.loads(options_in(line)["--additional-config"])["megatron_sorted"]
    assert (given["depths"], given["thresholds"], given["measure"]) == ([1], [0.5], "entropy")


def test_the_schedule_is_used_unless_a_length_is_given(model, vllm, capsys):
    path = model / "decoding.json"
    path.write_text(json.dumps(TUNED))
    rows = [[1, 4, 5], [5, 8, 0]]
    write_draft_schedule(path, "vllm", 2, {"schedule": rows})
    speculation = json.loads(options_in(printed(capsys, model)[0])["--speculative-config"])
    assert speculation["num_speculative_tokens"] == 5
    assert speculation["num_speculative_tokens_per_batch_size"] == rows
    line, _ = printed(capsys, model, "--num-draft-tokens", 2)
    speculation = json.loads(options_in(line)["--speculative-config"])
    assert speculation["num_speculative_tokens"] == 2
    assert "num_speculative_tokens_per_batch_size" not in speculation
    # another exit has no schedule
    line, _ = printed(capsys, model, "--exit-layer", 1)
    assert "per_batch_size" not in line and '"num_speculative_tokens": 3' in line
    write_draft_schedule(path, "vllm", 2, {"schedule": [[1, 8, 0]]})
    line, notes = printed(capsys, model)
    assert "--speculative-config" not in line and "drafts never pay in vLLM" in notes


def test_what_was_measured_in_vllm_wins_over_our_own_decoder(model, vllm, capsys):
    path = model / "decoding.json"
    path.write_text(json.dumps({**TUNED, "best": "full"}))
    assert "--speculative-config" not in printed(capsys, model)[0]
    measured = {"schedule": [[1, 4, 2]]}
    write_draft_schedule(path, "vllm", 1, {**measured, "date": "2026-12-01T04:00:00+00:00"})
    write_draft_schedule(path, "vllm", 2, {**measured, "date": "2026-12-01T03:00:00+00:00"})
    for given in ([], ["--strategy", "self_speculative"]):
        line, _ = printed(capsys, model, *given)
        options = json.loads(options_in(line)["--additional-config"])["megatron_sorted"]
        assert options["depths"] == [1] and options["draft_schedule"] == [[1, 4, 2]]
    assert "--speculative-config" not in printed(capsys, model, "--strategy", "full")[0]


def test_a_depth_and_the_full_model(model, vllm, capsys):
    line, _ = printed(capsys, model, "--strategy", "fixed", "--exit-layer", 2)
    overrides = json.loads(options_in(line)["--hf-overrides"])
    assert overrides["num_hidden_layers"] == 2 and "--speculative-config" not in line
    line, _ = printed(capsys, model, "--strategy", "full")
    assert "--worker-cls" not in line and "VLLM_USE_V2" not in line
    # without decoding.json, as for our own server
    assert printed(capsys, model)[0] == line


def test_options_of_our_server_that_vllm_has(model, vllm, capsys):
    given = ["--host", "0.0.0.0", "--port", "1", "--served-name", "m", "--max-num-seqs", "32"]
    given += ["--dtype", "bfloat16", "--shutdown-timeout", "3", "--prefix-caching", "off"]
    given += ["--generation-config", "none", "--tokenizer", "t", "--threads", "2"]
    line, _ = printed(capsys, model, *given)
    options = options_in(line)
    assert options["--host"] == "0.0.0.0" and options["--port"] == "1"
    assert options["--served-model-name"] == "m" and options["--max-num-seqs"] == "32"
    assert options["--dtype"] == "bfloat16" and options["--shutdown-timeout"] == "3"
    assert options["--generation-config"] == "vllm" and options["--tokenizer"] == "t"
    assert "--no-enable-prefix-caching" in line
    assert "OMP_NUM_THREADS=2 VLLM_CPU_OMP_THREADS_BIND=nobind" in line


def test_vllms_own_options_come_last_and_win(model, vllm, capsys):
    serve([str(model), "--engine", "vllm", "--print", "--", "-tp", "2", "--port=9"])
    line = capsys.readouterr().out.rstrip()
    assert line.endswith("-tp 2 --port=9") and line.count("--port") == 1


def test_the_installed_vllm_is_started_and_its_key_is_not_printed(model, vllm):
    """In a process of its own, with a program in the place of vLLM's that prints its arguments."""
    program = vllm / "vllm" / "entrypoints" / "openai"
    program.mkdir(parents=True)
    (program / "api_server.py").write_text(PRINTS)
    code = (
        "import sys; from megatron_sorted.__main__ import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    given = ["--strategy", "self_speculative", "--exit-layer", "2", "--cache-memory", "1"]
    variables = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{vllm}")
    variables["MEGATRON_SORTED_API_KEY"] = "secret-key-0123456789"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "serve",
            str(model),
            "--engine",
            "vllm",
            *given,
            "--",
            "-tp",
            "8",
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    line, started = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert 'VLLM_API_KEY="$MEGATRON_SORTED_API_KEY"' in line and "secret" not in line
    started = json.loads(started)
    assert started["key"] == "secret-key-0123456789" and started["runner"] == "0"
    assert started["words"][:2] == ["--model", str(model)] and started["words"][-2:] == ["-tp", "8"]
    # nothing slow is imported up to there, and nothing of which vLLM has another version
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(model), "--engine", "vllm", *given, "--print"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[1] == "", done.stdout
