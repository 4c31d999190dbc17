"""A server that adapts: it learns the fastest strategy of each task; texts stay those of `full`."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving is an extra")
from fastapi.testclient import TestClient

from megatron_sorted.commands.serve import read_arguments
from megatron_sorted.decoding.requested_strategy import RequestedStrategy
from megatron_sorted.decoding.strategies import (
    Full,
    SamplingParameters,
    SelfSpeculative,
    SortedSpeculative,
    TreeSpeculative,
)
from megatron_sorted.decoding.text_generator import StreamedText, TextGenerator
from megatron_sorted.decoding.tuning.tuned_options import (
    LEARNED_FILE,
    TUNED_FILE,
    write_tuned_options,
)
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.serving import adaptation as adaptation_module
from megatron_sorted.serving.adaptation import Adaptation, candidate_strategies
from megatron_sorted.serving.api import make_app
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.worker import GenerationWorker
from tests.support.decoding import plain_network
from tests.unit.test_decoding_server import expected
from tests.unit.test_decoding_text_generator import Letters

STRATEGIES = [
    Full(),
    SelfSpeculative(1, 4),
    SortedSpeculative((1, 2), (0.5, 0.3), 6),
    TreeSpeculative((1,), (), 3, 3, 6),
]
NAMES = [strategy.name for strategy in STRATEGIES]
ORIGIN = {"machine": {"device": "cpu"}, "draft": None}


class Timed(TextGenerator):
    """A text generator whose clock advances by a fixed time per token of each strategy.

    Attributes:
        seconds: Seconds per token of each strategy.
        taken: Names of the strategies used so far, in order.
        now: The clock's time.
    """

    def __init__(self, seconds: dict[str, float]):
        super().__init__(plain_network("llama")[1], Letters())
        self.seconds, self.taken, self.now = seconds, [], 0.0

    def writing(self, request, *more):
        name = request.strategy.name
        self.taken.append(name)
        writing, logits = super().writing(request, *more), None
        while True:
            try:
                output = writing.send(logits)
            except StopIteration:
                return
            if isinstance(output, StreamedText):
                self.now += self.seconds[name] * len(output.added.tokens)
            logits = yield output


@contextmanager
def serving(path: Path, seconds=None, strategies=STRATEGIES, origin=ORIGIN):
    """Yield a client, the text generator and the worker."""
    writer = Timed(seconds or dict(zip(NAMES, (4.0, 3.0, 1.0, 2.0), strict=True)))
    worker = GenerationWorker(writer, Adaptation(strategies, path, origin), lambda: writer.now)
    by_name = {strategy.name: strategy for strategy in strategies}
    with TestClient(make_app(worker, "tiny", by_name.get)) as client:
        yield client, writer, worker
        assert worker.close(60)


def ask(client, prompt: str = "hello", **more) -> str:
    answer = client.post(
        "/v1/completions", json={"prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def times_of(client, task: str = "default") -> list[int]:
    return [row["times"] for row in client.get("/v1/adaptation").json()["tasks"][task]]


def test_each_strategy_is_tried_the_fastest_kept_and_the_text_is_fulls(tmp_path):
    with serving(tmp_path / LEARNED_FILE) as (client, writer, _):
        for number in range(60):
            prompt = "ab"[number % 2] * (number % 5 + 1)
            sampling = SamplingParameters(0.8, seed=number) if number % 3 else None
            more = {"temperature": 0.8, "seed": number} if number % 3 else {}
            assert ask(client, prompt, **more) == expected(
                writer, writer.encode(prompt), 6, sampling
            )
        assert writer.taken[:4] == NAMES and writer.taken[30:].count("sorted_speculative") > 24
        learned = client.get("/v1/adaptation").json()
        assert learned["strategies"] == NAMES and list(learned["tasks"]) == ["default"]
        rows = learned["tasks"]["default"]
        assert [row["strategy"] for row in rows] == NAMES and sum(
            row["times"] for row in rows
        ) == 60
        assert [row["tokens_per_second"] for row in rows] == [0.25, 0.33, 1.0, 0.5]


def test_tasks_are_separate_and_a_named_strategy_is_used_and_not_learned(tmp_path):
    with serving(tmp_path / LEARNED_FILE) as (client, writer, _):
        for number in range(40):
            writer.seconds = {name: 1.0 + ((name == "tree") != (number % 2 == 0)) for name in NAMES}
            ask(client, task="odd" if number % 2 else "even")
        ask(client, strategy="full", task="odd")
        ask(client, strategy="full", task="third")
        assert sum(times_of(client, "odd")) == sum(times_of(client, "even")) == 20
        assert times_of(client, "even")[3] >= 12 and times_of(client, "odd")[3] <= 3
        assert writer.taken[-2:] == ["full", "full"] and list(
            client.get("/v1/adaptation").json()["tasks"]
        ) == ["even", "odd"]
        [chat] = client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "task": "chat"},
        ).json()["choices"]
        assert chat["finish_reason"] == "length" and sum(times_of(client, "chat")) == 1


def test_learned_speeds_outlive_the_server(tmp_path):
    path = tmp_path / LEARNED_FILE
    with serving(path) as (client, _, worker):
        for number in range(16):
            assert json.loads(path.read_text())["tasks"] == {"default": [[0, 0, 0]] * 4}, (
                f"written after {number} jobs"
            )
            ask(client, task="a")
        list(
            worker.submit(Job([[5]], Full(), SamplingParameters(), 1, [])).results()
        )  # behind it the file is written
        assert sum(times for times, _, _ in json.loads(path.read_text())["tasks"]["a"]) == 16
        ask(client, task="b")
        before = client.get("/v1/adaptation").json()
    with serving(path) as (client, writer, _):
        assert client.get("/v1/adaptation").json() == before
        ask(client, task="a")
        ask(client, task="b")
        assert (
            writer.taken == ["sorted_speculative", "self_speculative"]
            and sum(times_of(client, "a")) == 17
        )


def test_a_file_of_other_strategies_or_another_machine_is_renamed(tmp_path, capsys):
    path = tmp_path / LEARNED_FILE
    for number, (strategies, origin) in enumerate(
        [
            (STRATEGIES, ORIGIN),
            (STRATEGIES[:2], ORIGIN),
            (STRATEGIES[:2], {**ORIGIN, "draft": "small@1"}),
        ]
    ):
        with serving(path, strategies=strategies, origin=origin) as (client, *_):
            ask(client, task=str(number))
            assert list(client.get("/v1/adaptation").json()["tasks"]) == [str(number)]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == bool(number) and (
            not number or f"it is now decoding_bandit_{number}.json" in lines[0]
        )
    kept = [
        json.loads((tmp_path / f"decoding_bandit{name}.json").read_text())["tasks"]
        for name in ("_1", "_2", "")
    ]
    assert [list(tasks) for tasks in kept] == [["default", "0"], ["default", "1"], ["default", "2"]]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        "\ud800",
        {"format": 2},
        {"tasks": []},
        {"tasks": {"a": [[1, 2, 3]]}},
        {"tasks": {"a": [[1, 2, float("nan")]] * 4}},
        {"tasks": {"a": [[1, 2]] * 4}},
        {"tasks": {"a": [["1", 2, 3]] * 4}},
        {"tasks": {"a": [[2, 1, 3]] * 4}},
        {"tasks": {str(task): [[0, 0, 0]] * 4 for task in range(1001)}},
    ],
    ids=lambda damage: str(damage)[:40].encode("unicode_escape").decode(),
)
def test_a_damaged_file_is_refused_and_unchanged(tmp_path, damage):
    path = tmp_path / LEARNED_FILE
    Adaptation(STRATEGIES, path, ORIGIN)
    text = (
        damage
        if isinstance(damage, str)
        else json.dumps({**json.loads(path.read_text()), **damage})
    )
    content = text.encode(errors="surrogatepass")
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"decoding_bandit\.json: .*Remove it, or name another with --adapt-file"
    ):
        Adaptation(STRATEGIES, path, ORIGIN)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [LEARNED_FILE]


def test_a_file_that_cannot_be_written_is_an_error_at_the_start_and_a_line_later(tmp_path, capsys):
    with pytest.raises(
        SettingsError, match=r"--adapt: .* cannot be written \(No such file or directory\)"
    ):
        Adaptation(STRATEGIES, tmp_path / "none" / LEARNED_FILE, ORIGIN)
    (tmp_path / "some").mkdir()
    with serving(tmp_path / "some" / LEARNED_FILE) as (client, *_):
        (tmp_path / "some" / LEARNED_FILE).unlink()
        (tmp_path / "some").rmdir()
        for _ in range(18):
            ask(client)
    assert capsys.readouterr().err.count("not written (No such file or directory)") == 2


def test_further_tasks_count_as_the_default_one(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation_module, "MAX_TASKS", 3)
    with serving(tmp_path / LEARNED_FILE) as (client, *_):
        for task in ("a", "b", "c", "d", "b"):
            ask(client, task=task)
        tasks = client.get("/v1/adaptation").json()["tasks"]
        assert {task: sum(row["times"] for row in rows) for task, rows in tasks.items()} == {
            "a": 1,
            "b": 2,
            "default": 2,
        }


def test_failed_jobs_teach_nothing_and_cancelled_ones_do(tmp_path, monkeypatch):
    with serving(tmp_path / LEARNED_FILE) as (client, writer, worker):
        with monkeypatch.context() as patch:
            patch.setattr(
                writer, "writing", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
            )
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500
            patch.setattr(
                writer,
                "writing",
                lambda *_: (_ for _ in ()).throw(DataError("prompt 0: bad. Mend it.")),
            )
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 400
        assert client.get("/v1/adaptation").json()["tasks"] == {}
        job = Job([writer.encode("a")], None, SamplingParameters(), 200, [])
        job.notify = job.cancelled.set
        worker.submit(job)
        late = Job([writer.encode("a")], None, SamplingParameters(), 200, [])
        late.cancelled.set()
        assert list(worker.submit(late).results()) == [] and len(list(job.results())) == 1
        assert writer.taken == ["self_speculative"], (
            "full failed and waits, the job cancelled before its start used no strategy"
        )
        assert (
            times_of(client) == [0, 1, 0, 0]
            and worker.adaptation.bandit.tasks["default"][1][1] < 200
        )


def test_candidate_strategies_are_the_tuned_lossless_ones_else_the_default_ones(tmp_path):
    _, network = plain_network("llama")
    writer, choice = TextGenerator(network, Letters()), RequestedStrategy(tmp_path)
    assert [strategy.name for strategy in candidate_strategies(choice, writer)] == NAMES
    tuned = {
        "full": {},
        "self_speculative": {"depth": 3, "num_draft_tokens": 2},
        "early_exit": {"depths": [1], "thresholds": [0.9]},
    }
    write_tuned_options(tmp_path / TUNED_FILE, {"best": "full", "strategies": tuned})
    assert candidate_strategies(choice, writer) == [Full(), SelfSpeculative(3, 2)]
    for kind, depth in ((network.kind, 1), ("float16", 2)):
        own = {"self_speculative": {"depth": depth, "num_draft_tokens": 2}}
        more = {"strategies": own, "dtype": kind, "native": network.is_native}
        write_tuned_options(tmp_path / TUNED_FILE, {"best": "full", **more})
    assert candidate_strategies(choice, writer) == [Full(), SelfSpeculative(1, 2)], "these weights'"
    (tmp_path / TUNED_FILE).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        candidate_strategies(choice, writer)


def test_options_that_contradict_each_other():
    read_arguments(["m", "--adapt"])
    read_arguments(["m", "--strategy", "tree"])
    with pytest.raises(SettingsError, match="--adapt beside --strategy tree: it chooses the str"):
        read_arguments(["m", "--adapt", "--strategy", "tree"])
    with pytest.raises(SettingsError, match="Leave out the options of strategies, or"):
        read_arguments(["m", "--adapt", "--num-nodes", "3"])
    with pytest.raises(SettingsError, match="--adapt-file: x has no effect without --adapt"):
        read_arguments(["m", "--adapt-file", "x"])
