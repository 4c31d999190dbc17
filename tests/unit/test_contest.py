"""The contest of decoders: rounds, speeds, verdicts, the file that continues, and llama.cpp's part
with a program that stands in for its server.
"""

import math
import sys

import pytest

from lab import build_llama_cpp, contest
from lab.contests.contenders import LLAMA, OURS, TRANSFORMERS, Entry, Llama, Turn
from lab.contests.gguf import stand_in_vocabulary
from lab.contests.memory import MemoryReader
from lab.contests.page import goal_lines, group_lines, page
from lab.contests.picture import draw
from lab.contests.rounds import Match, Store, play, speed_of
from lab.contests.summary import GOALS, Spread, fastest, ratio, speeds, verdict_of, verdicts
from megatron_sorted.errors import DataError, PlatformError, SettingsError
from megatron_sorted.llama_cpp.server import Completion, LlamaServer, ServedModel
from tests.support.decoding import needs_native
from tests.support.stand_in_llama_server import write_program

TIMES = {"prompt_n": 10, "prompt_ms": 500.0, "predicted_ms": 2000.0, "predicted_per_second": 31.5}


def row(name, engine, kind, number, speed, group="", strategy="full", part="a", tokens=100):
    """Return a row as `play` writes it."""
    return {
        "match": f"{part}/1/m", "part": part, "threads": 1, "model": "m", "group": group,
        "round": number, "name": name, "engine": engine, "kind": kind, "strategy": strategy,
        "speed": speed, "tokens": tokens, "prompt_tokens": 10, "num_bytes": 10**9, "texts": 2,
        "same": 2, "drafted": 0, "accepted": 0, "seconds": 1.0, "others_seconds": 0.0,
    }  # fmt: skip


class Scripted:
    """A contender that writes given tokens and records its turns."""

    def __init__(self, name, engine, kind, tokens, log):
        self.entry = Entry(name, engine, kind, "full", 4)
        self.tokens, self.log = tokens, log

    def write(self, prompts, num_tokens, at_once):
        """Return the tokens for every prompt."""
        self.log.append(self.entry.name)
        return Turn([self.tokens[:num_tokens] for _ in prompts], 0.5)


def test_rounds_rotate_and_texts_are_compared_with_ours_of_the_same_kind():
    """Every round begins with another contender, all write all prompts, the memory is measured."""
    log = []
    contenders = [
        Scripted("ours float32 full", OURS, "float32", [5, 6, 7, 8], log),
        Scripted("ours int8 full", OURS, "int8", [5, 6, 7, 9], log),
        Scripted("other F32", LLAMA, "F32", [5, 6, 7, 8], log),
        Scripted("other Q8_0", LLAMA, "Q8_0", [5, 6, 7, 8], log),
    ]
    match = Match("a", 1, "m", {"": [[1, 2], [3]]}, 4)
    rounds = list(play(match, contenders, range(3, 6), lambda threads: 7e9 * threads))
    names = [one.entry.name for one in contenders]
    assert log == names + names[3:] + names[:3] + names + names[1:] + names[:1]
    for number, rows in zip((3, 4, 5), rounds, strict=True):
        assert {one["round"] for one in rows} == {number}
        assert rows[-1]["name"] == "memory" and rows[-1]["speed"] == 7e9
        by_name = {one["name"]: one for one in rows[:-1]}
        assert by_name.keys() == set(names)
        assert [by_name[name]["same"] for name in names] == [2, 2, 2, 0]
        assert by_name["other F32"]["tokens"] == 8 and by_name["other F32"]["speed"] == 16.0
        assert by_name["other F32"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("part", "ours", "theirs"),
    [("a", 16.0, 31.5), ("b", 2.5, 20.0), ("c", 16.0, 16.0), ("d", 16.0, 64 / 2.5)],
)
def test_speeds_count_all_of_ours_and_their_own_times(part, ours, theirs):
    """HTTP costs llama.cpp nothing where it has times of its own; ours count the whole call."""
    tokens = [[1] * 64]
    own = [Completion.of({"tokens": tokens[0], "timings": TIMES})]
    assert speed_of(part, Turn(tokens, 4.0), 10) == ours
    assert speed_of(part, Turn(tokens, 4.0, own), 10) == pytest.approx(theirs)


def test_speeds_of_groups_are_tokens_over_seconds():
    """Groups of different lengths are not averaged; ratios are taken within a round."""
    rows = [
        row("x", OURS, "int8", 0, 10.0, "one"), row("x", OURS, "int8", 0, 50.0, "two", tokens=300),
        row("x", OURS, "int8", 1, 20.0, "one"), row("x", OURS, "int8", 1, 20.0, "two"),
        row("y", LLAMA, "Q8_0", 0, 5.0, "one"), row("y", LLAMA, "Q8_0", 1, 40.0, "one"),
    ]  # fmt: skip
    assert speeds(rows, "x") == {0: 400 / 16, 1: 20.0}
    assert speeds(rows, "x", "two") == {0: 50.0, 1: 20.0}
    assert ratio(speeds(rows, "x", "one"), speeds(rows, "y")) == Spread(1.25, 0.5, 2.0)


