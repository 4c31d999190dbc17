"""A step with a draft tree, grown along likely paths, pruned to its best nodes, then verified."""

from collections.abc import Generator

import torch
from torch import Tensor

from megatron_sorted.confidence import CONFIDENCE
from megatron_sorted.decoding.cache.joined import ForwardPass
from megatron_sorted.decoding.cache.state import DecodingState
from megatron_sorted.decoding.cache.transfer import numbers, slots_from
from megatron_sorted.decoding.speculation.steps import (
    Chain,
    DecodingBatch,
    StepOutput,
    Steps,
    run_step,
)
from megatron_sorted.decoding.strategies import TreeSpeculative


class CandidateNodes:
    """The candidates for nodes of a draft tree, parents before their children; all [b, c].

    Attributes:
        tokens: Token of each candidate.
        values: Product of probabilities along the path to it.
        parents: Node of the parent in the drafter's tree; -1 for the text.
        nodes: Node of the candidate in the drafter's tree; -1 if it was not expanded.
    """

    def __init__(self, rows: int, device: torch.device):
        self.tokens, self.parents, self.nodes = (
            torch.zeros(rows, 0, dtype=torch.long, device=device) for _ in range(3)
        )
        self.values = torch.zeros(rows, 0, device=device)

    def add(self, tokens_bk: Tensor, parents_bk: Tensor, values_bk: Tensor) -> None:
        """Add candidates, none of them expanded yet."""
        self.tokens = torch.cat((self.tokens, tokens_bk), 1)
        self.parents = torch.cat((self.parents, parents_bk), 1)
        self.nodes = torch.cat((self.nodes, torch.full_like(tokens_bk, -1)), 1)
        self.values = torch.cat((self.values, values_bk), 1)

    def best(self, count: int, first: int = 0) -> Tensor:
        """Return the increasing indices of the highest values among candidates from ``first`` on.

        Ties are taken in order. A value is never above its parent's, so parents are taken too.
        """
        order = self.values[:, first:].sort(dim=1, descending=True, stable=True).indices[:, :count]
        return order.sort(dim=1).values + first


