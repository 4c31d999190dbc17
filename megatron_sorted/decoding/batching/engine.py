"""The engine: tasks join and leave between rounds; a round joins the passes that they wait for.

Every task that waits for a few tokens has its pass in every round, whatever its strategy and depth.
Long prompts are read in pieces beside them, those first that have had the fewest pieces, so that
neither a long prompt nor many short ones hold up the others.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_sorted.decoding.batching.joining import join_steps
from megatron_sorted.decoding.batching.options import BatchingCounts, BatchingOptions
from megatron_sorted.decoding.batching.prefixes import (
    MIN_TOKENS,
    PrefixCache,
    common_length,
    copy_beginning,
)
from megatron_sorted.decoding.batching.task import Task
from megatron_sorted.decoding.cache.capacity import (
    REMEDY,
    as_memory_error,
    free_host_bytes,
    memory_error,
)
from megatron_sorted.decoding.cache.joined import run_joined
from megatron_sorted.decoding.cache.state import PART, DecodingState
from megatron_sorted.decoding.network import Network
from megatron_sorted.decoding.speculation.steps import DecodingBatch
from megatron_sorted.errors import MemoryExhaustedError

FEW_TOKENS = 64
"""Number of tokens up to which a pass behind a prompt is part of every round."""
ALONE = 8
"""How many times more tokens of prompts a round reads while no text is being written."""
SHARE_OF_FREE_BYTES = 0.5
UNKNOWN_FREE_BYTES = 4 << 30


class Engine:
    """Runs the passes of many tasks; one thread alone uses it.

    Args:
        network: The model.
        options: Limits of what runs at once.
        counts: Counts that it writes.
        clock: Returns the time in seconds, to share it out.

    Attributes:
        is_joined: Whether every text can be a task of its own, whose steps are joined with those
            of others.
        running: The tasks that have begun, in order.
    """

    def __init__(
        self,
        network: Network,
        options: BatchingOptions,
        counts: BatchingCounts,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.network, self.options, self.counts, self.clock = network, options, counts, clock
        self.running: list[Task] = []
        self.is_joined = network.is_native or join_steps(network)
        self.prefixes = PrefixCache(options.share_prefixes)
        self.budget = options.cache_bytes or _default_budget(network)
        counts.cache_bytes_budget = self.budget

    def check(self, task: Task) -> None:
        """Check that a task fits into the budget.

        Raises:
            MemoryExhaustedError: It does not, even alone.
        """
        if task.num_bytes > self.budget:
            raise MemoryExhaustedError(
                f"out of memory: {task.sizes.num_rows} texts of {task.sizes.capacity} tokens need "
                f"{task.num_bytes / 1e9:.3f} GB of KV cache, more than the server's "
                f"{self.budget / 1e9:.3f} GB (--cache-memory). {REMEDY}"
            )

    def begin(self, task: Task) -> bool:
        """Begin a task if there is room; return whether it was begun.

        Raises:
            MemoryExhaustedError: The system has no room for it although nothing else runs.
        """
        if len(self.running) >= self.options.max_num_seqs:
            return False
        reserved = sum(one.num_bytes for one in self.running) + task.num_bytes
        if reserved > self.budget:
            return False
        while reserved + self.prefixes.num_bytes > self.budget and self.prefixes.evict():
            pass
        free = free_host_bytes() if self.network.device.type == "cpu" else None
        while free is not None and task.num_bytes > free and self.prefixes.evict():
            free = free_host_bytes()
        if free is not None and task.num_bytes > free:
            if self.running:
                return False
            raise memory_error(
                task.sizes.num_rows,
                task.sizes.capacity,
                task.num_bytes,
                f"{free / 1e9:.2f} GB are free",
            )
        self.running.append(task)
        return True

    def begun(self, task: Task, batch: DecodingBatch) -> None:
        """Give a task's batch what is kept of its prompt; called before its first pass."""
        task.states, task.num_prompt = batch.states, max(batch.state.lengths)
        if task.prompt is None or not self.options.prefix_caching:
            return
        self._copy_kept(task)
        if not self.network.is_native:
            return
        prompt, longest = np.asarray(task.prompt), max(task.num_read, MIN_TOKENS)
        for other in self.running:
            if other is task or other.prompt is None or not other.states:
                continue
            if other.tenant != task.tenant and not self.options.share_prefixes:
                continue
            common = common_length(np.asarray(other.prompt), prompt)
            if common > longest:
                task.donor, longest = (other, common), common

    def _copy_kept(self, task: Task) -> None:
        """Copy what is kept of a task's prompt."""
        kept, length = self.prefixes.find(task.prompt, task.tenant, task.states[0])
        if kept is not None:
            self._copy(task, kept.states, length)

    def _copy(self, task: Task, states: Sequence[DecodingState], length: int) -> None:
        """Copy the first tokens of another text into a task's states, where they have them."""
        before = task.num_read
        for state in task.states:
            theirs = next((one for one in states if one.network is state.network), None)
            if theirs is not None:
                copy_beginning(theirs, state, length)
        task.num_cached += task.num_read - before

    def _waits_for_donor(self, task: Task) -> bool:
        """Return whether another task reads what a task needs; copy it once it is read."""
        if task.donor is None:
            return False
        other, length = task.donor
        if other.states and other.pending is not None and not other.num_passes[other.states[0]]:
            return True  # it reads its prompt, as deep as its own first pass needs it
        task.donor = None
        if other.states:
            self._copy(task, other.states, length)
        else:
            self._copy_kept(task)
        return False

    def round(self) -> None:
        """Run the passes that the tasks wait for, and the tasks to their next ones."""
        for task in [task for task in self.running if task.passes is None]:
            self._advance(task, None)
        groups: dict[int, list[tuple[Task, int]]] = {}
        for task, piece in self._choose():
            groups.setdefault(id(task.pending.state.network), []).append((task, piece))
        for members in groups.values():
            # the end of one task may be that of others, such as texts of the same request
            group = [one for one in members if one[0].pending is not None]
            for (task, _), logits in zip(group, self._run(group), strict=True):
                if task.pending is None:
                    continue
                if isinstance(logits, BaseException):
                    self.end(task, logits)
                elif logits is not None:
                    self._advance(task, logits)
        self.counts.rounds += bool(groups)

    def count(self) -> None:
        """Write what is so now to the counts."""
        self.counts.texts_running = len(self.running)
        self.counts.cache_bytes_running = sum(task.num_bytes for task in self.running)
        self.counts.cache_bytes_kept = self.prefixes.num_bytes

    def end(self, task: Task, error: BaseException | None = None) -> None:
        """End a task; what it has computed is kept if nothing went wrong."""
        if task not in self.running:
            return
        self.running.remove(task)
        self.counts.layers_run += task.num_layers
        keeps = self.options.prefix_caching and task.prompt is not None and error is None
        try:
            if keeps and task.states and task.states[0].tree is None:
                self.prefixes.keep(task.states, task.tenant, task.num_prompt)
                while self.prefixes.num_bytes > self.budget and self.prefixes.evict():
                    pass
        finally:
            task.close()
            task.ended(task, error)

    def _choose(self) -> list[tuple[Task, int]]:
        """Return the tasks that have a pass in this round, and the tokens it may process."""
        few, many = [], []
        for task in self.running:
            if self._waits_for_donor(task):
                continue
            missing = task.pending.num_missing
            if missing <= FEW_TOKENS and task.num_passes[task.pending.state]:
                few.append((task, max(missing, 1)))
            else:
                many.append((missing, task))
        room = self.options.prefill_tokens * (1 if few else ALONE)
        # a prompt that comes now has had as many turns as the one that has had the fewest
        fewest = min((task.num_turns for _, task in many if task.num_turns), default=0)
        for _, task in many:
            task.num_turns = max(task.num_turns, fewest)
        many.sort(key=lambda one: one[1].num_turns)
        for missing, task in many:
            if room <= 0:
                break
            # torch's numbers depend on the pieces, which are therefore always the same
            piece = min(missing, room) if self.network.is_native else PART
            few.append((task, piece))
            task.num_turns += 1
            room -= piece
        return few

    def _run(self, group: Sequence[tuple[Task, int]]) -> list[Tensor | BaseException | None]:
        """Return the logits of the passes of a network; None of those that are not complete."""
        if not group:
            return []
        passes = [task.pending for task, _ in group]
        pieces = [piece for _, piece in group]
        began = self.clock()
        try:
            with as_memory_error():
                joined = run_joined(passes, pieces)
        except Exception as error:
            if len(group) == 1:
                return [error]
            return [self._run([one])[0] for one in group]  # the others may have room
        seconds, total = self.clock() - began, sum(joined.num_layers) or 1
        for (task, _), layers in zip(group, joined.num_layers, strict=True):
            task.num_layers += layers
            task.seconds += seconds * layers / total
        return joined.logits

    def _advance(self, task: Task, logits: Tensor | None) -> None:
        """Run a task to its next pass, or to its end."""
        began = self.clock()
        try:
            with as_memory_error():
                goes_on = task.advance(logits)
        except Exception as error:
            task.seconds += self.clock() - began
            self.end(task, error)
            if isinstance(error, MemoryExhaustedError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            return
        task.seconds += self.clock() - began
        if not goes_on:
            self.end(task)


def _default_budget(network: Network) -> int:
    """Return a share of the memory that is free now."""
    if network.device.type == "cpu":
        free = free_host_bytes()
    else:
        free = torch.accelerator.get_memory_info(network.device)[0]
    return UNKNOWN_FREE_BYTES if free is None else int(SHARE_OF_FREE_BYTES * free)