def contest_rows():
    """Return rows of parts a and d with known ratios."""
    rows = []
    for number, noise in enumerate((1.0, 2.0, 0.5)):
        rows += [
            row("ours float32 full", OURS, "float32", number, 9.9 * noise),
            row("llama.cpp F32", LLAMA, "F32", number, 10 * noise),
            row("ours int8 full", OURS, "int8", number, 55 * noise),
            row("llama.cpp Q8_0", LLAMA, "Q8_0", number, 50 * noise),
        ]
        for group, factor in (("qa", 1.0), ("math", 0.5)):
            for name, engine, kind, strategy, speed in (
                ("ours float32 full", OURS, "float32", "full", 20),
                ("ours float32 tree", OURS, "float32", "tree", 60 * factor),
                ("llama.cpp F32", LLAMA, "F32", "full", 20),
                ("llama.cpp F32, draft", LLAMA, "F32", "draft", 30),
                ("transformers float32", TRANSFORMERS, "float32", "full", 10),
            ):
                rows.append(row(name, engine, kind, number, speed * noise, group, strategy, "d"))
        for part in "ad":
            rows.append(
                {"match": f"{part}/1/m", "part": part, "threads": 1, "model": "m",
                 "round": number, "name": "memory", "speed": 2e10}
            )  # fmt: skip
    return rows


def test_verdicts():
    """Plain is compared with plain, the best strategy with the faster of plain and with draft."""
    judged = {
        (one.goal.part, one.goal.kind, one.goal.peer): (round(one.reached.median, 6), one.word)
        for one in verdicts(contest_rows())
    }
    whole = 2 / (1 / 60 + 1 / 30)
    assert judged == {
        ("a", "float32", LLAMA): (0.99, "missed"),
        ("a", "int8", LLAMA): (1.1, "met"),
        ("d", "float32", LLAMA): (round(whole / 30, 6), "missed"),
        ("d", "float32", TRANSFORMERS): (round(whole / 10, 6), "met"),
    }
    [goal] = [one for one in GOALS if one.part == "d" and one.peer == TRANSFORMERS]
    members = [one for one in contest_rows() if one["part"] == "d"]
    assert verdict_of(goal, members, "qa").reached.median == 6
    assert verdict_of(goal, members, "math").reached.median == 3
    assert fastest(members, LLAMA, "F32") == "llama.cpp F32, draft"
    assert fastest(members, LLAMA, "F32", plain=True) == "llama.cpp F32"
    assert fastest(members, LLAMA, "BF16") is None


def test_page_and_picture(tmp_path):
    """The page names targets, verdicts, ratios and shares of the memory's speed."""
    rows = contest_rows()
    facts = {"commits": ["abc"], "tuned": {"1 threads, float32": {"tree": {"num_levels": 3}}}}
    text = page(rows, facts, {"num_tokens": 64}, "python -m lab.contest MODEL")
    assert "| plain, int8 over llama.cpp Q8_0: m | 1 | 1.1 | 1.10 (1.10 to 1.10) | met |" in text
    assert "| ours int8 full | 55.0 (27.5 to 110.0) | 1.000 | 55.0 | 275% | 6 of 6 |" in text
    assert (
        "| ours float32 tree | 40.0 (20.0 to 80.0) | 1.000 |  |  | 12 of 12 | 1.33 | 4.00 |" in text
    )
    assert "tuned, 1 threads, float32, `tree`: num_levels 3" in text
    assert len(goal_lines(rows)) == 4 + 2 + len(verdicts(rows)) - 1
    by_group = "\n".join(group_lines([one for one in rows if one["part"] == "d"]))
    assert "over transformers | qa | 3 | 6.00" in by_group
    draw(rows, tmp_path / "contest.png")
    assert (tmp_path / "contest.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_kept_and_continued(tmp_path):
    """A second run counts complete rounds; other settings and damaged files are refused."""
    path, match = tmp_path / "contest.json", Match("a", 1, "m", {"": []}, 4)
    store = Store(path, {"prompts": 6})
    assert store.rounds_of(match) == 0
    store.add([row("x", OURS, "int8", 0, 1.0)])
    store.add([row("x", OURS, "int8", 1, 2.0)])
    again = Store(path, {"prompts": 6})
    assert again.rows == store.rows and again.rounds_of(match) == 2
    assert again.rounds_of(Match("a", 2, "m", {"": []}, 4)) == 0
    assert len(again.facts["commits"]) == 1
    with pytest.raises(DataError, match=r"its prompts is 6, not 7: .* choose another --output"):
        Store(path, {"prompts": 7})
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match="Remove it, or choose another"):
        Store(path, {"prompts": 6})


