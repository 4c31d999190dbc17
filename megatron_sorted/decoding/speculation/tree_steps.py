"""A step with a tree of drafts: grown level by level where paths are likely, cut to the likeliest nodes, verified at once."""

import torch
from torch import Tensor

from megatron_sorted.decoding.cache.state import State
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.sampling import SURENESS
from megatron_sorted.decoding.speculation.steps import DecodingBatch, StepOutput
from megatron_sorted.decoding.strategies import TreeSpeculative as TreeStrategy


class CandidateNodes:
    """Nodes that were looked at, parents before their children.

    Attributes:
        tokens, values: Of each: [b, c]; a value is the product of shares along the path.
        parents: Node of the drafter's tree that it follows; -1 for the text.
        nodes: Node of the drafter's tree that it is; -1 where it was not followed.
    """

    def __init__(self, rows: int, device: torch.device):
        self.tokens, self.parents, self.nodes = (
            torch.zeros(rows, 0, dtype=torch.long, device=device) for _ in range(3)
        )
        self.values = torch.zeros(rows, 0, device=device)

    def add(self, tokens_bk: Tensor, parents_bk: Tensor, values_bk: Tensor) -> None:
        """Add nodes that are not followed yet."""
        self.tokens, self.parents = (
            torch.cat((self.tokens, tokens_bk), 1),
            torch.cat((self.parents, parents_bk), 1),
        )
        self.nodes = torch.cat((self.nodes, torch.full_like(tokens_bk, -1)), 1)
        self.values = torch.cat((self.values, values_bk), 1)

    def best(self, count: int, first: int = 0) -> Tensor:
        """Return the places, increasing, of those with the highest values among the nodes from ``first`` on.

        Equally good ones are taken in their order, so with a node its parent is taken: a value is never above the parent's.
        """
        order = self.values[:, first:].sort(dim=1, descending=True, stable=True).indices[:, :count]
        return order.sort(dim=1).values + first


