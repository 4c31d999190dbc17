"""The most likely token of every exit at every counted token of a step.

They are kept until those of the last exit are known on all stages.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_sorted.data.batches import Batch
from megatron_sorted.loss.agreement import draft_counts, following_n
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.platform.contract import Platform


@dataclass
class TopTokens:
    """Most likely tokens for one step: micro-batches x counted tokens x exits of this rank.

    Attributes:
        group: The pipeline parallel ranks.
        num_counted: {micro-batch: number of its counted tokens}.
        follow: {micro-batch: ``following_n`` of its tokens, on the host}.
        ids: {depth: {micro-batch: token ids [n], int32, on the device}}.
    """

    group: dist.ProcessGroup
    num_counted: dict[int, int] = field(default_factory=dict)
    follow: dict[int, torch.Tensor] = field(default_factory=dict)
    ids: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)

    def add_batch(self, micro_batch: int, batch: Batch) -> None:
        """Record a micro-batch whose tensors are on the host, unless another chunk has done so."""
        if micro_batch not in self.num_counted:
            self.num_counted[micro_batch] = batch.num_tokens
            self.follow[micro_batch] = following_n(
                batch.loss_mask_bs, batch.positions_bs, batch.pieces_bs
            )

    def add(self, depth: int, micro_batch: int, token_n: torch.Tensor) -> None:
        """Keep the most likely tokens of the exit at ``depth``."""
        self.ids.setdefault(depth, {})[micro_batch] = token_n

    def compare(self, ledger: Ledger, platform: Platform, last: int, num_draft_tokens: int) -> None:
        """Compare this rank's exits with the exit at depth ``last``; add the counts to ``ledger``.

        All ids are forgotten afterwards.

        Collective: with several stages one broadcast of the last exit's ids over the pipeline
            group.
        """
        order = sorted(self.num_counted)
        last_n = self._last_ids(order, platform.device(), last)
        if self.ids:
            follow_n = platform.to_device(self._follow(order))
            for depth, by_batch in sorted(self.ids.items()):
                token_n = torch.cat([by_batch[micro_batch] for micro_batch in order])
                counts = draft_counts(token_n == last_n, follow_n, num_draft_tokens)
                ledger.add_drafts(depth, counts)
        for kept in (self.num_counted, self.follow, self.ids):
            kept.clear()

    def _last_ids(self, order: list[int], device: torch.device, last: int) -> torch.Tensor:
        """Return the last exit's ids of all micro-batches.

        Collective: see ``compare``.
        """
        if last in self.ids:
            last_n = torch.cat([self.ids[last][micro_batch] for micro_batch in order])
        else:
            last_n = torch.empty(sum(self.num_counted.values()), dtype=torch.int32, device=device)
        if self.group.size() > 1:
            last_rank = dist.get_process_group_ranks(self.group)[-1]
            dist.broadcast(last_n, last_rank, group=self.group)
        return last_n

    def _follow(self, order: list[int]) -> torch.Tensor:
        """Return ``following_n`` of the micro-batches, concatenated and renumbered."""
        total, start, parts = sum(self.num_counted.values()), 0, []
        for micro_batch in order:
            own, count = self.follow[micro_batch], self.num_counted[micro_batch]
            parts.append(torch.where(own == count, total, own + start))
            start += count
        return torch.cat(parts)
