"""The checkpoints of one run: which one it starts from, when one is saved, and what is said about it."""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sorted.checkpoint.candidates import Candidate, Candidates
from megatron_sorted.checkpoint.layout import saved_steps
from megatron_sorted.checkpoint.lock import DirectoryLock
from megatron_sorted.checkpoint.manifest import Progress
from megatron_sorted.checkpoint.publishing import Retention
from megatron_sorted.checkpoint.saver import SaveOutcome, Saver, require_saved
from megatron_sorted.checkpoint.sharding.sharded import (
    find_damage_on_all_ranks,
    load_sharded,
    sharded_state,
)
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import CheckpointError
from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.files import same_path, write_text_atomically
from megatron_sorted.parallel.groups import Place
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.state import seed_everything
from megatron_sorted.reading.json_text import read_json_object
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.hugging_face import (
    carried_files_of,
    is_hugging_face_candidate,
    load_by_name,
)
from megatron_sorted.training.run.resume import (
    check_can_continue,
    gives_new_parts,
    loaded_line,
    set_schedule,
    takes_weights_only,
)
from megatron_sorted.training.run.same_run import START
from megatron_sorted.training.run.travelling import carry_files, files_of_checkpoint
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.watch.nonfinite import check_finite_weights
from megatron_sorted.training.watch.trained_step import TrainedStep

RUN = "run.json"
# Seeds of a run continued in another layout, step by step apart from each other and from those of Megatron's own ranks.
SEEDS_A_STEP = 100_003
Say = Callable[..., None]