class TreeStep:
    """Drafts a tree and verifies it.

    Source: EAGLE-2 (arXiv 2406.16858, sections 4.1 and 4.2): expansion by the product of confidences, then re-ranking of all nodes.

    Args:
        batch: The texts.
        way: How the tree grows.
    """

    def __init__(self, batch: DecodingBatch, strategy: TreeStrategy):
        self.batch, self.strategy, self.measure = batch, strategy, SURENESS[strategy.measure]

    def step(self) -> list[StepOutput]:
        """Return what was added to each text."""
        batch, state, drafter = self.batch, self.batch.state, self.batch.drafter
        starts = list(state.lengths)
        by = self._draft(drafter)
        tree = drafter.tree
        size = tree.size
        nodes_bt = drafter.tokens_bc.gather(1, slots_from(starts, size, drafter.device))
        nodes, parents, levels = torch.stack((nodes_bt, tree.parents_bt, tree.levels_bt)).tolist()
        if drafter is not state:
            state.plant(nodes_bt, tree)
        state.read(batch.depth)
        slots = slots_from([start - 1 for start in starts], size + 1, state.device)
        positions = [
            [start, *(start + level for level in row)]
            for start, row in zip(starts, levels, strict=True)
        ]
        chosen = batch.sampler.choose(
            state.logits(batch.depth, slots), positions, self._seen(nodes_bt, tree.seen_btt, True)
        ).tolist()
        paths = [follow(*row) for row in zip(chosen, nodes, parents, strict=True)]
        said = []
        for row, path in enumerate(paths):
            tokens = [chosen[row][0], *(chosen[row][node + 1] for node in path)]
            said.append(
                StepOutput(
                    tokens,
                    [*(by[levels[row][node] - 1] for node in path), batch.depth],
                    size,
                    len(path),
                )
            )
        last = numbers([[one.tokens[-1]] for one in said], state.device)
        for one in {id(one): one for one in (state, drafter)}.values():
            one.accept(paths)
            one.append(last)
        batch.commit(said)
        return said

    def _draft(self, drafter: State) -> list[int]:
        """Return the exit that drafted each level, after growing and cutting the drafter's tree."""
        strategy, starts, by = self.strategy, list(drafter.lengths), []
        tree, found = drafter.begin_tree(), CandidateNodes(drafter.num_rows, drafter.device)
        slots = drafter.last_slots()
        frontier = torch.full((drafter.num_rows, 1), -1, dtype=torch.long, device=drafter.device)
        values = torch.ones(drafter.num_rows, 1, device=drafter.device)
        for level in range(1, strategy.num_levels + 1):
            depth, logits = self._read_level(drafter, slots)
            by.append(depth)
            positions = [[start + level - 1] * logits.size(1) for start in starts]
            seen = self._seen_at(drafter, frontier)
            shares, tokens = (
                self.batch.sampler.scores(logits, positions, seen)
                .softmax(-1)
                .topk(strategy.candidates, dim=-1)
            )
            first = found.tokens.size(1)
            found.add(
                tokens.flatten(1),
                frontier[:, :, None].expand_as(tokens).flatten(1),
                (values[:, :, None] * shares).flatten(1),
            )
            if level == strategy.num_levels:
                break
            followed = found.best(strategy.num_branches, first)
            size = tree.size
            nodes = size + torch.arange(followed.size(1), device=drafter.device).expand_as(followed)
            found.nodes.scatter_(1, followed, nodes)
            drafter.grow(found.tokens.gather(1, followed), found.parents.gather(1, followed))
            frontier, values = nodes, found.values.gather(1, followed)
            slots = slots_from([start + size for start in starts], followed.size(1), drafter.device)
        self._cut(drafter, found)
        return by

    def _read_level(self, drafter: State, slots_bk: Tensor) -> tuple[int, Tensor]:
        """Return the first exit that is sure of the likeliest next token of a level in every row, and its logits [b, k, v]."""
        *asked, last = self.strategy.depths
        for depth, threshold in zip(asked, self.strategy.thresholds, strict=True):
            drafter.read(depth)
            logits = drafter.logits(depth, slots_bk)
            if bool((self.measure(logits).amax(1) > threshold).all()):
                return depth, logits
        drafter.read(last)
        return last, drafter.logits(last, slots_bk)

    def _cut(self, drafter: State, found: CandidateNodes) -> None:
        """Leave the best nodes in the tree: those that were followed as they are, the others added behind them."""
        best, count = found.best(self.strategy.num_nodes), found.tokens.size(1)
        told = torch.cat((found.nodes, found.tokens, found.parents, best), 1).tolist()
        nodes, tokens, parents, chosen = (
            [row[first : first + count] for row in told] for first in range(0, 4 * count, count)
        )
        kept = [
            sorted({nodes[row][place] for place in places} - {-1})
            for row, places in enumerate(chosen)
        ]
        most = max(map(len, kept))
        # rows keep equally many: more of those that were followed, which do no harm
        kept = [
            sorted(
                [
                    *row,
                    *[node for node in range(drafter.tree.size) if node not in set(row)][
                        : most - len(row)
                    ],
                ]
            )
            for row in kept
        ]
        leaves = [
            [place for place in places if nodes[row][place] < 0]
            for row, places in enumerate(chosen)
        ]
        most = max(map(len, leaves))
        new_name = [{node: index for index, node in enumerate(row)} for row in kept]
        fill = [
            [
                *(
                    (tokens[row][place], new_name[row].get(parents[row][place], -1))
                    for place in places
                ),
                *[(tokens[row][0], -1)] * (most - len(places)),
            ]
            for row, places in enumerate(leaves)
        ]
        drafter.keep_nodes(kept)
        if most:
            both = numbers(fill, drafter.device)
            drafter.grow(both[..., 0], both[..., 1])

    def _seen_at(self, drafter: State, frontier_bk: Tensor) -> Tensor | None:
        """Return which tokens are in the text before what follows each node of the level [b, k, v]."""
        tree = drafter.tree
        if self.batch.seen_bv is None or not tree.size:
            return None if self.batch.seen_bv is None else self.batch.seen_bv[:, None]
        nodes_bt = drafter.tokens_bc.gather(1, slots_from(tree.first, tree.size, drafter.device))
        rows = tree.seen_btt.gather(1, frontier_bk[:, :, None].expand(-1, -1, tree.size))
        return self._seen(nodes_bt, rows, False)

    def _seen(self, nodes_bt: Tensor, seen_bkt: Tensor, with_text: bool) -> Tensor | None:
        """Return which tokens are in the text and among the nodes that k nodes see [b, k, v]; ``with_text`` the bare text comes first."""
        if self.batch.seen_bv is None:
            return None
        text = self.batch.seen_bv
        counts = torch.zeros(*seen_bkt.shape[:2], text.size(1), device=text.device)
        counts.scatter_add_(2, nodes_bt[:, None].expand_as(seen_bkt), seen_bkt.float())
        seen = (counts > 0) | text[:, None]
        return torch.cat((text[:, None], seen), 1) if with_text else seen


def follow(chosen: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """Return the nodes whose tokens are what was chosen after the text and then after each of them.

    Args:
        chosen: After the text, then after each node.
        tokens, parents: Of the nodes.
    """
    path, here = [], -1
    while True:
        after = next(
            (
                node
                for node, parent in enumerate(parents)
                if parent == here and tokens[node] == chosen[here + 1]
            ),
            None,
        )
        if after is None:
            return path
        path.append(after)
        here = after
