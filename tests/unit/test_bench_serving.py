"""The measurement of servers: clients and their times, turns, the file that continues, the page;
with a program that stands in for a server.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import bench_serving
from lab.contests.contenders import LLAMA, OURS
from lab.contests.rounds import Store, digest
from lab.serving.clients import Stream, ask, closed_loop, percentile
from lab.serving.contenders import BEFORE, FULL, Contender, version_in
from lab.serving.dialects import Chat, Completions, LlamaCompletions, Prompt
from lab.serving.measure import Measurement
from lab.serving.models import copy_model, long_prompt, make_prompts
from lab.serving.page import growth_of, page
from lab.serving.parts import (
    LONG_PROMPT,
    PREFIXES,
    THROUGHPUT,
    Size,
    alone,
    with_clients,
    with_long_prompt,
    with_turns,
)
from lab.serving.picture import draw
from lab.serving.rows import COLUMNS
from lab.serving.servers import Launch, Server, Servers
from megatron_sorted.benchmark.questions import MultiTurnQuestion
from megatron_sorted.decoding.open_model import open_text_generator
from megatron_sorted.errors import DataError, PlatformError
from tests.support import stand_in_api
from tests.support.evaluated import write_model
from tests.support.stand_in_api import running_server

PROMPTS = [Prompt(f"p{n}", [1] * n + [10 * n]) for n in range(1, 5)]
SIZE = Size(num_tokens=3, texts=4, seconds=60, streams=2, turns=2, after_long=2)
STAND_IN = Launch("stand-in", (sys.executable, stand_in_api.__file__, "PORT"), Path("."))


def contender(name="ours float32 full", engine=OURS, launch=STAND_IN, dialect=None, kind="float32"):
    """Return a contender of a stand-in."""
    return Contender(name, engine, kind, FULL, launch, dialect or Completions())


@pytest.mark.parametrize(
    ("dialect", "prompt", "text", "cached"),
    [
        (Completions(), Prompt("", [4, 5]), "6 7 8", 3),
        (Chat(), [{"role": "user", "content": "four"}], "5 6 7", 3),
        (LlamaCompletions(lambda ids: " ".join(map(str, ids)) + "\n"), Prompt("", [7]), "8 9 10",
         None),
    ],
)  # fmt: skip
def test_every_api_gives_text_times_and_counts(dialect, prompt, text, cached):
    """Each event with text has its time; the server's own count of tokens is taken."""
    firsts = []
    with running_server() as (port, _):
        stream = ask(port, dialect, prompt, 3, lambda: firsts.append(1))
    assert (stream.text, stream.num_tokens, stream.num_cached) == (text, 3, cached)
    assert len(stream.times) == 3 and firsts == [1]
    assert stream.sent <= stream.times[0] <= stream.times[1] <= stream.times[2]


def test_servers_without_tokens_get_the_text():
    """transformers' server reads a text, with its own fields beside."""
    body = Completions({"strategy": "full"}, as_text=True).body(Prompt("hi\n", [1, 2]), 5)
    assert body == {"prompt": "hi\n", "max_tokens": 5, "temperature": 0, "stream": True,
                    "strategy": "full"}  # fmt: skip
    assert LlamaCompletions(str).body(Prompt("", [1]), 5)["ignore_eos"] is True


def test_refusals_name_status_and_answer():
    """An error's text is that of the server."""
    with running_server() as (port, _), pytest.raises(PlatformError, match="503: no room"):
        ask(port, Completions(), Prompt("", [0]), 3)
    with pytest.raises(PlatformError, match="did not answer"):
        ask(port, Completions(), Prompt("", [1]), 3)


def test_pauses_are_those_of_a_period():
    """A pause counts where it overlaps; a silence begins with the request."""
    stream = Stream(1.0, [4.0, 5.0, 7.0, 7.5], "", 4)
    assert stream.first == 3.0
    assert stream.pauses() == [1.0, 2.0, 0.5] and stream.silences() == [3.0, 1.0, 2.0, 0.5]
    assert stream.pauses(5.5, 6.0) == [2.0] and stream.pauses(5.0, 7.0) == [2.0]
    assert stream.silences(2.0, 3.0) == [3.0] and stream.pauses(8.0, 9.0) == []
    assert percentile(range(1, 21), 0.95) == 19 and percentile([3.0], 0.5) == 3.0


