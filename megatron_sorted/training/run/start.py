"""Before and while processes meet: what a run is made of, and which checkpoint it goes on from."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_sorted.checkpoint.candidates import Candidate, Candidates
from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.model.config import check_platform
from megatron_sorted.parallel.groups import Place
from megatron_sorted.platform.contract import Platform
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.settings.run import Settings
from megatron_sorted.settings.weighting import coefficient_rule
from megatron_sorted.training.run.checkpoints import agree_on_run, choose_checkpoint
from megatron_sorted.training.run.hugging_face import check_export_of_run
from megatron_sorted.training.run.inputs import Inputs, find_checkpoints, newest_of, open_inputs
from megatron_sorted.training.run.same_run import go_on_in_save, start_of


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, before processes meet.

    Attributes:
        started: ``time.monotonic()`` at the start.
        inputs: Data and tokenizer.
        settings: The run, vocabulary resolved.
        rule: The rule of the exits' coefficients.
        platform: Where it runs.
    """

    started: float
    inputs: Inputs
    settings: Settings
    rule: CoefficientRule
    platform: Platform


def prepare(settings: Settings) -> Prepared:
    """Return what a run is made of; everything that a user can get wrong is checked."""
    started, inputs = time.monotonic(), open_inputs(settings)
    rule, platform = coefficient_rule(inputs.settings), choose_platform(settings.device)
    check_platform(inputs.settings, platform)
    platform.prepare()
    return Prepared(started, inputs, inputs.settings, rule, platform)


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, the same on all ranks.

    Attributes:
        settings: The run, going on in --save where it can.
        candidate: The checkpoint it loads; None where it starts afresh.
        run_id: Its name, the same after every resume.
        origin: What it started from.
    """

    settings: Settings
    candidate: Candidate | None
    run_id: str
    origin: str | None


def find_beginning(prepared: Prepared, place: Place, say: Callable[..., None]) -> Beginning:
    """Return where the run begins: at the newest sound checkpoint, if it is to continue one.

    Collective: every process must call it.
    """
    inputs, candidate = prepared.inputs, None
    box: list[Any] = [None]
    if (
        place.rank == 0
    ):  # again, now that the directory is ours: the run before may have saved since
        box = [_look_again(prepared)]
    dist.broadcast_object_list(box, src=0)
    settings, found, start, notes = box[0]
    for note in notes:
        say(note)
    if settings.load is not None:
        candidate = choose_checkpoint(
            found or Candidates(), settings, inputs.tokenizer, inputs.data, say
        )
        if candidate is None:
            say(f"--load {settings.load} holds no checkpoint: starting afresh")
    run_id, origin = agree_on_run(settings, candidate, start)
    if place.rank == 0 and settings.save_hf:
        check_export_of_run(settings, run_id)
    return Beginning(settings, candidate, run_id, origin)


def _look_again(prepared: Prepared) -> tuple[Settings, Candidates | None, str, list[str]]:
    """Return settings, checkpoints, start and notes as the disk is now; on rank 0."""
    settings, inputs = prepared.settings, prepared.inputs
    found = find_checkpoints(settings, inputs.tokenizer, inputs.data)
    start = start_of(settings, newest_of(found))
    resumed, notes = go_on_in_save(settings, newest_of(found), inputs.tokenizer, inputs.data)
    if resumed is not settings:
        found = find_checkpoints(resumed, inputs.tokenizer, inputs.data)
    return resumed, found, start, [*inputs.going_on, *notes]
