"""Who holds the others up: signs written by hand."""

from megatron_sorted.training.watch.diagnosis import Sign, find_culprits


def sign(
    rank,
    beat=10,
    mark=50,
    waits=True,
    phase="step 17, forward and backward",
    place="step.py:60 in run_schedule",
):
    return Sign(rank, f"host{rank // 2}", 1000 + rank, beat, mark, phase, place, waits)


EARLIER = {rank: sign(rank, beat=5) for rank in range(4)}


def judge(changes, missing=()):
    now = {rank: changes.get(rank, sign(rank)) for rank in range(4) if rank not in missing}
    return find_culprits(EARLIER, now, 4)


def test_a_process_without_new_signs_is_stopped_or_dead():
    assert judge({2: sign(2, beat=5)}) == (
        [2],
        "rank 2 (host1, process 1002) is silent (stopped, dead or cut off), last seen in step 17, forward and backward",
    )


def test_a_rank_that_works_while_others_wait():
    assert judge(
        {1: sign(1, mark=49, waits=False, phase="step 17, data", place="indexed.py:70 in document")}
    ) == (
        [1],
        "rank 1 (host0, process 1001) does not come out of step 17, data, at indexed.py:70 in document",
    )


def test_a_rank_that_works_in_the_same_phase():
    culprits, why = judge({3: sign(3, waits=False, place="stage.py:9 in forward")})
    assert culprits == [3] and why.endswith("at stage.py:9 in forward")


def test_a_rank_behind_that_waits_for_something_else():
    assert judge({0: sign(0, mark=40, phase="step 14, data")}) == (
        [0],
        "rank 0 (host0, process 1000) is behind the others, in step 14, data, at step.py:60 in run_schedule",
    )


def test_ranks_that_never_spoke():
    assert judge({}, missing=(0, 3)) == ([0, 3], "ranks 0, 3 never gave a sign")


def test_everybody_waits():
    culprits, why = judge({})
    assert culprits == [] and why.startswith(
        "every rank waits for the others: rank 0 in step 17, forward and backward, at step.py:60"
    )


def test_everybody_works_means_nobody_is_to_blame_alone():
    assert judge({rank: sign(rank, waits=False) for rank in range(4)})[0] == []


def test_many_culprits_are_cut_short():
    now = {rank: sign(rank, beat=5) for rank in range(4)} | {
        rank: sign(rank, beat=5) for rank in range(4, 9)
    }
    culprits, why = find_culprits({rank: sign(rank, beat=5) for rank in range(9)}, now, 9)
    assert len(culprits) == 9 and why.endswith("; and 5 more")
