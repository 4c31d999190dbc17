"""The whole measurement of servers in seconds, with our own server and a tiny random model."""

import json
import sys

import pytest

from lab import bench_serving
from lab.contests.rounds import Store
from tests.support.evaluated import write_model

pytest.importorskip("uvicorn", reason="serving is an extra")


def test_whole_measurement(tmp_path, monkeypatch):
    """Every part has rows; texts of many clients are those written alone; the page is written."""
    model = write_model(
        tmp_path / "tiny", num_layers=4, max_position_embeddings=512, exit_layer_indices=[2, 4]
    )
    questions = tmp_path / "questions.jsonl"
    turns = ["The small red cat", "A bird flew over the house.", "Once upon a time", "The dog sat"]
    questions.write_text(
        "".join(
            json.dumps({"question_id": n, "category": "qa", "turns": [turn]}) + "\n"
            for n, turn in enumerate(turns)
        )
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench_serving", str(model), "--questions", str(questions), "--quick",
         "--output", str(tmp_path / "docs")],
    )  # fmt: skip
    bench_serving.main()
    path = tmp_path / "docs" / "benchmarks" / "serving.json"
    store = Store(path, {})
    rows = store.rows
    assert store.facts["absent"] == {}
    many = [row for row in rows if row["match"] == "throughput"]
    assert {(row["case"], row["strategy"]) for row in many} == {
        (case, strategy) for case in (1, 2) for strategy in ("full", "self_speculative")
    }
    assert all(row["same"] == row["texts"] == 2 and row["short"] == 0 for row in many)
    assert all(row["tokens"] == 16 and row["cpu_seconds"] > 0 for row in many)
    [long] = [row for row in rows if row["match"] == "long prompt"]
    assert long["silence"] >= long["pause"] > 0
    turns = [row for row in rows if row["match"] == "prefixes"]
    assert {row["case"] for row in turns} == {1, 2, 3} and all(row["same"] for row in turns)
    assert "## Many clients" in (path.parent / "serving.md").read_text()
    assert (tmp_path / "docs" / "images" / "serving.png").is_file()
