"""Saving in the background: training waits only until its state is copied to host memory.

A save has two halves. In the first, on the main thread, the state is described and copied. In the
second, on a thread with a separate process group, every rank writes and verifies its shards, and
rank 0 adds the manifest, renames the directory to its final name and then writes the tracker. Torch
lets other threads run while it writes, so the main thread continues training. Until its directory
is renamed, no reader sees a checkpoint; a save that fails, at any point and on any rank, leaves the
earlier checkpoints unchanged.
"""

import io
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from megatron_sorted.checkpoint.host_copies import HostCopies
from megatron_sorted.checkpoint.layout import iteration_directory, writing_directory
from megatron_sorted.checkpoint.manifest import FileRecord, Progress, manifest_text, record_file
from megatron_sorted.checkpoint.publishing import Retention, publish, remove_leftovers
from megatron_sorted.checkpoint.writer import HashingWriter
from megatron_sorted.errors import CheckpointError
from megatron_sorted.platform.contract import Platform


@dataclass(frozen=True)
class SaveOutcome:
    """The outcome of a save.

    Attributes:
        step: The checkpoint's step.
        directory: The checkpoint, or None if it could not be written.
        error: Reason of a failure, with the rank; the same on all ranks. None for a success.
        num_bytes: Size of the checkpoint.
        stall_seconds: Time for which training waited: for the end of the save before, a check of
            the weights, describing and copying.
        seconds: Duration of the whole save.
        notes: Further notes for the user, from the first rank.
    """

    step: int
    directory: Path | None
    error: str | None
    num_bytes: int
    stall_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class _Job:
    """A save in progress."""

    progress: Progress
    shards: dict[str, Any]
    common: bytes
    description: dict[str, Any]
    started: float
    stall_seconds: float = 0.0
    outcome: SaveOutcome | None = None


