"""The whole contest of decoders in seconds, with a program that stands in for llama.cpp's."""

import statistics
import sys

from lab import build_llama_cpp, contest
from lab.contests import entrants
from lab.contests.contenders import LLAMA, OURS
from lab.contests.rounds import Store
from tests.support.decoding import needs_native
from tests.support.stand_in_llama_server import write_program


def stand_in_build(folder):
    """Write a build whose programs stand in for llama.cpp's."""
    for name in ("build", "build_without_amx"):
        (folder / name / "bin").mkdir(parents=True)
        for target in build_llama_cpp.TARGETS:
            write_program(folder / name / "bin" / target)


@needs_native
def test_whole_contest(tmp_path, monkeypatch):
    """All parts run with stand-ins for llama.cpp, continue, and write page, picture and rows."""
    folder = tmp_path / "llama"
    stand_in_build(folder)
    monkeypatch.setattr(entrants.Peer, "file", lambda self, model, depth, kind: folder / "m.gguf")
    monkeypatch.setattr(entrants, "bytes_a_token", lambda file: 1000)
    arguments = ["contest", "--quick", "--llama-cpp", str(folder), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    contest.main()
    path = tmp_path / "results" / "contest.json"
    rows = Store(path, {}).rows
    assert {one["match"] for one in rows} == {"a/1/tiny", "b/1/tiny", "c/1/tiny"} | {
        "d/1/tiny-agreeing"
    }
    ours = [one for one in rows if one.get("engine") == OURS]
    assert ours and all(one["same"] == one["texts"] for one in ours)  # lossless
    strategies = {one["strategy"] for one in ours if one["part"] == "d"}
    assert strategies == {"full", "self_speculative", "sorted_speculative", "tree"}
    theirs = [one for one in rows if one.get("engine") == LLAMA and one["part"] == "d"]
    assert {one["strategy"] for one in theirs} == {"full", "draft"}
    assert {one["drafted"] for one in theirs if one["strategy"] == "draft"} == {32}
    plain = [one for one in rows if one["name"] == "llama.cpp F32" and one["part"] == "a"]
    assert statistics.median(one["speed"] for one in plain) == 875
    page_text = (tmp_path / "results" / "contest.md").read_text()
    assert (
        "batch 16" in page_text and "best lossless strategy, int8 over llama.cpp Q8_0" in page_text
    )
    before = path.read_bytes()
    contest.main()  # nothing is left to do
    assert path.read_bytes() == before
