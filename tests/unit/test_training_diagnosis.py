"""Which rank holds the others up: heartbeats written by hand."""

from megatron_sorted.training.watch.diagnosis import Heartbeat, find_culprits


def heartbeat(
    rank,
    beat=10,
    mark=50,
    waits=True,
    phase="step 17, forward and backward",
    place="step.py:60 in run_schedule",
):
    return Heartbeat(rank, f"host{rank // 2}", 1000 + rank, beat, mark, phase, place, waits)


EARLIER = {rank: heartbeat(rank, beat=5) for rank in range(4)}


def diagnose(changes, missing=()):
    now = {rank: changes.get(rank, heartbeat(rank)) for rank in range(4) if rank not in missing}
    return find_culprits(EARLIER, now, 4)


def test_a_process_without_new_heartbeats_is_stopped_or_dead():
    assert diagnose({2: heartbeat(2, beat=5)}) == (
        [2],
        "rank 2 (host1, process 1002) is silent (stopped, dead or cut off), last seen in step 17, "
        "forward and backward",
    )


def test_a_rank_that_works_while_others_wait():
    assert diagnose(
        {
            1: heartbeat(
                1, mark=49, waits=False, phase="step 17, data", place="indexed.py:70 in document"
            )
        }
    ) == (
        [1],
        "rank 1 (host0, process 1001) does not come out of step 17, data, at indexed.py:70 in "
        "document",
    )


def test_a_rank_that_works_in_the_same_phase():
    culprits, why = diagnose({3: heartbeat(3, waits=False, place="stage.py:9 in forward")})
    assert culprits == [3] and why.endswith("at stage.py:9 in forward")


def test_a_rank_behind_that_waits_for_something_else():
    assert diagnose({0: heartbeat(0, mark=40, phase="step 14, data")}) == (
        [0],
        "rank 0 (host0, process 1000) is behind the others, in step 14, data, at step.py:60 in "
        "run_schedule",
    )


def test_ranks_that_never_sent_a_heartbeat():
    assert diagnose({}, missing=(0, 3)) == ([0, 3], "ranks 0, 3 never sent a heartbeat")


def test_all_ranks_wait():
    culprits, why = diagnose({})
    assert culprits == [] and why.startswith(
        "every rank waits for the others: rank 0 in step 17, forward and backward, at step.py:60"
    )


def test_if_all_ranks_work_none_is_to_blame():
    assert diagnose({rank: heartbeat(rank, waits=False) for rank in range(4)})[0] == []


def test_many_culprits_are_cut_short():
    now = {rank: heartbeat(rank, beat=5) for rank in range(4)} | {
        rank: heartbeat(rank, beat=5) for rank in range(4, 9)
    }
    culprits, why = find_culprits({rank: heartbeat(rank, beat=5) for rank in range(9)}, now, 9)
    assert len(culprits) == 9 and why.endswith("; and 5 more")