class Saver:
    """The saver of a run's checkpoints, all in one directory.

    Args:
        root: Directory of all checkpoints.
        platform: Platform of the run.
        background: Whether `save` returns before the files are written.
        verify: Whether files are read back and compared after writing.
        keep: Which checkpoints are not deleted.
        extra_files: {name within a checkpoint: content} of small files of every checkpoint; only
            the first rank's are written.
        progress_mark: Called from the writing thread as it proceeds, for a watchdog.
    """

    def __init__(
        self,
        root: str,
        platform: Platform,
        background: bool,
        verify: bool,
        keep: Retention,
        extra_files: Mapping[str, bytes],
        progress_mark: Callable[[], None],
    ):
        """Remove unfinished checkpoints of an earlier run.

        Collective: creates a process group of all ranks; every process must make a saver.
        """
        self.root, self.background, self.verify, self.keep = Path(root), background, verify, keep
        self.extra_files, self.progress_mark = dict(extra_files), progress_mark
        self.group = dist.new_group(backend=platform.host_backend)
        self._copies = HostCopies(platform)
        self._validated = False
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        if dist.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)

    @property
    def busy(self) -> bool:
        """Return whether a save of this rank is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, state: dict[str, Any], progress: Progress, description: dict[str, Any], began: float
    ) -> None:
        """Start a save of ``state``, which may change afterwards.

        The outcome of the save before must have been taken.

        Collective: Megatron's checks of the state dict over all ranks (the first time), then none
            on the main thread.

        Args:
            state: Megatron's sharded state dict, from `sharded_state`.
            progress: Progress of training.
            description: Entries of the manifest that describe the run.
            began: ``time.monotonic()`` when training stopped for the save.
        """
        assert self._job is None, "the outcome of the save before was not taken"
        sharded, common = save_preprocess(state, validate_access_integrity=not self._validated)
        self._validated = True
        self._copies.copy(sharded)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        shards = mcore_to_pyt_state_dict(flat)
        serialised = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save(common, serialised)
        self._job = _Job(
            progress, shards, serialised.getvalue(), description, began, time.monotonic() - began
        )
        self._thread = threading.Thread(
            target=self._run, args=(self._job,), name="save", daemon=True
        )
        self._thread.start()
        if not self.background:
            self._thread.join()

    def take_outcome(self, wait: bool) -> SaveOutcome | None:
        """Return the outcome of the last save, once.

        The result is None if no save was started, or if it is in progress and ``wait`` is False.
        Ranks finish at slightly different times: without ``wait``, all must agree before they act
        on the outcome.
        """
        if self._job is None or (self.busy and not wait):
            return None
        self._thread.join()
        outcome, self._job, self._thread = self._job.outcome, None, None
        return outcome

    def _run(self, job: _Job) -> None:
        """Do the second half of a save and record its outcome; never raise.

        Collective: over the saver's own group.
        """
        step = job.progress.step
        partial, final = writing_directory(self.root, step), iteration_directory(self.root, step)
        writer = HashingWriter(partial, self.progress_mark)
        records: list[dict[str, FileRecord]] = []
        notes: list[list[str]] = []
        error, _ = self._agree(lambda: self._make_directory(partial))
        if not error:
            error, _ = self._agree(lambda: self._write_shards(job, writer))
        if not error:
            error, records = self._agree(lambda: self._write_rest(job, writer, partial))
        files = {name: record for of_rank in records if of_rank for name, record in of_rank.items()}
        if not error:
            error, notes = self._agree(lambda: self._publish(job, files))
        if error and dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        job.outcome = SaveOutcome(
            step,
            None if error else final,
            error,
            sum(record.num_bytes for record in files.values()),
            job.stall_seconds,
            time.monotonic() - job.started,
            tuple(notes[0]) if notes else (),
        )

    def _agree(self, work: Callable[[], Any]) -> tuple[str | None, list[Any]]:
        """Do ``work`` on all ranks, and gather whether it succeeded everywhere.

        Returns:
            (None, the result of ``work`` on every rank), or (the reason of a failure with its rank,
            an empty list).

        Collective: one small all-gather over the saver's group, and those of ``work``. A rank that
            fails must not leave others waiting in a collective of ``work``: either torch prevents
            it, or ``work`` has none.
        """
        mine: tuple[str | None, Any]
        try:
            mine = (None, work())
        except (Exception, CheckpointException) as error:
            # every failure must reach the other ranks; torch's CheckpointException is no Exception
            mine = (_cause(error), None)
        self.progress_mark()
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, mine, group=self.group)
        for rank, (reason, _) in enumerate(results):
            if reason:
                return reason if "on rank" in reason else f"{reason}, on rank {rank}", []
        return None, [value for _, value in results]

    def _make_directory(self, partial: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write_shards(self, job: _Job, writer: HashingWriter) -> None:
        """Write this rank's shards, and on rank 0 torch's description of all.

        Collective: torch's planning and completion of a checkpoint, over the saver's group.
        """
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        save_shards(job.shards, storage_writer=writer, planner=planner, process_group=self.group)
        job.shards = {}

    def _write_rest(self, job: _Job, writer: HashingWriter, partial: Path) -> dict[str, FileRecord]:
        """Write the small files on rank 0, and verify all; return records of this rank's files."""
        if dist.get_rank() == 0:
            writer.fs.write_bytes(partial / "common.pt", job.common)
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))
            writer.fs.records[partial / "metadata.json"] = record_file(partial / "metadata.json")
            for name, content in self.extra_files.items():
                writer.fs.write_bytes(partial / name, content)
        self.progress_mark()
        if self.verify:
            writer.fs.verify()
        records = writer.fs.records
        return {str(path.relative_to(partial)): record for path, record in records.items()}

    def _publish(self, job: _Job, files: dict[str, FileRecord]) -> list[str]:
        """Make a checkpoint of what all ranks wrote, on rank 0; return notes for the user."""
        if dist.get_rank() != 0:
            return []
        text = manifest_text(job.description, job.progress, files)
        return publish(self.root, job.progress.step, text, job.description.get("run_id"), self.keep)


def _cause(error: BaseException) -> str:
    """Return the reason of an error in a few words.

    torch's error holds those of all ranks; the reason is that of the lowest one.
    """
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{_cause(inner)}, on rank {rank}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def require_saved(outcome: SaveOutcome) -> None:
    """Check that a save succeeded.

    Raises:
        CheckpointError: It failed.
    """
    if outcome.error:
        raise CheckpointError(
            f"the checkpoint of step {outcome.step} could not be written ({outcome.error}). "
            "Earlier checkpoints are as they were. Make room or mend the file system, "
            "then start again with --load."
        )
