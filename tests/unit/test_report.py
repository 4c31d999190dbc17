"""What tools/report.py reads, draws and writes, from files written by the trainer's own writer."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sorted.commands import report
from megatron_sorted.errors import DataError
from megatron_sorted.monitoring.json_lines import JsonLines
from megatron_sorted.monitoring.report import EvaluationReport, ExitNumbers
from megatron_sorted.reporting.run_page import exit_rows
from megatron_sorted.reporting.run_picture import depth_colours, panels_of, reach_of, smooth
from megatron_sorted.reporting.run_reports import Curve, read_run
from tests.unit.test_monitoring_console import STEP


def write_run(
    folder: Path, depths=(2, 8), steps=(1, 2, 3), sets=("valid_text_document",), **more
) -> Path:
    writer = JsonLines(folder / "metrics.jsonl")
    writer.start()
    for step in steps:
        writer.write(
            replace(
                STEP,
                step=step,
                nonfinite=1,
                exits={d: ExitNumbers(10.0 / step / d, 0.5, 0.25, **more) for d in depths},
            )
        )
    for name in sets:
        writer.write(
            EvaluationReport(
                steps[-1],
                name,
                1.0,
                9,
                {d: ExitNumbers(1.0 / d, 0.25, exact_match=0.125) for d in depths},
            )
        )
    writer.close()
    return folder


def write_costs(folder: Path, depths=(2, 8)) -> None:
    costs = {str(d): {"parameters": 1000 * d, "flops_per_token": 2e6 * d} for d in depths}
    (folder / "evaluation.json").write_text(
        json.dumps({"run": "x", "step": 3, "exits": costs, "sets": {}})
    )


def size_of(picture: Path) -> tuple[int, int]:
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_picture_and_page_of_two_runs(tmp_path, capsys):
    first = write_run(tmp_path / "a<b>", agreement=0.5, accept_length=1.5, grad_norm=0.1)
    write_costs(first)
    (first / "iter_0000002").mkdir()
    (first / "iter_0000002" / "run.json").write_text(
        json.dumps({"settings": {"lr": 0.125, "save": "<script>", "load": None}})
    )
    second = write_run(tmp_path / "second", depths=(4,), sets=())
    report.main(
        [str(first), str(second / "metrics.jsonl"), "--output", str(tmp_path / "new" / "out.html")]
    )
    assert (
        capsys.readouterr().out
        == f"picture: {tmp_path / 'new' / 'out.png'}\npage: {tmp_path / 'new' / 'out.html'}\n"
    )
    assert size_of(tmp_path / "new" / "out.png")[0] == 1650
    page = (tmp_path / "new" / "out.html").read_text()
    assert (
        "<h1>a&lt;b&gt; and second</h1>" in page
        and "&lt;script&gt;" in page
        and "<script" not in page
    )
    assert "<td>lr</td><td>0.125</td>" in page and "<td>load</td>" not in page
    # nothing outside the file
    assert (
        set(re.findall(r'(?:src|href)="([^"]{0,22})', page)) == {"data:image/png;base64,"}
        and "@import" not in page
    )
    # by hand: 10 nats over step 3 and depth 8; e to that
    assert (
        "<tr><td>8</td><td>0.4167</td><td>1.52</td><td>50.0 %</td><td>50.0 "
        "%</td><td>1.50</td><td>0.25</td><td>0.1</td>" in page
    )
    assert "<td>8,000</td><td>1.600e+07</td>" in page
    assert page.count("<td>3</td></tr>") == 2  # three steps were not finite, in each run


def test_panels_are_those_with_numbers(tmp_path):
    bare = read_run(write_run(tmp_path / "bare", sets=()))
    assert [panel.title for panel in panels_of([bare])] == [
        "Loss of every exit",
        "Loss over depth, last report of training",
        "Learning rate",
        "Gradient norm before clipping",
    ]
    rich = write_run(tmp_path / "rich", agreement=0.5)
    write_costs(rich)
    titles = [panel.title for panel in panels_of([bare, read_run(rich)])]
    assert (
        titles[1:4]
        == [
            "Loss over depth, last evaluation",
            "Loss over forward operations of the sub-model",
            "Agreement with the last exit (share of tokens)",
        ]
        and len(titles) == 6
    )


@pytest.mark.parametrize(("depths", "steps"), [((8,), (1,)), (range(1, 41), range(1, 60))])
def test_one_to_forty_exits_can_be_drawn(tmp_path, depths, steps):
    report.main(
        [
            str(write_run(tmp_path / "run", depths=depths, steps=steps)),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert size_of(tmp_path / "out.png")[1] > 900


def test_a_resumed_run_counts_repeated_steps_once(tmp_path):
    folder = write_run(tmp_path / "run", steps=(1, 2, 3, 4))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    write_run(folder, steps=(3, 4, 5), depths=(2,))
    run = read_run(folder)
    assert run.exit_curve(2, "loss") == Curve([1, 2, 3, 4, 5], [5.0, 2.5, 10 / 3 / 2, 1.25, 1.0])
    assert run.exit_curve(8, "loss").steps == [1, 2] and run.last_step == 5
    assert run.exit_curve(2, "loss", "valid_text_document") == Curve([5], [0.5])
    assert run.depths == [2, 8] and run.curve("mfu") == Curve([], [])
    # an exit that was not drawn in the last steps is in the table with its last number
    titles, rows = exit_rows(run, None)
    assert titles == ["exit", "loss", "perplexity", "tokens right", "coefficient"]
    assert rows == [
        ["2", "1.0000", "2.72", "50.0 %", "0.25"],
        ["8", "0.6250", "1.87", "50.0 %", "0.25"],
    ]


def test_numbers_that_were_not_finite_are_gaps(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.start()
    for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0)):
        writer.write(replace(STEP, step=step, exits={4: ExitNumbers(loss, 0.5, 1.0)}))
    writer.close()
    assert read_run(tmp_path).exit_curve(4, "loss") == Curve([1, 3], [2.0, 1.0])


def test_smoothing():
    curve = Curve([1, 2, 3, 4, 5], [1.0, 2.0, 6.0, 0.0, 5.0])
    assert smooth(curve, 1).values == [1.0, 3.0, pytest.approx(8 / 3), pytest.approx(11 / 3), 5.0]
    assert smooth(curve, 2).values[2] == pytest.approx(14 / 5) and smooth(curve, 0) == curve
    line = Curve(list(range(200)), [3.0 * i for i in range(200)])
    assert smooth(line, reach_of(200)).values == pytest.approx(
        line.values
    )  # a straight line stays where it is
    assert reach_of(49) == 0


def test_deeper_exits_are_darker():
    colours = depth_colours(range(1, 41))
    light = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue, _ in colours.values()]
    assert light == sorted(light, reverse=True) and light[0] < 0.8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no metrics.jsonl. Give the --save directory of a run"),
        ("", "metrics.jsonl: no report yet"),
        ('{"kind": "tra', "metrics.jsonl: no report yet"),
        ("a,b\n1,2\n", "metrics.jsonl:1: not_json"),
        ('{"loss": 1.0}\n', "line 1: not a report of a run. Give"),
        ('{"kind": "train", "step": 1, "exits": {"a": {"loss": 1}}}\n', "line 1: not a report"),
        ('{"kind": "train", "step": 1, "exits": {"1": {}}}\n', "line 1: not a report"),
        (
            '{"kind": "evaluation", "step": 1, "exits": {"1": {"loss": 1}}}\n',
            "line 1: not a report",
        ),
    ],
)
def test_mistakes(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        read_run(tmp_path)
    assert message in str(error.value)


def test_more_mistakes(tmp_path):
    with pytest.raises(DataError, match="absent: no such file or directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(
        DataError, match=r"7 runs are more than one picture can distinguish. Give at most 6"
    ):
        report.main([str(tmp_path)] * 7)
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("[1")  # what adds to the report may be damaged
    (folder / "iter_0000001").mkdir()
    (folder / "iter_0000001" / "manifest.json").write_text('{"settings": 3}')
    run = read_run(folder)
    assert (run.costs, run.settings) == ({}, {})
