"""A tree of drafted tokens behind a text: the parents of its nodes, and its attention mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DraftTree:
    """The draft trees of all rows, with nodes in the order of their cache slots.

    A parent comes before its children. All rows have the same number of nodes; smaller trees are
    padded.

    Attributes:
        first: Slot of node 0, by row; all nodes attend to the text before it.
        parents_bt: Parent of each node; -1 for the text itself.
        levels_bt: Level of each node: 1 for children of the text.
        seen_btt: Whether node i attends to node j: j is i or an ancestor of it.
    """

    first: list[int]
    parents_bt: Tensor
    levels_bt: Tensor
    seen_btt: Tensor

    @property
    def size(self) -> int:
        """Return the number of nodes of a row."""
        return self.parents_bt.size(1)

    @classmethod
    def of(cls, first: Sequence[int], device: torch.device) -> "DraftTree":
        """Return a tree without nodes behind texts with lengths ``first``."""
        rows = len(first)
        return cls(
            list(first),
            torch.zeros(rows, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, dtype=torch.long, device=device),
            torch.zeros(rows, 0, 0, dtype=torch.bool, device=device),
        )

    def grow(self, parents_bk: Tensor) -> None:
        """Add k nodes to every row; their parents are in the tree already."""
        rows, k = parents_bk.shape
        old, device = self.size, parents_bk.device
        follows_text, parents = parents_bk < 0, parents_bk.clamp(min=0)
        levels = torch.ones_like(parents_bk)
        seen = torch.zeros(rows, k, old + k, dtype=torch.bool, device=device)
        if old:
            levels = (self.levels_bt.gather(1, parents) + 1).masked_fill(follows_text, 1)
            ancestors = self.seen_btt.gather(1, parents[:, :, None].expand(-1, -1, old))
            seen[:, :, :old] = ancestors & ~follows_text[:, :, None]
        seen[:, :, old:] = torch.eye(k, dtype=torch.bool, device=device)
        grown = torch.zeros(rows, old + k, old + k, dtype=torch.bool, device=device)
        grown[:, :old, :old], grown[:, old:] = self.seen_btt, seen
        self.parents_bt, self.seen_btt = torch.cat((self.parents_bt, parents_bk), 1), grown
        self.levels_bt = torch.cat((self.levels_bt, levels), 1)

    def select(self, nodes_bm: Tensor) -> None:
        """Keep these nodes of every row, increasing; the parents of kept nodes are kept too."""
        size, m = self.size, nodes_bm.size(1)
        new_index = torch.full(
            (nodes_bm.size(0), size), -1, dtype=torch.long, device=nodes_bm.device
        )
        new_index.scatter_(1, nodes_bm, torch.arange(m, device=nodes_bm.device).expand_as(nodes_bm))
        parents = self.parents_bt.gather(1, nodes_bm)
        self.parents_bt = new_index.gather(1, parents.clamp(min=0)).masked_fill(parents < 0, -1)
        self.levels_bt = self.levels_bt.gather(1, nodes_bm)
        rows = self.seen_btt.gather(1, nodes_bm[:, :, None].expand(-1, -1, size))
        self.seen_btt = rows.gather(2, nodes_bm[:, None].expand(-1, m, -1))
