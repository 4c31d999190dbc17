"""Self-distillation and gradient rules in plain PyTorch, the reference of parallel layouts."""

import torch
import torch.nn.functional as F

from megatron_sorted.settings.derived import exit_depths
from tests.support.reference import exit_logits


def divergence(
    exit_logits_v: torch.Tensor,
    teacher_logits_v: torch.Tensor,
    temperature: float,
    top_k: int | None,
) -> torch.Tensor:
    """Return KL(teacher || exit) of every token, both at the temperature.

    The teacher is cut to its ``top_k`` most likely tokens.
    """
    teacher = (teacher_logits_v / temperature).softmax(-1)
    if top_k is not None:
        kept = torch.zeros_like(teacher).scatter(-1, teacher.topk(top_k, dim=-1).indices, 1.0)
        teacher = teacher * kept / (teacher * kept).sum(-1, keepdim=True)
    return F.kl_div((exit_logits_v / temperature).log_softmax(-1), teacher, reduction="none").sum(
        -1
    )


def _apart(settings, exit_logits_bsv: torch.Tensor, teacher_bsv: torch.Tensor) -> torch.Tensor:
    """Return how far every token of an exit is from what it learns of its teacher; [b, s]."""
    if settings.exit_kd_target == "choice":
        choice_bs = teacher_bsv.argmax(-1)
        return F.cross_entropy(exit_logits_bsv.transpose(1, 2), choice_bs, reduction="none")
    return divergence(
        exit_logits_bsv, teacher_bsv, settings.exit_kd_temperature, settings.exit_kd_top_k
    )


class Meet(torch.autograd.Function):
    """A fork of x [b, s, h] to deeper layers and an exit; backward joins their gradients."""

    @staticmethod
    def forward(ctx, x, rule):
        ctx.rule = rule
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx, deeper, own):
        return ctx.rule(own, deeper), None


def join_by_rule(settings, num_above: int, own: torch.Tensor, deeper: torch.Tensor) -> torch.Tensor:
    """Return the gradient below an exit by the settings' rule, per ``micro_batch_size`` rows."""
    if settings.exit_gradient_rule == "equilibrium":
        n = num_above + 1
        return own / n + deeper * (n - 1) / n
    if settings.exit_gradient_scope == "token":
        groups = [(own.reshape(-1, own.size(-1)), deeper.reshape(-1, own.size(-1)))]
    else:
        size = settings.micro_batch_size
        groups = [
            (o.reshape(1, -1), d.reshape(1, -1))
            for o, d in zip(own.split(size), deeper.split(size), strict=True)
        ]
    joined = []
    for o, d in groups:
        o, d = o.double(), d.double()
        if settings.exit_gradient_rule == "balance":
            both = (o.norm(dim=1) > 0) & (d.norm(dim=1) > 0)
            factor = torch.where(
                both,
                settings.exit_gradient_balance * d.norm(dim=1) / o.norm(dim=1).clamp(min=1e-300),
                1.0,
            )
            joined.append(o * factor[:, None] + d)
        else:
            against = ((o * d).sum(1) < 0)[:, None]
            part = (
                (o * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True).clamp(min=1e-300) * d
            )
            joined.append(torch.where(against, o - part, o) + d)
    return torch.cat(joined).reshape(own.shape).to(own.dtype)


class Objective:
    """The objective of training, for ``reference_run``; it keeps the numbers it measured.

    Attributes:
        kd: Per step {depth: mean divergence from the last exit}, without the temperature's square;
            from its choice, where exits learn that.
        agreement: Per step {depth: share of trained tokens whose choice is the teacher's}.
        teach: A function that returns a teacher's logits for tokens and segments; None where the
            last exit teaches the others.
        meetings: {depth: (cosine, ratio of norms)} between an exit's own gradient and the deeper
            exits', for each step; filled by backward.
    """

    def __init__(self, mean_by_rule, teach=None):
        self.mean_by_rule, self.teach = mean_by_rule, teach
        self.kd, self.agreement, self.meetings = [], [], []

    def __call__(self, settings, parameters, samples, segments, coefficients):
        """Return the mean cross entropy of every exit, and the objective of training."""
        self.meetings.append({})
        logits = self._logits(
            settings, parameters, samples, segments, coefficients, self.meetings[-1]
        )
        mask, last = samples["mask"], settings.num_layers
        entropies = {
            d: self.mean_by_rule(
                settings,
                F.cross_entropy(z.transpose(1, 2), samples["labels"], reduction="none") * mask,
                mask,
            )
            for d, z in logits.items()
        }
        share, temperature = settings.exit_kd_weight, settings.exit_kd_temperature
        teacher = self.teach(samples["tokens"], segments) if self.teach else logits[last].detach()
        apart = (
            {}
            if not share
            else {
                d: self.mean_by_rule(settings, _apart(settings, z, teacher) * mask, mask)
                for d, z in logits.items()
                if d != last or self.teach
            }
        )
        self.kd.append({d: value.item() for d, value in apart.items()})
        self.agreement.append(
            {
                d: (((logits[d].argmax(-1) == teacher.argmax(-1)) * mask).sum() / mask.sum()).item()
                for d in apart
            }
        )
        total = sum(
            c
            * (
                ((1 - share) * entropies[d] + share * temperature**2 * apart[d])
                if d in apart
                else entropies[d]
            )
            for d, c in coefficients.items()
        )
        return entropies, total

    def _logits(self, settings, parameters, samples, segments, coefficients, meetings):
        def split(depth, x):
            if depth not in coefficients or depth == max(coefficients):
                return x, x
            above = sum(other > depth for other in coefficients)

            def rule(own, deeper):
                meetings[depth] = (
                    F.cosine_similarity(own.flatten(), deeper.flatten(), dim=0).item(),
                    (own.norm() / deeper.norm()).item(),
                )
                return (
                    own + deeper
                    if settings.exit_gradient_rule == "sum"
                    else join_by_rule(settings, above, own, deeper)
                )

            return Meet.apply(x, rule)

        return exit_logits(
            parameters,
            samples["tokens"],
            segments,
            exit_depths(settings),
            settings.num_attention_heads,
            settings.num_query_groups,
            settings.vocab_size,
            settings.norm_epsilon,
            split=split,
        )
