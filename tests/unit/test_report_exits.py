"""The table and the picture of exits, from evaluation files written by hand."""

import json
import struct
from pathlib import Path

import pytest

from megatron_sorted.commands.report import main
from megatron_sorted.errors import DataError
from megatron_sorted.reporting.exits import read_evaluation


def write_evaluation(
    folder: Path, run: str, losses: dict[int, float], exact: dict[int, float]
) -> Path:
    """Return the file of a run with one real set and one on which nothing is right."""
    scores = {
        str(d): {"loss": losses[d], "token_accuracy": 0.5, "exact_match": exact[d]} for d in losses
    }
    floor = {str(d): {"loss": 9.0, "token_accuracy": 0.0, "exact_match": 0.0} for d in losses}
    exits = {
        str(d): {"parameters": 1_000_000 * d, "flops_per_token": 2_000_000 * d} for d in losses
    }
    path = folder / f"{run}.json"
    sets = {"phrasing_text_document": scores, "unseen_text_document": floor}
    path.write_text(json.dumps({"run": run, "exits": exits, "sets": sets}), encoding="utf-8")
    return path


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nested = write_evaluation(
        tmp_path, "nested", {10: 0.25, 2: 1.5}, {10: 0.915, 2: 0.5}
    )  # depth 10 must come after depth 2
    plain = write_evaluation(tmp_path, "plain", {2: 8.0, 10: 0.2}, {2: 0.0, 10: 0.93})
    picture = tmp_path / "new" / "exits.png"
    main([str(nested), str(plain), "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run     depth") and lines[0].endswith(
        "phrasing loss  phrasing exact  unseen loss  unseen exact"
    )
    rows = [line.split() for line in lines if line.startswith(("nested", "plain"))]
    assert rows == [
        ["nested", "2", "2,000,000", "4.00e+06", "1.500", "50.0%", "9.000", "0.0%"],
        ["nested", "10", "10,000,000", "2.00e+07", "0.250", "91.5%", "9.000", "0.0%"],
        ["plain", "2", "2,000,000", "4.00e+06", "8.000", "0.0%", "9.000", "0.0%"],
        ["plain", "10", "10,000,000", "2.00e+07", "0.200", "93.0%", "9.000", "0.0%"],
    ]
    assert len({len(line) for line in lines[:6]}) == 1  # columns stand under their titles
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:24]) == (1400, 600)


def test_one_run_alone_is_drawn(tmp_path: Path) -> None:
    main(
        [
            str(write_evaluation(tmp_path, "only", {4: 1.0}, {4: 0.5})),
            "--output",
            str(tmp_path / "only.png"),
        ]
    )
    assert (tmp_path / "only.png").stat().st_size > 5000


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_evaluation(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"run": "x", "exits": {}}', encoding="utf-8")
    with pytest.raises(DataError, match="not an evaluation file"):
        read_evaluation(broken)
    broken.write_text('{"format": 1, "models": {}, "texts": {}}', encoding="utf-8")
    with pytest.raises(DataError, match="written by megatron-sorted evaluate, which draws its own"):
        read_evaluation(broken)
    content = json.loads(
        write_evaluation(tmp_path, "holes", {2: 1.0, 4: 1.0}, {2: 0.0, 4: 0.0}).read_text(
            encoding="utf-8"
        )
    )
    del content["sets"]["unseen_text_document"]["4"]
    broken.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"every set needs scores for each exit \[2, 4\]"):
        read_evaluation(broken)
    two = write_evaluation(tmp_path, "two", {2: 1.0}, {2: 0.0})
    four = write_evaluation(tmp_path, "four", {4: 1.0}, {4: 0.0})
    with pytest.raises(DataError, match="Compare runs with the same sets and exits"):
        main([str(two), str(four), "--output", str(tmp_path / "x.png")])