def test_clients_send_again_until_it_is_enough():
    """Each sends at least one request, in its order."""
    sent = []

    def work(client, count):
        return [lambda n=n: sent.append((client, n)) or Stream(0, [1], f"{client}{n}", 1)
                for n in range(count)]  # fmt: skip

    streams = closed_loop([work("a", 3), work("b", 2)])
    assert [[one.text for one in own] for own in streams] == [["a0", "a1", "a2"], ["b0", "b1"]]
    assert [len(own) for own in closed_loop([work("a", 3), work("b", 2)], lambda: True)] == [1, 1]


def test_a_turn_of_clients_counts_texts_that_equal_those_written_alone(tmp_path):
    """Four texts by two clients; one reference is of another text."""
    servers = Servers(tmp_path)
    try:
        with servers.turn_of(STAND_IN) as server:
            references = alone(contender(), server, PROMPTS, SIZE)
            assert references[1] == digest(["21 22 23"])
            references[2] = "other"
            row = with_clients(contender(), server, PROMPTS, SIZE, 2, references)
            longer = Size(num_tokens=4, texts=4)
            other = with_clients(contender(), server, PROMPTS, longer, 8, references)
    finally:
        servers.keep_only(set())
    assert row.keys() == set(COLUMNS)
    assert (row["tokens"], row["texts"], row["same"], row["short"]) == (12, 4, 3, 0)
    assert (row["case"], row["cached"], row["match"]) == (2, 12, THROUGHPUT)
    assert row["seconds"] > 0 and row["first"] <= row["first_95"] <= row["silence"]
    assert (other["tokens"], other["texts"], other["same"]) == (32, 8, 0)


def test_the_long_prompt_comes_after_a_token_of_every_stream():
    """Its own time to the first token is kept; the texts among which it came are counted."""
    long = Prompt("", [1] * 90)
    with running_server() as (port, log):
        server = SimpleNamespace(port=port, cpu_seconds=lambda: 1.0)
        row = with_long_prompt(contender(), server, PROMPTS, SIZE, long)
    before = log[: log.index(("asked", 90))]
    assert {("first", 2), ("first", 3)} <= set(before)
    assert row["match"] == LONG_PROMPT and row["case"] == 2 and row["texts"] >= 3
    assert row["tokens"] == 3 * (row["texts"] - 1) + 2 and row["short"] == 0
    assert row["silence"] >= row["pause"]


def test_turns_repeat_all_earlier_turns():
    """Every turn sends all turns before it, with the answers."""
    with running_server() as (port, _):
        server = SimpleNamespace(port=port, cpu_seconds=lambda: 1.0)
        rows, answers = with_turns(contender(), server, ["abc", "defg"], SIZE)
    assert answers == ["4 5 6", "13 14 15"]  # 3 characters, then 3 + 5 + 4
    assert [row["case"] for row in rows] == [1, 2] and rows[0]["match"] == PREFIXES


@pytest.fixture
def servers(tmp_path):
    """Yield servers that end with the test."""
    started = Servers(tmp_path)
    yield started
    started.keep_only(set())


def test_only_one_server_runs_at_a_time(servers):
    """The others are halted; all of them end."""
    other = Launch("other", STAND_IN.command, STAND_IN.folder)

    def is_halted(launch):
        """Return whether a process halts, which the kernel may do a moment after the signal."""
        end, stat = time.monotonic() + 10, f"/proc/{servers.running[launch].process.pid}/stat"
        while time.monotonic() < end:
            if Path(stat).read_text().rpartition(")")[2].split()[0] == "T":
                return True
        return False

    with servers.turn_of(STAND_IN) as server:
        assert server.cpu_seconds() > 0
    with servers.turn_of(other) as running:
        assert is_halted(STAND_IN)
        assert ask(running.port, Completions(), PROMPTS[0], 1).text == "11"
    assert is_halted(other)
    with servers.turn_of(STAND_IN) as again:
        assert again is server and is_halted(other)
        assert ask(again.port, Completions(), PROMPTS[0], 1).text == "11"
    processes = [one.process for one in servers.running.values()]
    servers.keep_only({STAND_IN})
    assert [one.poll() is None for one in processes] == [True, False]
    servers.keep_only(set())
    assert processes[0].poll() is not None


def test_a_server_that_ends_says_why(tmp_path):
    """The error holds the end of its log."""
    broken = Launch("broken", (sys.executable, "-c", "raise SystemExit('no port')"), tmp_path)
    with pytest.raises(PlatformError, match=r"status 1.*no port"):
        Server(broken, tmp_path)
    with pytest.raises(PlatformError, match=r"no_such_module.*Install torch there"):
        version_in(Path(sys.executable), "torch", "no_such_module")
    with pytest.raises(PlatformError, match="nowhere"):
        version_in(tmp_path / "nowhere", "torch", "os")
    assert version_in(Path(sys.executable), "pytest", "os, sys") == pytest.__version__


