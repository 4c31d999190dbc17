"""Coalesced collectives are called one by one, with the results of plain calls."""

from tests.support.collective_bodies import collected
from tests.support.ranks import run_ranks


def test_each_call_is_made_alone_and_returns_its_result():
    results = run_ranks(2, collected)
    for rank, result in enumerate(results):
        assert result["coalesced"] == [] and result["made while collecting"] == 0
        for waited in ("at once", "later"):
            sums, gathered, scattered = result[waited]
            assert [x.tolist() for x in sums] == [[1.0, 3.0], [21.0, 23.0]]
            assert [x.tolist() for x in gathered] == [
                [0.0, 1.0, 1.0, 2.0],
                [10.0, 11.0, 11.0, 12.0],
            ]
            assert [x.tolist() for x in scattered] == [[[1.0], [3.0]][rank], [[21.0], [23.0]][rank]]
        assert "inside another of the same group" in result["nested"]
        assert result["after an error"] == [1.0, 3.0]