def agree_on_run(
    settings: Settings, continued: Candidate | None, start: str
) -> tuple[str, str | None]:
    """Return the name of this run and what it started from, the same on all ranks and after every resume.

    Both are kept in every manifest. Before the first checkpoint a file in --save keeps them, so that
    a run that is killed early and started again is still one run.

    Collective: one broadcast from rank 0.

    Args:
        settings: The run.
        continued: The checkpoint it goes on from, or takes weights of.
        start: What it starts from, where it does not go on.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box = [_name_of_run(settings, continued, start)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _name_of_run(
    settings: Settings, continued: Candidate | None, start: str
) -> tuple[str, str | None]:
    if continued is not None and not takes_weights_only(continued, settings):
        return continued.manifest["run_id"], continued.manifest.get(START)
    if not settings.save or settings.skip_train:
        return uuid.uuid4().hex[:8], start
    path = Path(settings.save) / RUN
    with suppress(CheckpointError, KeyError):  # it is not there, or damaged
        kept = read_json_object(path, error=CheckpointError)
        if kept[START] == start:
            return str(kept["run_id"]), start
    run_id = uuid.uuid4().hex[:8]
    write_text_atomically(path, json.dumps({"run_id": run_id, START: start}) + "\n")
    return run_id, start


def choose_checkpoint(
    candidates: Candidates,
    settings: Settings,
    tokenizer: Tokenizer | None,
    data: dict[str, Any] | None,
    say: Say,
) -> Candidate | None:
    """Return the newest checkpoint whose files are sound, the same on all ranks, after saying which were passed over and why.

    Collective: one broadcast from rank 0; for each candidate that is read, one all-gather over all ranks.

    Raises:
        CheckpointError: There were checkpoints and none is sound, or the run cannot go on from it.
    """
    box = [candidates, data]
    dist.broadcast_object_list(box, src=0)  # ranks may have looked at different moments
    candidates, data = box
    taken = None
    for candidate in candidates.usable:
        problems = find_damage_on_all_ranks(
            candidate.directory, candidate.manifest, shards_too=settings.verify_checkpoint
        )
        if not problems:
            taken = candidate
            break
        candidates.skipped.append((candidate.step, "; ".join(problems)))
    passed_over = candidates.passed_over(taken)
    if taken is None and passed_over:
        raise CheckpointError(
            f"--load: {settings.load} holds no sound checkpoint: {'; '.join(passed_over)}. Restore one, or give another "
            "directory."
        )
    for sentence in passed_over:
        say(f"passed over {sentence.rstrip('.')}")
    if taken is not None:
        check_can_continue(taken, settings, tokenizer, data)
    return taken


class Checkpoints:
    """Loads and saves for one run."""

    def __init__(
        self,
        settings: Settings,
        platform: Platform,
        place: Place,
        model: Model,
        rule: CoefficientRule,
        say: Say,
    ):
        self.settings, self.platform, self.place, self.model, self.rule, self.say = (
            settings,
            platform,
            place,
            model,
            rule,
            say,
        )
        self.lock: DirectoryLock | None = None
        self.saver: Saver | None = None
        self.saved_step: int | None = None
        self._tokenizer: dict[str, Any] | None = None  # that of the checkpoint the run started from

    def open_for_saving(
        self, extra_files: Mapping[str, bytes], progress_mark: Callable[[], None]
    ) -> None:
        """Take the directory for this run and make the saver.

        Collective: one broadcast from rank 0, then a new process group.

        Raises:
            CheckpointError: Another run is saving there.
        """
        settings, refused = self.settings, [None]
        if dist.get_rank() == 0:
            try:
                self.lock = DirectoryLock(settings.save)
                if not self.lock.acquire():
                    self.say(
                        f"note: the file system of {settings.save} knows no locks; take care that no other run saves there"
                    )
            except CheckpointError as error:
                refused = [str(error)]
            except OSError as error:
                refused = [
                    f"--save: cannot write in {settings.save} ({error.strerror}). Give a directory that can be written."
                ]
        dist.broadcast_object_list(refused, src=0)
        if refused[0]:
            raise CheckpointError(refused[0])
        keep = Retention(settings.save_retain, settings.save_retain_interval)
        self.saver = Saver(
            settings.save,
            self.platform,
            settings.async_save,
            settings.verify_checkpoint,
            keep,
            extra_files,
            progress_mark,
        )

    def _carry_on(self, candidate: Candidate) -> None:
        """Copy the loaded checkpoint's tokenizer and Hugging Face files into this run's checkpoints."""
        if self.saver is None or self.place.rank != 0:
            return
        self._tokenizer = candidate.manifest.get("tokenizer")
        files = (
            carried_files_of(candidate.directory)
            if is_hugging_face_candidate(candidate)
            else files_of_checkpoint(candidate)
        )
        self.saver.extra_files = carry_files(files, self.saver.extra_files, self._tokenizer)

    def load(self, candidate: Candidate) -> Progress:
        """Return how far training was, after loading a checkpoint into the model and saying so.

        Collective: every rank reads the shards it needs.
        """
        settings, model = self.settings, self.model
        continues = not takes_weights_only(candidate, settings) and not settings.skip_train
        if is_hugging_face_candidate(candidate) or gives_new_parts(candidate, settings):
            load_by_name(candidate.directory, settings, model.chunks, model.optimizer)
            state = {}
        else:
            state = load_sharded(
                candidate.directory,
                candidate.manifest,
                model.chunks,
                model.optimizer,
                load_optimizer=continues and not settings.no_load_optim,
                load_random=continues and not settings.no_load_rng,
            )
        self._carry_on(candidate)
        progress = Progress(**candidate.manifest["progress"])
        if takes_weights_only(candidate, settings):
            why = (
                " (it holds nothing else)"
                if candidate.weights_only and not settings.finetune
                else ""
            )
            self.say(
                f"loaded {candidate.directory}: weights only{why}"
                + (", starting at step 0" if not settings.skip_train else "")
            )
            return Progress(0, 0)
        self.rule.load_state_dict(state["more"].get("coefficient_rule", {}))
        if not settings.skip_train:
            now = global_batch_size(settings, self.place.world_size)
            set_schedule(
                model.schedule,
                state["opt_param_scheduler"],
                candidate.manifest["samples_a_step"],
                now,
            )
            if not state["random_state"]:
                seed_everything(
                    settings.seed + SEEDS_A_STEP * progress.step
                )  # or dropout would repeat that of the first steps
            self.saved_step = progress.step if same_path(settings.load, settings.save) else None
        self.say(loaded_line(candidate, settings, model.optimizer.param_groups[0]["lr"]))
        return progress

    def save(self, progress: Progress, description: dict[str, Any]) -> list[SaveOutcome]:
        """Start a save, or do it where the run saves in the foreground; return outcomes of saves that ended meanwhile.

        Collective: checks and gathers of the state on the main thread; every process must call it.

        Raises:
            TrainingError: The weights are not finite.
        """
        began = time.monotonic()
        before = self.saver.take_outcome(wait=True)
        check_finite_weights(self.model.chunks)
        more = {"coefficient_rule": self.rule.state_dict()}
        state = sharded_state(self.model.chunks, self.model.optimizer, self.model.schedule, more)
        said = {**description, "learning_rate": self.model.optimizer.param_groups[0]["lr"]}
        self.saver.save(
            state, progress, {**said, "tokenizer": said["tokenizer"] or self._tokenizer}, began
        )
        self.saved_step = progress.step
        after = None if self.saver.background else self.saver.take_outcome(wait=True)
        return [outcome for outcome in (before, after) if outcome is not None]

    @property
    def busy(self) -> bool:
        """Return whether a save of this rank is on its way."""
        return self.saver is not None and self.saver.busy

    def finished(self, wait: bool) -> SaveOutcome | None:
        """Return the outcome of the save on its way once it has ended; all ranks must ask alike."""
        return self.saver.take_outcome(wait) if self.saver is not None else None

    def after(self, step: TrainedStep) -> None:
        """Say what became of a save in the background, once it has ended on every rank."""
        if self.saver and not step.flags.save_busy and (outcome := self.finished(wait=True)):
            self.tell(outcome, last=False)

    def end(self, progress: Progress, description: dict[str, Any]) -> None:
        """Save the state training ended with, unless it is saved, and wait until it is on disk.

        Collective: every process must call it.

        Raises:
            CheckpointError: It could not be written.
        """
        if self.saver is None:
            return
        if (outcome := self.finished(wait=True)) is not None:
            self.tell(outcome, last=outcome.step == progress.step)
        if self.saved_step == progress.step or progress.step == 0:
            return
        for outcome in [*self.save(progress, description), self.finished(wait=True)]:
            if outcome is not None:
                self.tell(outcome, last=True)

    def tell(self, outcome: SaveOutcome, last: bool) -> None:
        """Say what became of a save.

        Raises:
            CheckpointError: It failed and it was the last one, or a failure is to stop the run.
        """
        if outcome.error:
            if last or self.settings.save_failure == "stop":
                require_saved(outcome)
            there = saved_steps(self.settings.save)
            self.saved_step = None
            self.say(
                f"warning: the checkpoint of step {outcome.step} could not be written ({outcome.error}); training goes on. "
                f"Newest complete checkpoint: {f'step {there[0]}' if there else 'none'}"
            )
            return
        held_up = (
            f", training held up for {outcome.stall_seconds:.2f} s" if self.saver.background else ""
        )
        self.say(
            f"saved {outcome.directory} in {outcome.seconds:.1f} s ({outcome.num_bytes / 1e6:,.1f} MB{held_up})"
        )
        for note in outcome.notes:
            self.say(f"note: {note}")

    def close(self) -> None:
        """Give the directory up."""
        if self.lock is not None:
            self.lock.release()
