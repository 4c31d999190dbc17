"""Which processes talk in pairs, arranged so that nobody has two partners at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WITHIN, ACROSS = "within a node", "across nodes"


@dataclass(frozen=True)
class RankPair:
    """Two ranks and how they are placed: within a node or across nodes."""

    first: int
    second: int
    kind: str


def ring_rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the neighbours on a ring in rounds in which each member has one partner at most; 2 rounds, or 3 if members are odd."""
    count = len(members)
    if count < 2:
        return []
    links = [(members[i], members[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    rounds = [links[0 : count - count % 2 : 2], links[1::2]]
    if count % 2:
        rounds.append(links[count - 1 :])
    return [pairs for pairs in rounds if pairs]


def pair_rounds(nodes: Mapping[int, Sequence[int]]) -> list[list[RankPair]]:
    """Return rounds of pairs: neighbours within every node, all nodes at once, then each node with the next, all local ranks at once.

    Args:
        nodes: Ranks of every node, by local rank.
    """
    rounds: list[list[RankPair]] = []
    within = [ring_rounds(ranks) for ranks in nodes.values()]
    for number in range(max(map(len, within), default=0)):
        rounds.append(
            [RankPair(*pair, WITHIN) for one in within if number < len(one) for pair in one[number]]
        )
    for links in ring_rounds(list(nodes)):
        rounds.append(
            [
                RankPair(a, b, ACROSS)
                for one, other in links
                for a, b in zip(nodes[one], nodes[other], strict=False)
            ]
        )
    return rounds
