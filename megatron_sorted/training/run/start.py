"""The start of a run: its parts before the processes meet, and the checkpoint it starts from."""

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
from megatron_sorted.settings.coefficient_rule import coefficient_rule
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.checkpoints import agree_on_run, choose_checkpoint
from megatron_sorted.training.run.hugging_face import check_export_of_run
from megatron_sorted.training.run.inputs import Inputs, open_inputs, search_checkpoints


@dataclass(frozen=True)
class PreparedRun:
    """The checked parts of a run, before the processes meet.

    Attributes:
        started: ``time.monotonic()`` at the start.
        inputs: The data, tokenizer and checkpoints.
        settings: The settings, with the vocabulary size resolved.
        rule: The rule of the exits' coefficients.
        platform: The devices of the run.
    """

    started: float
    inputs: Inputs
    settings: Settings
    rule: CoefficientRule
    platform: Platform


def prepare(settings: Settings) -> PreparedRun:
    """Prepare a run and check everything that a user can get wrong."""
    started, inputs = time.monotonic(), open_inputs(settings)
    rule, platform = coefficient_rule(inputs.settings), choose_platform(settings.device)
    check_platform(inputs.settings, platform)
    platform.prepare()
    return PreparedRun(started, inputs, inputs.settings, rule, platform)


@dataclass(frozen=True)
class StartingPoint:
    """The point where a run starts, the same on all ranks.

    Attributes:
        settings: The run, with --load set to --save where it resumes from there.
        candidate: The checkpoint it loads; None where it starts afresh.
        run_id: The run's name, the same after every resume.
        origin: A text that names what the run started from; None if an older version did not
            record it.
    """

    settings: Settings
    candidate: Candidate | None
    run_id: str
    origin: str | None


def find_starting_point(
    prepared: PreparedRun, place: Place, log: Callable[..., None]
) -> StartingPoint:
    """Return where the run starts: at the newest undamaged checkpoint if it resumes.

    Collective: every process must call it.
    """
    inputs, candidate = prepared.inputs, None
    shared: list[Any] = [None]
    if place.rank == 0:
        # again, now that the directory is locked: an earlier start may have saved since
        shared = [search_checkpoints(prepared.settings, inputs.tokenizer, inputs.data)]
    dist.broadcast_object_list(shared, src=0, group=dist.group.WORLD)
    settings, candidates, origin, lines = shared[0]
    for line in (*inputs.resume_lines, *lines):
        log(line)
    if settings.load is not None:
        candidate = choose_checkpoint(
            candidates or Candidates(), settings, inputs.tokenizer, inputs.data, log
        )
        if candidate is None:
            log(f"--load {settings.load} holds no checkpoint: starting afresh")
    run_id, origin = agree_on_run(settings, candidate, origin)
    if place.rank == 0 and settings.save_hf:
        check_export_of_run(settings, run_id)
    return StartingPoint(settings, candidate, run_id, origin)
