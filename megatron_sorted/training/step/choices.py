"""The most likely token of every exit at every counted token of a step, kept until the last exit's are known on all stages."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sorted.loss.agreement import draft_counts, following_n
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.platform.contract import Platform


@dataclass
class Choices:
    """Int32 ids on the device: micro-batches x counted tokens x exits of this rank, for one step.

    Attributes:
        num_counted: {micro-batch: its counted tokens}.
        follow: {micro-batch: ``following_n`` of its tokens, on the host}.
        ids: {depth: {micro-batch: ids [n]}}.
    """

    num_counted: dict[int, int] = field(default_factory=dict)
    follow: dict[int, torch.Tensor] = field(default_factory=dict)
    ids: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)

    def add_batch(
        self,
        micro_batch: int,
        loss_mask_bs: torch.Tensor,
        positions_bs: torch.Tensor,
        segments_bs: torch.Tensor | None,
    ) -> None:
        """Record a micro-batch, whose tensors still lie on the host; a second time changes nothing."""
        if micro_batch not in self.num_counted:
            self.num_counted[micro_batch] = int((loss_mask_bs != 0).sum())
            self.follow[micro_batch] = following_n(loss_mask_bs, positions_bs, segments_bs)

    def add(self, depth: int, micro_batch: int, choice_n: torch.Tensor) -> None:
        """Keep the ids that the exit at ``depth`` chose."""
        self.ids.setdefault(depth, {})[micro_batch] = choice_n

    def compare(self, ledger: Ledger, platform: Platform, last: int, num_draft_tokens: int) -> None:
        """Compare every exit of this rank with the exit at depth ``last``, add the counts to the ledger, and forget all ids.

        Collective: with several stages one broadcast of the last exit's ids over the pipeline group.
        """
        order = sorted(self.num_counted)
        last_n = self._last_ids(order, platform.device(), last)
        if self.ids:
            follow_n = platform.to_device(self._follow(order))
            for depth, by_batch in sorted(self.ids.items()):
                chosen_n = torch.cat([by_batch[micro_batch] for micro_batch in order])
                ledger.add_drafts(
                    depth, draft_counts(chosen_n == last_n, follow_n, num_draft_tokens)
                )
        self.clear()

    def _last_ids(self, order: list[int], device: torch.device, last: int) -> torch.Tensor:
        """Return the last exit's ids of all micro-batches.

        Collective: see ``compare``.
        """
        if last in self.ids:
            last_n = torch.cat([self.ids[last][micro_batch] for micro_batch in order])
        else:
            last_n = torch.empty(sum(self.num_counted.values()), dtype=torch.int32, device=device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(last_n, source, group=parallel_state.get_pipeline_model_parallel_group())
        return last_n

    def _follow(self, order: list[int]) -> torch.Tensor:
        """Return the micro-batches' ``following_n`` one after another, numbered through."""
        total, start, parts = sum(self.num_counted.values()), 0, []
        for micro_batch in order:
            own, count = self.follow[micro_batch], self.num_counted[micro_batch]
            parts.append(torch.where(own == count, total, own + start))
            start += count
        return torch.cat(parts)

    def clear(self) -> None:
        """Forget everything."""
        for kept in (self.num_counted, self.follow, self.ids):
            kept.clear()
