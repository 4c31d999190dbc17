"""The first hour after the demo: its last lines as they are printed, on a model trained for a few steps on the demo's own data."""

import json
import os
import shlex

import pytest

from lab.demo import afterwards, demo_steps, request_of, trained_question, use_commands
from tests.support.commands import ROOT, run_command, start_command
from tests.support.ports import free_port, until_it_answers


def words_of(command) -> tuple[str, ...]:
    """Return script and arguments of a command that begins with an interpreter."""
    _, script, *words = command
    if script != "-m":
        return (script, *words)
    module, *words = words
    start = f'run("{module}")'
    if module == "megatron_sorted":
        name, *words = words
        start = f'run("megatron_sorted", "{name}")'
    entry = next(
        path for path in ROOT.glob("tools/*.py") if start in path.read_text(encoding="utf-8")
    )
    return (f"tools/{entry.name}", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the demo's folder after its first steps, with a model of one process and 40 steps in place of the demo's own."""
    path = tmp_path_factory.mktemp("demo")
    for step in demo_steps(path, quick=True):
        if step.name == "questions" or step.name.startswith("prepare"):
            done = run_command(*words_of(step.command), cwd=ROOT)
            assert done.returncode == 0, done.stderr
    nested = next(
        step for step in demo_steps(path, quick=True) if step.name == "train-nested"
    ).command
    flags = nested[nested.index("--config") :]
    done = run_command(
        "pretrain_sorted.py",
        *flags,
        "--pipeline-model-parallel-size",
        1,
        "--train-iters",
        40,
        "--eval-iters",
        1,
        "--no-full-validation",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return path


def test_every_command_runs_as_it_is_printed(folder):
    commands = use_commands(folder)
    text = afterwards(folder)
    for command in commands.values():
        assert shlex.join(command) in text
    question, answer = trained_question(folder)
    assert shlex.quote(request_of(question)) in text and repr(answer) in text
    trained = [
        json.loads(line)
        for line in (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {"instruction": question, "output": answer}.items() <= trained[0].items()
    ran = {}
    for purpose in ("export it", "ask it", "question it", "measure it"):
        ran[purpose] = run_command(*words_of(commands[purpose]), cwd=ROOT)
        assert ran[purpose].returncode == 0, (purpose, ran[purpose].stderr)
    assert "prompt form: plain" in ran["ask it"].stderr
    assert (
        "prompt form: plain, as trained" in ran["question it"].stdout
        and "lost their beginning" not in ran["question it"].stdout
    )
    own = json.loads((folder / "nested" / "evaluation.json").read_text())
    assert (
        own["sets"]["phrasing"].keys()
        == json.loads((folder / "measured" / "evaluation.json").read_text())["data"]["phrasing"][
            "models"
        ]["nested_hf"]["exits"].keys()
    )


def test_the_server_answers_the_printed_request(folder):
    model = folder / "nested_hf"
    if not model.is_dir():
        assert run_command(*words_of(use_commands(folder)["export it"]), cwd=ROOT).returncode == 0
    script, *words = words_of(use_commands(folder)["serve it"])
    port, body = free_port(), request_of(trained_question(folder)[0]).encode()
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        server = start_command(
            script,
            *words[: words.index("--port")],
            "--port",
            port,
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
        try:
            answered = until_it_answers(server, port, "/v1/chat/completions", body, seconds=240)
        finally:
            server.terminate()
            server.wait(60)
    assert answered["choices"][0]["message"]["role"] == "assistant", (
        folder / "server.log"
    ).read_text()


def test_paths_in_the_project_are_short():
    """A folder inside the project is named from it, so that the lines can be copied in a fresh clone."""
    folder = ROOT / "runs" / "demo"
    steps = demo_steps(folder, quick=False)
    assert os.path.join("runs", "demo", "data") in " ".join(steps[0].command)
