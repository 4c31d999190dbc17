"""The checkpoints of one run: which one it starts from, when one is saved, and what is logged."""

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
from megatron_sorted.settings.averaging import holds_averages
from megatron_sorted.settings.derived import global_batch_size
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.carried_files import carry_files, files_of_checkpoint
from megatron_sorted.training.run.hugging_face import carried_files_of, is_hugging_face_candidate
from megatron_sorted.training.run.resume import (
    check_can_continue,
    gives_new_parts,
    loaded_line,
    set_schedule,
    takes_weights_only,
)
from megatron_sorted.training.run.same_run import STARTED_FROM
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step.named_weights import load_by_name
from megatron_sorted.training.step.weight_average import WeightAverage
from megatron_sorted.training.step_result import TrainedStep
from megatron_sorted.training.watch.nonfinite import check_finite_weights

RUN = "run.json"
# A run resumed in another layout takes a seed for its step, so that seeds of two steps are far
# apart and differ from those of Megatron's own ranks.
SEEDS_A_STEP = 100_003
Log = Callable[..., None]


def agree_on_run(
    settings: Settings, resumed: Candidate | None, started_from: str
) -> tuple[str, str | None]:
    """Return this run's name and what it started from, the same on all ranks and after a resume.

    Both are kept in every manifest. Before the first checkpoint a file in --save keeps them, so
    that a run that is killed early and started again is still one run.

    Collective: one broadcast from rank 0.

    Args:
        settings: The run.
        resumed: The checkpoint that it resumes, or takes weights of.
        started_from: What it starts from, where it does not resume.
    """
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        shared = [_name_of_run(settings, resumed, started_from)]
    dist.broadcast_object_list(shared, src=0, group=dist.group.WORLD)
    return shared[0]


def _name_of_run(
    settings: Settings, resumed: Candidate | None, started_from: str
) -> tuple[str, str | None]:
    if resumed is not None and not takes_weights_only(resumed, settings):
        return resumed.manifest["run_id"], resumed.manifest.get(STARTED_FROM)
    if not settings.save or settings.skip_train:
        return uuid.uuid4().hex[:8], started_from
    path = Path(settings.save) / RUN
    with suppress(CheckpointError, KeyError):  # it is missing or damaged
        kept = read_json_object(path, error=CheckpointError)
        if kept[STARTED_FROM] == started_from:
            return str(kept["run_id"]), started_from
    run_id = uuid.uuid4().hex[:8]
    write_text_atomically(path, json.dumps({"run_id": run_id, STARTED_FROM: started_from}) + "\n")
    return run_id, started_from


def choose_checkpoint(
    candidates: Candidates,
    settings: Settings,
    tokenizer: Tokenizer | None,
    data: dict[str, Any] | None,
    log: Log,
) -> Candidate | None:
    """Return the newest checkpoint whose files are undamaged, the same on all ranks.

    Those that were passed over are logged, with the reason.

    Collective: one broadcast from rank 0; for each candidate that is read, one all-gather over all
        ranks.

    Raises:
        CheckpointError: There are checkpoints and all are damaged, or the run cannot resume from
            the one taken.
    """
    shared = [candidates, data]
    # ranks may have looked at different moments
    dist.broadcast_object_list(shared, src=0, group=dist.group.WORLD)
    candidates, data = shared
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
            f"--load: {settings.load} holds no sound checkpoint: {'; '.join(passed_over)}. "
            "Restore one, or give another directory."
        )
    for sentence in passed_over:
        log(f"passed over {sentence.rstrip('.')}")
    if taken is not None:
        check_can_continue(taken, settings, tokenizer, data)
    return taken