def measurement(path, servers, contenders, minutes=1e9):
    """Return a measurement of stand-ins."""
    store = Store(path, {"threads": 1})
    return Measurement(
        store, servers, SIZE, [1, 2], PROMPTS, Prompt("", [1] * 90), minutes,
        dict.fromkeys((PREFIXES, LONG_PROMPT, THROUGHPUT), contenders),
    )  # fmt: skip


def test_rounds_rotate_continue_and_leave_out_who_fails(tmp_path):
    """Rows are kept after every turn; a contender that fails is named, the others go on."""
    path = tmp_path / "serving.json"
    broken = Launch("broken", (sys.executable, "-c", "raise SystemExit('no port')"), tmp_path)
    contenders = [
        contender("other", BEFORE),
        contender("broken", LLAMA, broken),
        contender(launch=Launch("ours", STAND_IN.command, STAND_IN.folder)),
    ]
    servers, pages = Servers(tmp_path), []
    try:
        first = measurement(path, servers, contenders)
        first.run(1, lambda: pages.append(1))
        assert len(pages) == 3 and "no port" in first.store.facts["absent"]["broken"]
        second = measurement(path, servers, contenders)
        second.run(2, lambda: pages.append(1))
        rows = second.store.rows
        kept = path.read_bytes()
        measurement(path, servers, contenders).run(2, lambda: pages.append(1))
    finally:
        servers.keep_only(set())
    assert path.read_bytes() == kept and len(pages) == 6
    assert all(row in rows for row in first.store.rows)
    names = ["other", "ours float32 full"]
    for number, measured, order in ((0, first, names), (1, second, names[::-1])):
        many = [
            (row["case"], row["name"])
            for row in measured.store.rows
            if row["match"] == THROUGHPUT and row["round"] == number
        ]
        assert many == [(case, name) for case in (1, 2) for name in order]
    assert all(row["same"] == row["texts"] for row in rows if row["match"] == THROUGHPUT)
    turns = [row for row in rows if row["match"] == PREFIXES]
    assert len(turns) == 2 * 2 * 2 and all(row["same"] == 1 for row in turns)
    text = page(rows, second.store.facts, page_settings(), "python -m lab.bench_serving MODEL")
    assert "broken did not take part" in text


def test_texts_are_compared_with_ours_whoever_begins(tmp_path):
    """The texts written alone are those of our `full`."""
    other = contender("other", LLAMA, dialect=LlamaCompletions(lambda ids: "another text"))
    servers = Servers(tmp_path)
    try:
        compared = measurement(tmp_path / "s.json", servers, [other, contender()])
        compared.contenders = {THROUGHPUT: [other, contender()]}
        compared.run(1, lambda: None)
    finally:
        servers.keep_only(set())
    same = {(row["name"], row["same"] == row["texts"]) for row in compared.store.rows}
    assert same == {("other", False), ("ours float32 full", True)}


def test_no_round_is_begun_without_time(tmp_path, capsys):
    """What was measured is kept, and what is missing is printed."""
    servers = Servers(tmp_path)
    try:
        late = measurement(tmp_path / "s.json", servers, [contender()], minutes=-1)
        late.run(1, lambda: None)
    finally:
        servers.keep_only(set())
    assert not late.store.rows and "no time for round 1" in capsys.readouterr().err


def page_settings():
    """Return the settings that a page shows."""
    return {"threads": 1, "model": "m", "num_tokens": 64, "long_tokens": 4000}


def row(name, case, number, tokens, engine=OURS, strategy=FULL, **more):
    """Return a row of 2 seconds."""
    return {
        **dict.fromkeys(COLUMNS, 0), "match": THROUGHPUT, "case": case, "round": number,
        "name": name, "engine": engine, "kind": "float32", "strategy": strategy, "seconds": 2.0,
        "tokens": tokens, "cpu_seconds": 1.0, "first": 0.25, "first_95": 0.5, "pause": 0.04,
        "silence": 0.75, "texts": 4, "same": 4, "cached": None, **more,
    }  # fmt: skip


