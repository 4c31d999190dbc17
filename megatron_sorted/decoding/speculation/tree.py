"""A tree of drafted tokens behind a text: which node follows which, and which it sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DraftTree:
    """Nodes of every row in the order of their slots; a parent comes before its children. Rows have equally many, some filled up.

    Attributes:
        first: By row, the slot of node 0: the text before it is seen by all nodes.
        parents_bt: Node that a node follows; -1 for the text itself.
        levels_bt: Nodes from the text to it, itself included: 1 for those that follow the text.
        seen_btt: Whether node i sees node j: j is i or one it descends from.
    """

    first: list[int]
    parents_bt: Tensor
    levels_bt: Tensor
    seen_btt: Tensor

    @property
    def size(self) -> int:
        """Nodes of a row."""
        return self.parents_bt.size(1)

    @classmethod
    def of(cls, first: Sequence[int], device: torch.device) -> "DraftTree":
        """Return a tree without nodes behind texts of lengths ``first``."""
        rows = len(first)
        return cls(
            list(first),
            torch.zeros(rows, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, 0, dtype=torch.bool, device=device),
        )

    def grow(self, parents_bk: Tensor) -> None:
        """Add k nodes to every row, whose parents are in the tree."""
        rows, k = parents_bk.shape
        old, device = self.size, parents_bk.device
        follows_text = parents_bk < 0
        place = parents_bk.clamp(min=0)
        levels, seen = (
            torch.ones_like(parents_bk),
            torch.zeros(rows, k, old + k, dtype=torch.bool, device=device),
        )
        if old:
            levels = (self.levels_bt.gather(1, place) + 1).masked_fill(follows_text, 1)
            above = self.seen_btt.gather(1, place[:, :, None].expand(-1, -1, old))
            seen[:, :, :old] = above & ~follows_text[:, :, None]
        seen[:, :, old:] = torch.eye(k, dtype=torch.bool, device=device)
        grown = torch.zeros(rows, old + k, old + k, dtype=torch.bool, device=device)
        grown[:, :old, :old], grown[:, old:] = self.seen_btt, seen
        self.parents_bt, self.seen_btt = torch.cat((self.parents_bt, parents_bk), 1), grown
        self.levels_bt = torch.cat((self.levels_bt, levels), 1)

    def select(self, nodes_bm: Tensor) -> None:
        """Keep these nodes of every row, increasing; with a node its parent is kept."""
        size, m = self.size, nodes_bm.size(1)
        new_name = torch.full(
            (nodes_bm.size(0), size), -1, dtype=torch.long, device=nodes_bm.device
        )
        new_name.scatter_(1, nodes_bm, torch.arange(m, device=nodes_bm.device).expand_as(nodes_bm))
        parents = self.parents_bt.gather(1, nodes_bm)
        self.parents_bt = new_name.gather(1, parents.clamp(min=0)).masked_fill(parents < 0, -1)
        self.levels_bt = self.levels_bt.gather(1, nodes_bm)
        rows = self.seen_btt.gather(1, nodes_bm[:, :, None].expand(-1, -1, size))
        self.seen_btt = rows.gather(2, nodes_bm[:, None].expand(-1, m, -1))
