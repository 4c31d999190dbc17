"""The doctor's tables and checks of jobs, on made-up process reports, measurements and phases."""

import pytest
import torch

from megatron_sorted.doctor.finding import FAIL, OK, WARN, fail, ok, warn, worst
from megatron_sorted.doctor.network.measurements import check_measurements
from megatron_sorted.doctor.network.nodes import check_missing
from megatron_sorted.doctor.network.pairs import ACROSS, WITHIN, pair_rounds, ring_rounds
from megatron_sorted.doctor.network.process_report import (
    ProcessReport,
    check_alike,
    digest_of,
    node_names,
)
from megatron_sorted.doctor.network.rendezvous import MissingRanksError
from megatron_sorted.doctor.network.speeds import (
    check_all_reduce,
    check_messages,
    check_sums,
    published_across,
)
from megatron_sorted.doctor.network.timing import Meter, count_different
from megatron_sorted.doctor.network.watchdog import explain
from megatron_sorted.doctor.table import as_data, as_text, merge_hosts
from megatron_sorted.platform.processes import World

NAMES = {rank: f"rank {rank} on n{rank // 2}" for rank in range(8)}


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def report(rank, node=0, host="n0", device="cpu", versions=(), variables=()):
    return ProcessReport(
        rank,
        node,
        rank % 2,
        host,
        {"torch": "2.13.0", "megatron-core": "0.16.1", **dict(versions)},
        {"NCCL_DEBUG": "WARN", **dict(variables)},
        (),
        device,
        "",
    )


def test_the_table_is_aligned_and_wrapped():
    findings = [ok("python", "3.11"), fail("torch_npu", "libhccl.so " * 8, "source set_env.sh")]
    text = as_text({"n0": findings}, 80)
    lines = text.splitlines()
    assert lines[0] == "OK    python     3.11" and lines[1].startswith(
        "FAIL  torch_npu  libhccl.so"
    )
    assert all(len(line) <= 80 for line in lines) and lines[-2] == " " * 17 + "-> source set_env.sh"
    assert lines[-1] == "1 fine, 0 doubtful, 1 that will not work"


