"""Pairs of ranks that exchange messages, in rounds in which each rank has one partner at most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

WITHIN, ACROSS = "within a node", "across nodes"


@dataclass(frozen=True)
class RankPair:
    """Two ranks and their placement: within a node or across nodes."""

    first: int
    second: int
    kind: str


def ring_rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the neighbours on a ring, in rounds in which each member has one partner at most.

    >>> ring_rounds([0, 1, 2, 3])
    [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]
    """
    count = len(members)
    if count < 2:
        return []
    links = [(members[i], members[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    rounds = [links[0 : count - count % 2 : 2], links[1::2]]
    if count % 2:
        rounds.append(links[count - 1 :])
    return [pairs for pairs in rounds if pairs]


def pair_rounds(nodes: Mapping[int, Sequence[int]]) -> list[list[RankPair]]:
    """Return rounds of pairs: neighbours within every node, then between neighbouring nodes.

    In a round, all nodes exchange messages at once; between nodes, all local ranks do.

    Args:
        nodes: Ranks of every node, by local rank.
    """
    rounds: list[list[RankPair]] = []
    within = [ring_rounds(ranks) for ranks in nodes.values()]
    for links_of_nodes in zip_longest(*within, fillvalue=()):
        rounds.append([RankPair(*link, WITHIN) for links in links_of_nodes for link in links])
    for links in ring_rounds(list(nodes)):
        rounds.append(
            [
                RankPair(first, second, ACROSS)
                for one, other in links
                for first, second in zip(nodes[one], nodes[other], strict=False)
            ]
        )
    return rounds