@pytest.fixture
def served(tmp_path):
    """Return what a stand-in server runs."""
    program = write_program(tmp_path / "llama-server")
    return ServedModel(program, tmp_path / "model.gguf", 2, 512)


def test_server(served):
    """Tokens and its own times are read; requests at once keep their order; it ends."""
    server = LlamaServer(served)
    try:
        done = server.complete([4, 5], 8)
        assert done.tokens == [6, 7, 8, 9, 10, 11, 12, 13]
        assert (done.num_prompt_tokens, done.prompt_seconds, done.seconds) == (2, 0.002, 0.008)
        assert done.num_steps == pytest.approx(7) and done.num_drafted == 0
        texts = server.complete_all([[n] for n in range(10, 26)], 2)
        assert [one.tokens for one in texts] == [[n + 1, n + 2] for n in range(10, 26)]
        turn = Llama(Entry("l", LLAMA, "F32", "full", 1), server).write([[7], [9]], 3, False)
        assert turn.tokens == [[8, 9, 10], [10, 11, 12]] and len(turn.own) == 2
        assert server.cpu_seconds() >= 0
        with pytest.raises(PlatformError, match=r"status 400: .*token ids are expected"):
            server.complete(["a"], 2)
    finally:
        server.stop()
    assert server.process.poll() is not None and not server.log.exists()
    with pytest.raises(PlatformError, match="did not answer"):
        server.complete([4], 2)


def test_server_that_ends(served, tmp_path):
    """What the program says is in the error."""
    broken = ServedModel(served.program, tmp_path / "broken.gguf", 1, 512)
    with pytest.raises(PlatformError, match=r"ended with status 1.*this model is broken"):
        LlamaServer(broken)


def test_command_of_a_server(served, tmp_path):
    """A slot has the whole context; a draft is named with its kind of speculation."""
    plain = served.command(80)
    assert plain[plain.index("--ctx-size") + 1] == "512"
    assert plain[plain.index("--poll") + 1] == "0" and "--model-draft" not in plain
    other = ServedModel(served.program, served.model, 1, 512, 4, "f32", tmp_path / "d.gguf", 3)
    line = " ".join(other.command(80))
    assert "--ctx-size 2048 --parallel 4" in line and "--cache-type-k f32" in line
    assert "--spec-type draft-simple --spec-draft-n-max 3" in line


@pytest.mark.parametrize("size", [5, 259, 260, 512])
def test_stand_in_vocabulary(size, tmp_path):
    """sentencepiece reads it, with the right number of tokens, and the end token at 0."""
    from sentencepiece import SentencePieceProcessor

    path = tmp_path / "tokenizer.model"
    path.write_bytes(stand_in_vocabulary(size))
    tokenizer = SentencePieceProcessor(model_file=str(path))
    assert tokenizer.vocab_size() == size and tokenizer.IsUnknown(0)
    assert not tokenizer.IsControl(2) and "</s>" not in map(tokenizer.IdToPiece, range(size))
    assert sum(tokenizer.IsByte(token) for token in range(size)) == 256 * (size >= 260)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memory_is_read_once(threads):
    """Every word of the whole blocks is read once, by any number of threads."""
    reader = MemoryReader(8 * 64 * 12)
    assert reader.read(threads) == 64 * 12
    reader.numbers[-1] = 6
    assert reader.read(threads) == 64 * 12 + 5
    assert math.isfinite(reader.bytes_a_second(threads))


def test_build_refuses_other_sources(tmp_path):
    """The hash is checked before anything is unpacked; a missing build names its command."""
    archive = tmp_path / "other.tar.gz"
    archive.write_bytes(b"other")
    with pytest.raises(PlatformError, match=r"its SHA-256 is .* not 832db069"):
        build_llama_cpp.build(tmp_path / "folder", archive, 1)
    with pytest.raises(PlatformError, match=r"there is no such file. Leave --sdist out"):
        build_llama_cpp.build(tmp_path / "folder", tmp_path / "none", 1)
    with pytest.raises(PlatformError, match=r"python -m lab.build_llama_cpp --folder"):
        build_llama_cpp.find_build(tmp_path / "folder")
    assert not build_llama_cpp.has_amx("flags : avx512_vnni")


def test_questions_need_a_model(monkeypatch):
    """The error names the order of arguments."""
    monkeypatch.setattr(sys, "argv", ["contest", "--questions", "q.jsonl"])
    with pytest.raises(SettingsError, match="Name one before it"):
        contest.main()