class Checkpoints:
    """The loading and saving of one run."""

    def __init__(
        self,
        settings: Settings,
        platform: Platform,
        place: Place,
        model: Model,
        rule: CoefficientRule,
        log: Log,
        average: WeightAverage | None = None,
    ):
        self.settings, self.platform, self.place = settings, platform, place
        self.model, self.rule, self.log, self.average = model, rule, log, average
        self.lock: DirectoryLock | None = None
        self.saver: Saver | None = None
        self.saved_step: int | None = None
        self._tokenizer: dict[str, Any] | None = None  # that of the checkpoint the run started from

    def open_for_saving(
        self, extra_files: Mapping[str, bytes], progress_mark: Callable[[], None]
    ) -> None:
        """Lock the directory for this run and create the saver.

        Collective: one broadcast from rank 0, then a new process group.

        Raises:
            CheckpointError: Another run is saving there.
        """
        settings, refusal = self.settings, [None]
        if dist.get_rank() == 0:
            try:
                self.lock = DirectoryLock(settings.save)
                if not self.lock.acquire():
                    self.log(
                        f"note: the file system of {settings.save} knows no locks; take care that "
                        "no other run saves there"
                    )
            except CheckpointError as error:
                refusal = [str(error)]
            except OSError as error:
                refusal = [
                    f"--save: cannot write in {settings.save} ({error.strerror}). Give a directory "
                    "that can be written."
                ]
        dist.broadcast_object_list(refusal, src=0, group=dist.group.WORLD)
        if refusal[0]:
            raise CheckpointError(refusal[0])
        self.saver = Saver(
            settings.save,
            self.platform,
            settings.async_save,
            settings.verify_checkpoint,
            Retention(settings.save_retain, settings.save_retain_interval),
            extra_files,
            progress_mark,
        )

    def _carry_files(self, candidate: Candidate) -> None:
        """Copy a checkpoint's tokenizer and Hugging Face files into this run's checkpoints."""
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
        """Load a checkpoint into the model, log it, and return how far training was.

        Collective: every rank reads the shards it needs.
        """
        settings, model = self.settings, self.model
        weights_only = takes_weights_only(candidate, settings)
        resumes = not weights_only and not settings.skip_train
        state = {}
        if is_hugging_face_candidate(candidate) or gives_new_parts(candidate, settings):
            load_by_name(candidate.directory, settings, model.chunks, model.optimizer)
        else:
            with_average = (
                self.average is not None and not weights_only and holds_averages(candidate.manifest)
            )
            state = load_sharded(
                candidate.directory,
                candidate.manifest,
                model.chunks,
                model.optimizer,
                load_optimizer=resumes and not settings.no_load_optim,
                load_random=resumes and not settings.no_load_rng,
                averages=self.average.tensors if with_average else None,
            )
            if with_average:
                self.average.has_begun = True
        self._carry_files(candidate)
        if weights_only:
            held = candidate.weights_only and not settings.finetune
            self.log(
                f"loaded {candidate.directory}: weights only"
                + (" (it holds nothing else)" if held else "")
                + (", starting at step 0" if not settings.skip_train else "")
            )
            return Progress(0, 0)
        progress = Progress(**candidate.manifest["progress"])
        self.rule.load_state_dict(state["more"].get("coefficient_rule", {}))
        if resumes:
            set_schedule(
                model.schedule,
                state["opt_param_scheduler"],
                candidate.manifest["samples_a_step"],
                global_batch_size(settings, self.place.world_size),
            )
            if not state["random_state"]:
                # with the run's own seed, dropout would repeat that of the first steps
                seed_everything(settings.seed + SEEDS_A_STEP * progress.step, model.groups)
            self.saved_step = progress.step if same_path(settings.load, settings.save) else None
        self.log(loaded_line(candidate, settings, model.optimizer.param_groups[0]["lr"]))
        return progress

    def save(self, progress: Progress, description: dict[str, Any]) -> list[SaveOutcome]:
        """Save now, or start a save in the background; return the outcomes of ended saves.

        Collective: checks and gathers of the state on the main thread; every process must call it.

        Raises:
            TrainingError: The weights are not finite.
        """
        began = time.monotonic()
        before = self.saver.take_outcome(wait=True)
        check_finite_weights(self.model.chunks)
        more = {"coefficient_rule": self.rule.state_dict()}
        average = self.average.tensors if self.average and self.average.has_begun else None
        state = sharded_state(
            self.model.chunks, self.model.optimizer, self.model.schedule, more, average
        )
        described = {
            **description,
            "learning_rate": self.model.optimizer.param_groups[0]["lr"],
            "tokenizer": description["tokenizer"] or self._tokenizer,
        }
        self.saver.save(state, progress, described, began)
        self.saved_step = progress.step
        after = None if self.saver.background else self.saver.take_outcome(wait=True)
        return [outcome for outcome in (before, after) if outcome is not None]

    @property
    def busy(self) -> bool:
        """Return whether a save of this rank has not ended yet."""
        return self.saver is not None and self.saver.busy

    def finished(self, wait: bool) -> SaveOutcome | None:
        """Return the outcome of the current save once it has ended; all ranks must call alike."""
        return self.saver.take_outcome(wait) if self.saver is not None else None

    def after(self, step: TrainedStep) -> None:
        """Report a save in the background once it has ended on every rank."""
        if self.saver and not step.flags.save_busy and (outcome := self.finished(wait=True)):
            self.report(outcome, last=False)

    def end(self, progress: Progress, description: dict[str, Any]) -> None:
        """Save the final state unless it is saved, and wait until it is on disk.

        Collective: every process must call it.

        Raises:
            CheckpointError: It could not be written.
        """
        if self.saver is None:
            return
        if (outcome := self.finished(wait=True)) is not None:
            self.report(outcome, last=outcome.step == progress.step)
        if self.saved_step == progress.step or progress.step == 0:
            return
        for outcome in [*self.save(progress, description), self.finished(wait=True)]:
            if outcome is not None:
                self.report(outcome, last=True)

    def report(self, outcome: SaveOutcome, last: bool) -> None:
        """Log the outcome of a save.

        Raises:
            CheckpointError: It failed, and it was the last one or --save-failure is "stop".
        """
        if outcome.error:
            if last or self.settings.save_failure == "stop":
                require_saved(outcome)
            steps = saved_steps(self.settings.save)
            self.saved_step = None
            self.log(
                f"warning: the checkpoint of step {outcome.step} could not be written "
                f"({outcome.error}); training continues. "
                f"Newest complete checkpoint: {f'step {steps[0]}' if steps else 'none'}"
            )
            return
        background = self.saver.background
        stall = f", training held up for {outcome.stall_seconds:.2f} s" if background else ""
        self.log(
            f"saved {outcome.directory} in {outcome.seconds:.1f} s "
            f"({outcome.num_bytes / 1e6:,.1f} MB{stall})"
        )
        for note in outcome.notes:
            self.log(f"note: {note}")

    def close(self) -> None:
        """Release the directory."""
        if self.lock is not None:
            self.lock.release()
