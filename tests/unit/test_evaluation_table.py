"""Tables and picture of results written by hand."""

import struct

from megatron_sorted.evaluation.output.picture import draw, rows_of
from megatron_sorted.evaluation.output.table import write_tables


def results(names=("nested", "plain"), questions=True):
    """Return results of two models with exits 2 and 10."""

    def text(offset):
        return {
            depth: {
                "loss": loss + offset,
                "loss_standard_error": 0.01,
                "bits_per_byte": loss / 2,
                "perplexity": 10.0**depth,
                "agreement": 0.5,
            }
            for depth, loss in ((10, 1.25), (2, 2.5))
        }

    def exits_of(share):
        scores = ("exact_match", "f1", "exact_match_with_case")
        return {
            depth: {key: share for score in scores for key in (score, f"{score}_standard_error")}
            for depth in (2, 10)
        }

    numbers = {
        "settings": {"seq_length": 64, "shots": 2, "counted": "every token"},
        "models": {
            name: {
                "exits": {
                    depth: {"parameters": 1000 * depth, "flops_per_token": 2000 * depth}
                    for depth in (2, 10)
                }
            }
            for name in names
        },
        "texts": {
            "valid": {
                "documents": 3,
                "bytes": 1234,
                "models": {
                    name: {"tokens": 600, "unknown_tokens": 7 * place, "exits": text(place)}
                    for place, name in enumerate(names)
                },
            }
        },
        "questions": {
            "trivia": {
                "questions": 50,
                "models": {
                    name: {"cut_prompts": 0, "exits": exits_of(0.125 * place)}
                    for place, name in enumerate(names)
                },
            }
        }
        if questions
        else {},
        "tasks": {
            "choice": {
                "models": {
                    name: {
                        "exits": {
                            depth: {"samples": 4, "acc": {"value": 0.25, "standard_error": None}}
                            for depth in (2, 10)
                        }
                    }
                    for name in names
                }
            }
        },
    }
    if len(names) > 1:
        numbers["texts"]["valid"]["models"]["nested"]["exits"][2]["loss_minus"] = {
            "plain": {"value": -1.0, "standard_error": 0.5}
        }
    return numbers


def test_tables():
    lines = write_tables(results()).splitlines()
    assert lines[0] == "valid: 3 documents, 1,234 bytes, 600 tokens"
    rows = [line.split() for line in lines if line.strip()[:2] in ("2 ", "10")]
    assert rows[:4] == [
        [
            "2",
            "nested",
            "2,000",
            "4.00e+03",
            "2.5000",
            "±",
            "0.0100",
            "1.2500",
            "100.000",
            "50.0%",
            "-1.0000",
            "±",
            "0.5000",
        ],
        ["2", "plain", "2,000", "4.00e+03", "3.5000", "±", "0.0100", "1.2500", "100.000", "50.0%"],
        ["10", "nested", "10,000", "2.00e+04", "1.2500", "±", "0.0100", "0.6250", "1e+10", "50.0%"],
        ["10", "plain", "10,000", "2.00e+04", "2.2500", "±", "0.0100", "0.6250", "1e+10", "50.0%"],
    ]
    assert rows[4:6] == [
        ["2", "nested", "2,000", "4.00e+03", "0.0%", "±", "0.0", "0.0%", "0.0%"],
        ["2", "plain", "2,000", "4.00e+03", "12.5%", "±", "12.5", "12.5%", "12.5%"],
    ]
    assert rows[8] == ["2", "nested", "2,000", "4.00e+03", "0.2500"]
    text = "\n".join(lines)
    assert "plain has 7 unknown tokens" in text and "nested has" not in text
    assert (
        "loss: nats per counted token" in text
        and "exact: share of answers that equal" in text
        and "FLOPs/token: forward, 64 tokens" in text
    )
    header = next(line for line in lines if line.startswith("depth"))
    assert header.index("perplexity") + len("perplexity") == lines[4].index("100.000") + len(
        "100.000"
    )


def test_picture(tmp_path):
    assert [(row.title, row.percent) for row in rows_of(results())] == [
        ("Held-out loss, valid (lower is better)", False),
        ("Exact match, trivia (higher is better)", True),
        ("choice, acc", False),
    ]
    line = rows_of(results())[0].lines[1]
    assert (line.name, line.depths, line.flops, line.values) == (
        "plain",
        [2, 10],
        [4000, 20000],
        [3.5, 2.25],
    )
    draw(results(), tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:24]) == (
        1400,
        1500,
    )
    draw(results(("one",), questions=False), tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_losses_by_position_are_rows_of_buckets_and_columns_of_exits():
    def numbers(loss, **more):
        return {"loss": loss, "loss_standard_error": 0.5, "accuracy": 0.25, "tokens": 1200} | more

    minus = {"loss_minus": {"plain": {"value": -0.5, "standard_error": None}}}
    of_text = {
        "nested": {"buckets": [{}, {2: numbers(3.0, **minus), 10: numbers(2.0)}]},
        "plain": {"buckets": [{}, {2: numbers(3.5), 10: numbers(2.25)}]},
    }
    positions = {"length": 4096, "joined": False, "buckets": [[1, 1], [2, 4096]]}
    text = write_tables(
        {
            "settings": {"seq_length": 64, "positions": positions},
            "texts": {},
            "positions": {"valid": {"models": of_text}},
            "questions": {},
            "tasks": {},
        }
    )
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["positions", "model", "tokens", "depth 2", "depth 10"] in cells
    assert ["2-4,096", "nested", "1,200", "3.0000 ± 0.5000", "2.0000 ± 0.5000"] in cells
    assert ["2-4,096", "nested - plain", "1,200", "-0.5000"] in cells
    assert ["2-4,096", "plain", "1,200", "25.0%", "25.0%"] in cells
    assert not any(line[:1] == ["1"] for line in cells)  # no token counts there
    assert "whole windows of 4,096 tokens of each document" in text and "over documents" in text