def test_hosts_with_the_same_finding_share_a_row():
    slow = warn("disk", "slow", "another")
    much, little = ok("memory", "5 GiB"), ok("memory", "4 GiB")
    by_host = {"n0": [much, ok("disk", "fast")], "n1": [little, slow], "n2": [much, slow]}
    rows = merge_hosts(by_host)
    assert [(row.hosts, row.finding.verdict) for row in rows] == [
        (("n0", "n2", "n1"), OK),
        (("n0",), OK),
        (("n1", "n2"), WARN),
    ]
    assert rows[0].finding.value == "5 GiB (on n0; others differ)"
    text = as_text(by_host, 100)
    assert "OK    memory  all     5 GiB" in text and "WARN  disk    n1, n2  slow" in text
    data = as_data(by_host, [{"operation": "all-reduce"}])
    assert (data["verdict"], len(data["findings"]), data["network"]) == (
        WARN,
        6,
        [{"operation": "all-reduce"}],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_neighbours_of_a_ring_are_paired_once_with_one_partner_at_a_time(size):
    rounds = ring_rounds(range(10, 10 + size))
    met = [frozenset(pair) for one in rounds for pair in one]
    wanted = {frozenset((10 + i, 10 + (i + 1) % size)) for i in range(size)} if size > 1 else set()
    assert len(met) == len(set(met)) and set(met) == wanted
    for one in rounds:
        members = [member for pair in one for member in pair]
        assert len(members) == len(set(members))


def test_pairs_within_and_across_nodes():
    rounds = pair_rounds({0: [0, 1], 1: [2, 3], 2: [4, 5]})
    assert all(len({pair.kind for pair in one}) == 1 for one in rounds)
    within = {(pair.first, pair.second) for one in rounds for pair in one if pair.kind == WITHIN}
    across = {
        frozenset((pair.first, pair.second))
        for one in rounds
        for pair in one
        if pair.kind == ACROSS
    }
    assert within == {(0, 1), (2, 3), (4, 5)}
    assert across == {frozenset(pair) for pair in ((0, 2), (1, 3), (2, 4), (3, 5), (4, 0), (5, 1))}
    for one in rounds:
        members = [rank for pair in one for rank in (pair.first, pair.second)]
        assert len(members) == len(set(members))
    assert pair_rounds({0: [0]}) == []


def test_processes_that_differ_are_named():
    alike = [report(rank, rank // 2, f"n{rank // 2}") for rank in range(4)]
    assert (
        only(check_alike(alike)).verdict == OK
        and "megatron-core 0.16.1" in check_alike(alike)[0].value
    )
    other = check_alike(
        [*alike[:3], report(3, 1, "n1", versions={"megatron-core": "0.12.1"}.items())]
    )
    assert only(other) == fail(
        "same megatron-core",
        "0.16.1 on 3 processes; 0.12.1 on rank 3 on n1",
        "Install the same on every node (one image, or one shared environment).",
    )
    lacking = check_alike([*alike[:3], report(3, 1, "n1", versions={"apex": "0.1"}.items())])
    assert only(lacking).value == "missing on 3 processes; 0.1 on rank 3 on n1"
    driver = check_alike(
        [
            report(0, versions={"NVIDIA driver": "580"}.items()),
            report(1, versions={"NVIDIA driver": "570"}.items()),
        ]
    )
    assert [finding.verdict for finding in driver] == [WARN, OK]
    variable = check_alike(
        [*alike[:3], report(3, 1, "n1", variables={"NCCL_ALGO": "Ring"}.items())]
    )
    assert [(finding.name, finding.verdict) for finding in variable] == [
        ("same versions", OK),
        ("same NCCL_ALGO", WARN),
    ]
    assert check_alike([report(0), report(1, device="NVIDIA L4")])[0].name == "same device"


def test_nodes_of_one_host_have_different_names():
    assert node_names([report(0, 0, "a"), report(1, 1, "b")]) == {0: "a", 1: "b"}
    assert node_names([report(0, 0, "a"), report(1, 1, "a")]) == {0: "a#0", 1: "a#1"}


def test_the_digest_of_a_package_follows_its_text(tmp_path):
    (tmp_path / "a").mkdir()
    assert digest_of(tmp_path / "a") == "missing"
    (tmp_path / "a" / "x.py").write_text("1")
    first = digest_of(tmp_path / "a")
    (tmp_path / "a" / "note.txt").write_text("not code")
    assert digest_of(tmp_path / "a") == first
    (tmp_path / "a" / "x.py").write_text("2")
    assert digest_of(tmp_path / "a") != first


def figure(operation, scope, rank, speed, total=2**24, wrong=0, peer=None, seconds=None):
    row = {
        "operation": operation,
        "scope": scope,
        "bytes": total,
        "seconds": seconds or total / speed,
        "bytes_per_second": speed,
        "wrong": wrong,
        "rank": rank,
    }
    return row if peer is None else {**row, "peer": peer}


def test_wrong_sums_fail_and_name_the_processes():
    good = [figure("all-reduce", "all processes", rank, 1e9) for rank in range(4)]
    assert only(check_sums(good, NAMES)).verdict == OK
    finding = only(check_sums([*good, figure("all-gather", WITHIN, 3, 1e9, wrong=17)], NAMES))
    assert (
        finding.verdict == FAIL
        and finding.value == "all-gather of 16 MiB: 17 wrong numbers; seen by rank 3 on n1"
    )


def test_wrong_numbers_are_counted():
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert count_different(expected.clone(), expected) == 0
    assert count_different(torch.tensor([1.0, 2.5, float("nan"), 4.0]), expected) == 2


def test_the_pattern_repeats_and_its_sums_are_exact():
    meter = Meter(torch.device("cpu"), lambda: None, None, 1.0)
    pattern = meter.pattern(600)
    assert (
        pattern[:3].tolist() == [0, 1, 2]
        and pattern[255:258].tolist() == [255, 0, 1]
        and pattern.dtype == torch.float32
    )
    largest = pattern.max() * 4096 + 4096 * 4095 // 2
    assert int(largest) == 255 * 4096 + 4096 * 4095 // 2 < 2**24


def test_all_reduces_show_latency_and_speed_of_the_slowest():
    large = [figure("all-reduce", "all processes", rank, 1e9 + rank) for rank in range(8)]
    small = [figure("all-reduce", "all processes", rank, 1e7, total=4096) for rank in range(8)]
    finding = only(check_all_reduce(large + small, "all processes"))
    assert (finding.verdict, finding.name) == (OK, "all-reduce, all processes")
    assert finding.value == "4 KiB 410 us; 16 MiB 1.00 GB/s"


def test_slow_pairs_are_named_and_links_that_fell_back():
    pairs = [figure("message", ACROSS, rank, 20e9, peer=rank + 2) for rank in range(4)]
    finding = only(check_messages(pairs, ACROSS, NAMES, 25e9))
    assert (
        finding.verdict == OK
        and "slowest: rank 0 on n0 - rank 2 on n1, 20.00 GB/s" in finding.value
    )
    finding = only(
        check_messages([*pairs, figure("message", ACROSS, 5, 2e9, peer=7)], ACROSS, NAMES, None)
    )
    assert (
        finding.verdict == WARN
        and "below half of the usual 20.00 GB/s: rank 5 on n2 - rank 7 on n3 2.00 GB/s"
        in finding.value
    )
    finding = only(check_messages(pairs, ACROSS, NAMES, 50e9))
    assert finding.verdict == WARN and "the link should do 50.00 GB/s" in finding.value
    assert not check_messages([], ACROSS, NAMES, None)


def test_the_share_of_adapters():
    assert (
        published_across([200.0] * 8, 8) == 25e9
        and published_across([400.0], 8) == 6.25e9
        and published_across([], 8) is None
    )


def test_all_measurements_are_judged_together():
    reports = [report(rank, rank // 2, f"n{rank // 2}") for rank in range(4)]
    figures = [figure("all-reduce", "all processes", rank, 1e9) for rank in range(4)]
    figures += [
        figure("message", WITHIN, 0, 1e9, peer=1),
        figure("message", WITHIN, 1, 1e9, peer=0),
    ]
    assert [finding.name for finding in check_measurements(figures, reports)] == [
        "sums",
        "all-reduce, all processes",
        "messages within a node",
    ]


def test_missing_ranks_are_named_with_their_nodes():
    error = MissingRanksError([1, 4, 5], [report(0, 0, "a"), report(2, 1, "b"), report(3, 1, "b")])
    findings = check_missing(error, World(0, 6, 0, 2, 0), 60, False)
    assert findings.value == (
        "3 of 6 did not come within 60 s: rank 1 (on a), "
        "rank 4 (node 2, no process of which came), "
        "rank 5 (node 2, no process of which came)"
    )
    assert (
        "the launcher ended the job" in check_missing(error, World(0, 6, 0, 2, 0), 60, True).value
    )


ALIKE = dict.fromkeys(range(3), (3, "all-reduce"))


@pytest.mark.parametrize(
    ("phases", "errors", "silent", "stopped", "value"),
    [
        (
            {0: (3, "all-reduce"), 1: (2, "clocks"), 2: (3, "all-reduce")},
            {},
            [],
            False,
            "in all-reduce the others wait for rank 1 on b, for 8 s",
        ),
        (ALIKE, {}, [], False, "all processes stand still in all-reduce, for 8 s"),
        (
            ALIKE,
            {},
            [1],
            False,
            "in all-reduce the others wait for rank 1 on b, without a sign of life, for 8 s",
        ),
        (
            ALIKE,
            {0: "gloo:\nclosed by peer"},
            [],
            False,
            "failed in all-reduce. rank 0 on a: gloo: closed by peer",
        ),
        (
            {0: (1, "connections"), 2: (1, "connections")},
            {},
            [],
            True,
            "the launcher ended the job, since a process had ended; "
            "in connections the others wait for rank 1 on b",
        ),
    ],
)
def test_why_a_test_ended_early(phases, errors, silent, stopped, value):
    findings = explain(
        phases, errors, silent, {0: "rank 0 on a", 1: "rank 1 on b", 2: "rank 2 on c"}, stopped, 8
    )
    assert findings.value == value and worst([findings]) == FAIL
