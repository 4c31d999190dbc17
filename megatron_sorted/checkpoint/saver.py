"""Saving in the background: training waits only until its state is copied to host memory.

A save has two halves. In the first, on the main thread, the state is described and copied. In the second, on a thread with a process
group of its own, every rank writes and verifies its shards, and rank 0 adds the manifest, gives the directory its name and then the
tracker. Torch lets other threads run while it writes, so the main thread goes on training. Until its directory is renamed, a
checkpoint does not exist for anybody; a save that fails, at whatever point and on whatever rank, leaves what was there before.
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

from megatron_sorted.checkpoint.layout import iteration_directory, writing_directory
from megatron_sorted.checkpoint.manifest import FileRecord, Progress, manifest_text, record_file
from megatron_sorted.checkpoint.publishing import Retention, publish, remove_leftovers
from megatron_sorted.checkpoint.staging import Stage
from megatron_sorted.checkpoint.writer import HashingWriter
from megatron_sorted.errors import CheckpointError
from megatron_sorted.platform.contract import Platform


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save.

    Attributes:
        step: Of the checkpoint.
        directory: The checkpoint, or None if it could not be written.
        error: Why not, with the rank; the same on all ranks.
        num_bytes: Size of the checkpoint.
        stall_seconds: How long training was held up: by the end of the save before, a look at the weights, describing and copying.
        seconds: How long the whole save took.
        notes: What else the user should know; of the first rank.
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
    """One save on its way."""

    progress: Progress
    shards: dict[str, Any]
    common: bytes
    description: dict[str, Any]
    started: float
    stall_seconds: float = 0.0
    outcome: SaveOutcome | None = None


class Saver:
    """Saves the checkpoints of a run into one directory.

    Args:
        root: Directory of all checkpoints.
        platform: Where the run is.
        background: Whether `save` comes back before the files are written.
        verify: Whether files are read back and compared after writing.
        keep: Which checkpoints are not deleted.
        extra_files: Content of small files that go into every checkpoint, by name within it; only the first rank's are written.
        progress_mark: Called from the writing thread as it gets on, for a watchdog.
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
        """Clear what an earlier run left unfinished.

        Collective: creates a process group of all ranks; every process must make a saver.
        """
        self.root, self.background, self.verify, self.keep = Path(root), background, verify, keep
        self.extra_files, self.progress_mark = dict(extra_files), progress_mark
        self.group = dist.new_group(backend=platform.host_backend)
        self.stage = Stage(platform)
        self._validated = False
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        if dist.get_rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)

    @property
    def busy(self) -> bool:
        """Return whether a save of this rank is still on its way."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, state: dict[str, Any], progress: Progress, description: dict[str, Any], began: float
    ) -> None:
        """Start a save of ``state``, a Megatron sharded state dict, which may change afterwards. The save before must be taken.

        Collective: Megatron's checks of the state dict over all ranks (the first time), then nothing on the main thread.

        Args:
            state: What `sharded_state` returns.
            progress: How far training is.
            description: What the manifest says of the run.
            began: ``time.monotonic()`` when training stopped for it.
        """
        assert self._job is None, "the outcome of the save before was not taken"
        sharded, common = save_preprocess(state, validate_access_integrity=not self._validated)
        self._validated = True
        self.stage.copy(sharded)
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
        """Return what became of the save on its way, once; None if there is none, or it is not finished and ``wait`` is False.

        Ranks finish at slightly different times: without ``wait``, all must agree before they act on it.
        """
        if self._job is None or (self.busy and not wait):
            return None
        self._thread.join()
        outcome, self._job, self._thread = self._job.outcome, None, None
        return outcome

    def _run(self, job: _Job) -> None:
        """Do the second half of a save and note its outcome; never raises.

        Collective: over the saver's own group.
        """
        step = job.progress.step
        aside, final = writing_directory(self.root, step), iteration_directory(self.root, step)
        writer = HashingWriter(aside, self.progress_mark)
        records: list[dict[str, FileRecord]] = []
        notes: list[list[str]] = []
        error, _ = self._agree(lambda: self._make_directory(aside))
        if not error:
            error, _ = self._agree(lambda: self._write_shards(job, writer))
        if not error:
            error, records = self._agree(lambda: self._write_rest(job, writer, aside))
        files = {name: record for of_rank in records if of_rank for name, record in of_rank.items()}
        if not error:
            error, notes = self._agree(lambda: self._publish(job, files))
        if error and dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
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
        """Return (None, what ``work`` returned on every rank), or (what went wrong and on which rank, []).

        Collective: one small all-gather over the saver's group, and those of ``work``. A rank that fails must not leave others waiting
        in a collective of ``work``: either torch sees to that, or ``work`` has none.
        """
        mine: tuple[str | None, Any]
        try:
            mine = (None, work())
        except (
            Exception,
            CheckpointException,
        ) as error:  # torch's is no Exception; whatever it is, other ranks must hear of it
            mine = (_cause(error), None)
        self.progress_mark()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, mine, group=self.group)
        failed = next(
            (
                said if "on rank" in said else f"{said}, on rank {rank}"
                for rank, (said, _) in enumerate(everybody)
                if said
            ),
            None,
        )
        return failed, [] if failed else [value for _, value in everybody]

    def _make_directory(self, aside: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write_shards(self, job: _Job, writer: HashingWriter) -> None:
        """Write this rank's shards, and on rank 0 torch's description of all.

        Collective: torch's planning and completion of a checkpoint, over the saver's group.
        """
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        save_shards(job.shards, storage_writer=writer, planner=planner, process_group=self.group)
        job.shards = {}

    def _write_rest(self, job: _Job, writer: HashingWriter, aside: Path) -> dict[str, FileRecord]:
        """Return the records of all files this rank wrote, after rank 0 has added the small ones and all were read back."""
        if dist.get_rank() == 0:
            writer.fs.write_bytes(aside / "common.pt", job.common)
            save_config(CheckpointingConfig("torch_dist", 1), str(aside))
            writer.fs.records[aside / "metadata.json"] = record_file(aside / "metadata.json")
            for name, content in self.extra_files.items():
                writer.fs.write_bytes(aside / name, content)
        self.progress_mark()
        if self.verify:
            writer.fs.verify()
        return {str(path.relative_to(aside)): record for path, record in writer.fs.records.items()}

    def _publish(self, job: _Job, files: dict[str, FileRecord]) -> list[str]:
        """Make a checkpoint of what all ranks wrote, on rank 0; return notes for the user."""
        if dist.get_rank() != 0:
            return []
        text = manifest_text(job.description, job.progress, files)
        return publish(self.root, job.progress.step, text, job.description.get("run_id"), self.keep)


def _cause(error: BaseException) -> str:
    """Return the reason of an error in a few words; of torch's, which hold those of all ranks, the one of the lowest rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{_cause(inner)}, on rank {rank}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def require_saved(outcome: SaveOutcome) -> None:
    """Check that a save succeeded.

    Raises:
        CheckpointError: It did not.
    """
    if outcome.error:
        raise CheckpointError(
            f"the checkpoint of step {outcome.step} could not be written ({outcome.error}). "
            "Earlier checkpoints are as they were. Make room or mend the file system, then start again with --load."
        )