class TreeStep:
    """A step in which exits draft a tree and the full model verifies it.

    Source: EAGLE-2 (arXiv 2406.16858, sections 4.1 and 4.2): expansion by the product of
    probabilities, then re-ranking of all nodes.

    Args:
        batch: The texts.
        strategy: How the tree grows.
    """

    def __init__(self, batch: DecodingBatch, strategy: TreeSpeculative):
        self.batch, self.strategy, self.measure = batch, strategy, CONFIDENCE[strategy.measure]

    def step(self) -> list[StepOutput]:
        """Return the tokens that were added to each text."""
        return run_step(self.passes())

    def passes(self) -> Steps:
        """Yield the passes of a step; return the tokens that were added to each text."""
        batch, state, drafter = self.batch, self.batch.state, self.batch.drafter
        if not batch.draft_length(self.strategy.num_levels):
            return (yield from Chain(batch, self.strategy.depths, None, 0).passes())
        starts = list(state.lengths)
        by = yield from self._draft(drafter)
        tree = drafter.tree
        size = tree.size
        nodes_bt = drafter.tokens_bc.gather(1, slots_from(starts, size, drafter.device))
        nodes, parents, levels = torch.stack((nodes_bt, tree.parents_bt, tree.levels_bt)).tolist()
        if drafter is not state:
            state.plant(nodes_bt, tree)
        slots = slots_from([start - 1 for start in starts], size + 1, state.device)
        logits_bnv = yield ForwardPass(state, batch.depth, slots)
        positions = [
            [start, *(start + level for level in row)]
            for start, row in zip(starts, levels, strict=True)
        ]
        chosen = batch.sampler.choose(
            logits_bnv, positions, self._seen(nodes_bt, tree.seen_btt, True)
        ).tolist()
        paths = [accepted_path(*row) for row in zip(chosen, nodes, parents, strict=True)]
        outputs = []
        for row, path in enumerate(paths):
            tokens = [chosen[row][0], *(chosen[row][node + 1] for node in path)]
            depths = [*(by[levels[row][node] - 1] for node in path), batch.depth]
            outputs.append(StepOutput(tokens, depths, size, len(path)))
        last = numbers([[one.tokens[-1]] for one in outputs], state.device)
        for one in batch.states:
            one.accept(paths)
            one.append(last)
        batch.commit(outputs)
        return outputs

    def _draft(self, drafter: DecodingState) -> Generator[ForwardPass, Tensor, list[int]]:
        """Grow and prune the drafter's tree; return the exit that drafted each level."""
        strategy, starts, by = self.strategy, list(drafter.lengths), []
        tree, candidates = drafter.begin_tree(), CandidateNodes(drafter.num_rows, drafter.device)
        slots = drafter.last_slots()
        frontier = torch.full((drafter.num_rows, 1), -1, dtype=torch.long, device=drafter.device)
        values = torch.ones(drafter.num_rows, 1, device=drafter.device)
        for level in range(1, strategy.num_levels + 1):
            depth, logits = yield from self._read_level(drafter, slots)
            by.append(depth)
            positions = [[start + level - 1] * logits.size(1) for start in starts]
            seen = self._seen_at(drafter, frontier)
            scores = self.batch.sampler.scores(logits, positions, seen)
            shares, tokens = scores.softmax(-1).topk(strategy.candidates, dim=-1)
            first = candidates.tokens.size(1)
            candidates.add(
                tokens.flatten(1),
                frontier[:, :, None].expand_as(tokens).flatten(1),
                (values[:, :, None] * shares).flatten(1),
            )
            if level == strategy.num_levels:
                break
            best = candidates.best(strategy.num_branches, first)
            size, width = tree.size, best.size(1)
            frontier = size + torch.arange(width, device=drafter.device).expand_as(best)
            candidates.nodes.scatter_(1, best, frontier)
            drafter.grow(candidates.tokens.gather(1, best), candidates.parents.gather(1, best))
            values = candidates.values.gather(1, best)
            slots = slots_from([start + size for start in starts], width, drafter.device)
        self._prune(drafter, candidates)
        return by

    def _read_level(
        self, drafter: DecodingState, slots_bk: Tensor
    ) -> Generator[ForwardPass, Tensor, tuple[int, Tensor]]:
        """Return the exit that drafts a level, and its logits [b, k, v].

        It is the first exit whose confidence in the level's most likely node is above its threshold
        in every row, else the last one.
        """
        *early, last = self.strategy.depths
        for depth, threshold in zip(early, self.strategy.thresholds, strict=True):
            logits = yield ForwardPass(drafter, depth, slots_bk)
            if bool((self.measure(logits).amax(1) > threshold).all()):
                return depth, logits
        return last, (yield ForwardPass(drafter, last, slots_bk))

    def _prune(self, drafter: DecodingState, candidates: CandidateNodes) -> None:
        """Reduce the tree to the best candidates; those that were not expanded become leaves."""
        best, count = candidates.best(self.strategy.num_nodes), candidates.tokens.size(1)
        columns = (candidates.nodes, candidates.tokens, candidates.parents, best)
        on_host = torch.cat(columns, 1).tolist()  # one copy from the device for all
        nodes, tokens, parents, chosen = (
            [row[first : first + count] for row in on_host] for first in range(0, 4 * count, count)
        )
        kept = [
            sorted({nodes[row][at] for at in places} - {-1}) for row, places in enumerate(chosen)
        ]
        most = max(map(len, kept))
        for row, inner in enumerate(kept):
            # rows keep the same number of nodes: more expanded ones, which do no harm
            others = [node for node in range(drafter.tree.size) if node not in inner]
            kept[row] = sorted([*inner, *others[: most - len(inner)]])
        leaves = [[at for at in places if nodes[row][at] < 0] for row, places in enumerate(chosen)]
        most = max(map(len, leaves))
        added = []
        for row, places in enumerate(leaves):
            new_index = {node: index for index, node in enumerate(kept[row])}
            pairs = [(tokens[row][at], new_index.get(parents[row][at], -1)) for at in places]
            added.append([*pairs, *[(tokens[row][0], -1)] * (most - len(places))])
        drafter.keep_nodes(kept)
        if most:
            both = numbers(added, drafter.device)
            drafter.grow(both[..., 0], both[..., 1])

    def _seen_at(self, drafter: DecodingState, frontier_bk: Tensor) -> Tensor | None:
        """Return which tokens precede the children of each node of a level, [b, k, v]."""
        tree = drafter.tree
        if self.batch.seen_bv is None or not tree.size:
            return None if self.batch.seen_bv is None else self.batch.seen_bv[:, None]
        nodes_bt = drafter.tokens_bc.gather(1, slots_from(tree.first, tree.size, drafter.device))
        rows = tree.seen_btt.gather(1, frontier_bk[:, :, None].expand(-1, -1, tree.size))
        return self._seen(nodes_bt, rows, False)

    def _seen(self, nodes_bt: Tensor, seen_bkt: Tensor, with_text: bool) -> Tensor | None:
        """Return which tokens are in the text or among the nodes that k nodes attend to, [b, k, v].

        ``with_text`` puts a row for the text alone first.
        """
        if self.batch.seen_bv is None:
            return None
        text = self.batch.seen_bv
        counts = torch.zeros(*seen_bkt.shape[:2], text.size(1), device=text.device)
        counts.scatter_add_(2, nodes_bt[:, None].expand_as(seen_bkt), seen_bkt.float())
        seen = (counts > 0) | text[:, None]
        return torch.cat((text[:, None], seen), 1) if with_text else seen


def accepted_path(chosen: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """Return the path of nodes whose tokens the full model chose.

    Args:
        chosen: The full model's token after the text, then after each node.
        tokens, parents: Token and parent of each node.

    >>> accepted_path([5, 7, 9], tokens=[5, 7], parents=[-1, 0])  # both drafted tokens
    [0, 1]
    """
    path, here = [], -1
    while True:
        children = (node for node, parent in enumerate(parents) if parent == here)
        here = next((node for node in children if tokens[node] == chosen[here + 1]), None)
        if here is None:
            return path
        path.append(here)
