"""The first hour: the demo's closing commands as printed, and every command of the start page and
the tutorial as written.

The models are trained for a few steps on the demo's own data.
"""

import json
import os
import shlex

import pytest

from lab.demo import afterwards, demo_steps, request_of, trained_question, use_commands
from tests.support.commands import ROOT, run_command, start_command
from tests.support.documented_commands import commands_of
from tests.support.ports import free_port, until_it_answers


def script_and_arguments(command) -> tuple[str, ...]:
    """Return script and arguments of a command that begins with an interpreter."""
    _, script, *arguments = command
    if script != "-m":
        return (script, *arguments)
    module, *arguments = arguments
    start = f'run("{module}")'
    if module == "megatron_sorted":
        name, *arguments = arguments
        if name == "train":
            return ("pretrain_sorted.py", *arguments)
        start = f'run("megatron_sorted", "{name}")'
    entry = next(
        path for path in ROOT.glob("tools/*.py") if start in path.read_text(encoding="utf-8")
    )
    return (f"tools/{entry.name}", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the demo's folder, ``runs/demo`` of a stand-in for a clone, with models of one process
    and 40 steps.
    """
    clone = tmp_path_factory.mktemp("clone")
    (clone / "examples").symlink_to(ROOT / "examples")
    path = clone / "runs" / "demo"
    path.mkdir(parents=True)
    for step in demo_steps(path, quick=True):
        command = (
            script_and_arguments(step.command)
            if "torch.distributed.run" not in step.command
            else None
        )
        if command is None:
            flags = step.command[step.command.index("--config") :]
            few = ("--train-iters", 40, "--eval-iters", 1, "--no-full-validation")
            command = ("pretrain_sorted.py", *flags, "--pipeline-model-parallel-size", 1, *few)
        if step.name != "picture":
            done = run_command(*command, cwd=ROOT)
            assert done.returncode == 0, (step.name, done.stderr)
    return path


@pytest.mark.parametrize("page", ["start", "tutorial"])
def test_every_command_of_the_page_runs_as_written(folder, page):
    ran = 0
    for command in commands_of(ROOT / "docs" / f"{page}.md"):
        program, *arguments = command.arguments
        others = {
            "--chat",
            "serve",
            "here",
            "here/examples/quickstart.yaml",
        }  # talked to, or tried by test_wheel
        if program.removeprefix(".venv/bin/") != "megatron-sorted" or others & set(arguments):
            continue
        command_line = ("python", "-m", "megatron_sorted", *arguments)
        done = run_command(*script_and_arguments(command_line), cwd=folder.parents[1])
        assert done.returncode == 0, (command, done.stderr)
        ran += 1
    assert ran == {"start": 2, "tutorial": 6}[page]


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
    for purpose in ("ask it", "test it", "measure it"):
        ran[purpose] = run_command(*script_and_arguments(commands[purpose]), cwd=ROOT)
        assert ran[purpose].returncode == 0, (purpose, ran[purpose].stderr)
    assert "prompt form: plain" in ran["ask it"].stderr
    assert (
        "prompt form: plain, as trained" in ran["test it"].stdout
        and "lost their beginning" not in ran["test it"].stdout
    )
    own = json.loads((folder / "nested" / "evaluation.json").read_text())
    assert (
        own["sets"]["phrasing"].keys()
        == json.loads((folder / "measured" / "evaluation.json").read_text())["data"]["phrasing"][
            "models"
        ]["nested_hf"]["exits"].keys()
    )


def test_the_server_answers_the_printed_request(folder):
    script, *arguments = script_and_arguments(use_commands(folder)["serve it"])
    port, body = free_port(), request_of(trained_question(folder)[0]).encode()
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        server = start_command(
            script,
            *arguments[: arguments.index("--port")],
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
    """A folder inside the project is named from it, so that the lines can be copied in a fresh
    clone.
    """
    folder = ROOT / "runs" / "demo"
    steps = demo_steps(folder, quick=False)
    assert os.path.join("runs", "demo", "data") in " ".join(steps[0].command)
