"""What an exit does: attach itself in forward, compute its loss and gradients in backward."""

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sorted.loss.attached import AttachedExit
from megatron_sorted.loss.cross_entropy import CrossEntropy, LossRequest
from megatron_sorted.loss.deferred import end, tap
from megatron_sorted.loss.distillation import Distillation, TaughtCrossEntropy
from megatron_sorted.loss.gradient_rules import GradientRule
from megatron_sorted.loss.ledger import Ledger
from megatron_sorted.loss.linear_cross_entropy import ExitLoss, exit_loss
from megatron_sorted.loss.taught_choice import ChoiceCrossEntropy
from megatron_sorted.platform.contract import Platform
from megatron_sorted.settings.derived import last_exit_teaches, taught_exits
from megatron_sorted.settings.exits import loss_chunk_tokens
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model
from megatron_sorted.training.step.carrier import teach
from megatron_sorted.training.step.confidence import Confidences
from megatron_sorted.training.step.micro_batches import MicroBatch
from megatron_sorted.training.step.top_tokens import TopTokens


class ExitLosses:
    """The losses of exits, in training and in evaluation.

    Attributes:
        top_tokens: Most likely tokens of the current step, where micro-batches ask for them.
        confidences: The probabilities of these tokens, likewise.
    """

    def __init__(self, settings: Settings, model: Model, platform: Platform):
        self.settings, self.model = settings, model
        weight = settings.exit_kd_weight
        if settings.exit_kd_target == "choice":
            self.taught = partial(ChoiceCrossEntropy, weight=weight)
        else:
            rule = Distillation(weight, settings.exit_kd_temperature, settings.exit_kd_top_k)
            self.taught = partial(TaughtCrossEntropy, rule=rule)
        self.chunk_tokens = loss_chunk_tokens(settings, on_cpu=platform.is_processor)
        groups = model.groups
        self.top_tokens, self.confidences = TopTokens(groups.pp), Confidences(groups.pp)

    def compute(
        self, micro: MicroBatch, depth: int, hidden_tbh: torch.Tensor, factor: torch.Tensor | None
    ) -> tuple[ExitLoss, torch.Tensor | None]:
        """Return losses and gradient of the exit at ``depth``, as ``exit_loss`` does.

        Collective: that of ``exit_loss``.
        """
        chunk, model = micro.chunk, self.model
        before_exit, _ = chunk.exit_hooks
        before_exit(depth)
        head = chunk.head(depth, micro.attention_mask, hidden_tbh.size(0))
        request = LossRequest(
            micro.targets, model.shard, self.chunk_tokens, micro.with_choice, micro.with_confidence
        )
        token_loss = CrossEntropy(request)
        if micro.teacher_slot is not None and taught_exits(self.settings, [depth]):
            weight_ph = (
                chunk.heads.output.weight
                if model.teacher is None
                else model.teacher.weight_ph(chunk.layout.chunk)
            )
            token_loss = self.taught(
                request, teacher_tbh=micro.teacher_slot.normed_tbh, teacher_ph=weight_ph
            )
        losses, gradient = exit_loss(hidden_tbh, head.norm, head.weight_ph, token_loss, factor)
        if micro.with_choice:
            self.top_tokens.add(depth, micro.number, losses.choice_n)
        if micro.with_confidence:
            self.confidences.add(depth, micro.number, losses.confidence_n, model.vocab_size)
        return losses, gradient


def make_gradient_rule(settings: Settings, groups: ProcessGroupCollection) -> GradientRule:
    """Build the rule that joins an exit's gradient with those of deeper exits."""
    whole, group = settings.exit_gradient_scope == "micro-batch", None
    if whole and settings.sequence_parallel and settings.tensor_model_parallel_size > 1:
        group = groups.tp if settings.context_parallel_size == 1 else groups.tp_cp
    elif whole and settings.context_parallel_size > 1:
        group = groups.cp
    return GradientRule(settings.exit_gradient_rule, whole, settings.exit_gradient_balance, group)


class TrainedExits:
    """The exits of a training step, whose losses are computed in backward.

    Attributes:
        losses: The computation of their losses.
        ledger: The sums of losses and gradients.
    """

    def __init__(self, losses: ExitLosses, ledger: Ledger):
        self.settings, self.losses, self.ledger = losses.settings, losses, ledger
        self.gradient_rule = make_gradient_rule(self.settings, losses.model.groups)

    def attach(self, micro: MicroBatch, depth: int, hidden_tbh: torch.Tensor) -> torch.Tensor:
        """Return the hidden state from which deeper layers continue; see ``loss.deferred``."""
        settings, chunk = self.settings, micro.chunk
        coefficient = micro.coefficients.get(depth, 0.0)
        backward = partial(self.backward, micro, depth) if coefficient else None
        slot = micro.teacher_slot
        if slot is not None and depth == settings.num_layers and last_exit_teaches(settings):
            backward = teach(backward, chunk.head(depth).norm, slot)
        announced = chunk.heads.complete_at(depth) if settings.overlap_grad_reduce else ()
        is_deepest, is_bare = depth == micro.deepest, backward is None and not announced
        if hidden_tbh.requires_grad and is_deepest:
            return end(hidden_tbh, backward, coefficient, announced)
        if not hidden_tbh.requires_grad:  # nothing below trains
            if not is_bare:
                factor = coefficient * micro.factor
                micro.attached.append(AttachedExit(hidden_tbh, backward, factor, announced))
            return torch.zeros((), device=hidden_tbh.device) if is_deepest else hidden_tbh
        if is_bare:
            return hidden_tbh
        join = partial(self._join, micro, depth)
        return tap(hidden_tbh, backward, coefficient * micro.factor, announced, join)

    def backward(
        self, micro: MicroBatch, depth: int, hidden_tbh: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient to the exit's hidden state; add loss and gradient to the ledger.

        Collective: that of ``exit_loss``.
        """
        losses, gradient = self.losses.compute(micro, depth, hidden_tbh, factor)
        _, after_exit = micro.chunk.exit_hooks
        after_exit(depth)
        self.ledger.add(depth, losses, micro.targets.loss_mask_n)
        self.ledger.add_gradient(depth, gradient)
        return gradient

    def _join(
        self, micro: MicroBatch, depth: int, own_tbh: torch.Tensor, deeper_tbh: torch.Tensor
    ) -> torch.Tensor:
        """Join the exit's own gradient with that of the deeper exits, for the layers below.

        Collective: that of ``GradientRule.join``.
        """
        if micro.compares_gradients:
            self.ledger.add_gradient_pair(depth, own_tbh, deeper_tbh)
        num_deeper = sum(other > depth for other in micro.coefficients)
        return self.gradient_rule.join(own_tbh, deeper_tbh, num_deeper)
