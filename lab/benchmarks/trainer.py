"""The trainer of a measured process: one step of a run for each call."""

import logging
from typing import Any

import torch

from megatron_sorted.platform.processes import silence_library_warnings

silence_library_warnings()

from megatron_sorted.data.batches import make_train_batches  # noqa: E402
from megatron_sorted.platform.contract import Platform  # noqa: E402
from megatron_sorted.platform.select import choose_platform  # noqa: E402
from megatron_sorted.settings.coefficient_rule import coefficient_rule  # noqa: E402
from megatron_sorted.settings.derived import global_batch_size, num_micro_batches, trained_exits  # noqa: E402
from megatron_sorted.settings.run import Settings  # noqa: E402
from megatron_sorted.training.step.build import Model, build_model, build_optimizer  # noqa: E402
from megatron_sorted.training.step.forward_step import ForwardStep  # noqa: E402
from megatron_sorted.training.step.train_step import train_step  # noqa: E402


def start_platform(device: str, threads: int = 1) -> Platform:
    """Prepare a platform and return it."""
    # On a CPU, Megatron warns that one random state serves where it expects two.
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    platform = choose_platform(device)
    platform.prepare()
    return platform


class Trainer:
    """A callable that trains the next step of a run.

    Args:
        settings: The run.
        platform: The platform it runs on.
        place: The place of this process among others.
        model: A network with its optimizer; by default a new one.
    """

    def __init__(
        self, settings: Settings, platform: Platform, place: Any, model: Model | None = None
    ):
        if model is None:
            model = build_model(settings, platform, place, settings.vocab_size)
            build_optimizer(model, settings, place.world_size)
        self.settings, self.model = settings, model
        self._forward_step = ForwardStep(settings, model, platform)
        self._rule = coefficient_rule(settings)
        self._batches = make_train_batches(
            settings, settings.vocab_size, place.data_rank, place.data_size
        )
        self._samples = global_batch_size(settings, place.world_size)
        self._num_micro_batches = num_micro_batches(settings, place.world_size)
        self._number = 0

    def __call__(self) -> None:
        """Train a step.

        Collective: that of ``train_step``.
        """
        self._forward_step.begin_step(self._number, self._rule)
        batches = [next(self._batches) for _ in range(self._num_micro_batches)]
        coefficients = trained_exits(self.settings, self._rule, self._number)
        result = train_step(
            self.model, self.settings, self._forward_step, batches, coefficients, self._samples
        )
        if result.observed is not None:
            self._rule.observe(self._number, result.observed)
        self._forward_step.ledger.clear()
        self._number += 1