def test_page_and_picture(tmp_path):
    """The page has every table; growth is a ratio within rounds, judged for `full` in float32."""
    rows = [
        row(name, case, number, speed * (1 + number), engine)
        for name, engine, many in (("ours float32 full", OURS, 900), ("x", BEFORE, 200))
        for number in (0, 1)
        for case, speed in ((1, 200), (16, many))
    ]
    assert growth_of(rows, "ours float32 full").median == 4.5
    assert growth_of(rows[:1], "ours float32 full") is None
    rows += [
        row("ours float32 full", 8, 0, 5, match=LONG_PROMPT),
        row("ours float32 full", 10, 0, 5, match=PREFIXES, first=1.5, texts=1, same=1),
        row("ours, kept", 10, 0, 5, match=PREFIXES, texts=1, same=1, cached=1234),
    ]
    facts = {"absent": {"vLLM": "/some/where/python: no wheel."}, "commits": ["abc"]}
    text = page(rows, facts, page_settings(), "c")
    assert "| ours float32 full | 150.0 (100.0 to 200.0) | 675.0 (450.0 to 900.0) |" in text
    assert "**ours float32 full: 4.50 (wanted: 4; met)**; x: 1.00" in " ".join(text.split())
    assert "| x | 300.0 | 300.0 |" in text  # per second of processor time
    assert "| x | 0.25 / 0.50 | 0.25 / 0.50 |" in text and "| x | 40 | 40 |" in text
    assert "| x | 8 of 8 | 8 of 8 |" in text
    assert "4,000 tokens" in text and "| ours float32 full | 0.04 | 0.75 | 0.25 |" in text
    assert "| ours, kept |  |  |  | 250 | 1234 | 1 of 1 |" in text
    assert "- vLLM did not take part: python: no wheel." in text
    assert max(map(len, text.split("\n## How")[0].split("\n![")[0].splitlines())) <= 100
    draw(rows, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 5000
    draw(rows[-1:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_other_settings_are_not_continued(tmp_path):
    """Rows of other settings cannot be compared."""
    store = Store(tmp_path / "s.json", {"threads": 1})
    store.add([row("x", 1, 0, 5)])
    assert Store(tmp_path / "s.json", {"threads": 1}).rows == store.rows
    with pytest.raises(DataError, match="threads is 1, not 2"):
        Store(tmp_path / "s.json", {"threads": 2})


def test_the_copy_has_no_end_and_a_longer_context(tmp_path):
    """No file of the copy names an end token; weights are links, the model is left as it was."""
    model = write_model(tmp_path / "tiny")
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (model / "prompt_form.json").write_text('{"name": "plain", "ends": [{"id": 2}]}')
    tokens = [{"content": "<s>", "special": True}, {"content": "</s>", "special": True}]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    kept = (model / "config.json").read_bytes()
    copy = copy_model(model, tmp_path / "work", 512)
    assert copy == copy_model(model, tmp_path / "work", 512) and copy.name == "tiny-512"
    config = json.loads((copy / "config.json").read_text())
    assert config["eos_token_id"] is None and config["max_position_embeddings"] == 512
    assert "eos_token" not in json.loads((copy / "tokenizer_config.json").read_text())
    tokens = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
    assert [one["special"] for one in tokens] == [True, False]
    assert json.loads((copy / "prompt_form.json").read_text()) == {"name": "plain", "ends": []}
    assert os.readlink(copy / "model.safetensors") == str((model / "model.safetensors").resolve())
    assert (model / "config.json").read_bytes() == kept
    assert copy_model(model, tmp_path / "work", 8).name == "tiny-64"


def test_prompts_are_first_turns_and_the_long_one_has_its_length(tmp_path):
    """Too long questions are left out; the long prompt is at most the wanted length, nearly."""
    generator = open_text_generator(write_model(tmp_path / "tiny"), native="off")
    questions = [MultiTurnQuestion(n, "qa", ("cat " * n, "and then?")) for n in (1, 2, 50, 3)]
    prompts = make_prompts(generator, questions, 2, 20)
    assert [one.text for one in prompts] == ["cat \n", "cat cat \n"]
    assert prompts[0].ids == generator.encode("cat \n")
    long = long_prompt(generator, questions, 300)
    assert 250 < len(long.ids) <= 300 and generator.encode(long.text) == long.ids
    with pytest.raises(DataError, match="at most 1 tokens"):
        make_prompts(generator, questions, 2, 1)


def test_options(monkeypatch, capsys):
    """Without questions there is nothing to measure; --quick writes little."""
    monkeypatch.setattr(sys, "argv", ["bench_serving", "model"])
    with pytest.raises(SystemExit):
        bench_serving.read_arguments()
    assert "--questions" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_serving", "model", "--questions", "q", "--quick"])
    values = bench_serving.read_arguments()
    assert (values.clients, values.rounds, values.kinds) == ([1, 2], 1, ["float32"])
