"""A norm, an output matrix and tokens for tests of the loss, and the same loss in plain PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_sorted.loss.cross_entropy import CrossEntropy, LossRequest, Targets, VocabularyShard

EPSILON = 1e-5


@dataclass
class LossCase:
    """Inputs of ``exit_loss``: hidden [t, b, h], a random RMSNorm and a random output matrix."""

    hidden_tbh: torch.Tensor
    norm: torch.nn.RMSNorm
    weight_ph: torch.nn.Parameter
    targets: Targets
    shard: VocabularyShard

    def request(self, chunk_tokens: int, **more) -> LossRequest:
        """Return the request of an exit for the tokens."""
        return LossRequest(self.targets, self.shard, chunk_tokens, **more)

    def loss(self, chunk_tokens: int, **more) -> CrossEntropy:
        """Return the loss of the labels alone."""
        return CrossEntropy(self.request(chunk_tokens, **more))


def make_case(
    t=5, b=3, h=8, rows=24, vocabulary=None, index=None, weighted=False, dtype=torch.float32
) -> LossCase:
    """Return a case of ``rows`` rows, of which ``vocabulary`` are real tokens.

    ``index`` holds the counted places, and ``weighted`` draws a mask instead of ones.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    vocabulary = rows if vocabulary is None else vocabulary
    hidden = (2 * draw(t, b, h)).to(dtype)
    norm = torch.nn.RMSNorm(h, eps=EPSILON, dtype=dtype)
    norm.weight.data = (1 + 0.3 * draw(h)).to(dtype)
    weight = torch.nn.Parameter(draw(rows, h).to(dtype))
    places = torch.arange(t * b) if index is None else torch.tensor(index, dtype=torch.long)
    labels = torch.randint(0, vocabulary, (t * b,), generator=generator)[places]
    mask = torch.rand(len(places), generator=generator) if weighted else torch.ones(len(places))
    return LossCase(
        hidden,
        norm,
        weight,
        Targets(None if index is None else places, labels, mask),
        VocabularyShard(0, vocabulary),
    )


@dataclass
class Expected:
    """The results of plain PyTorch."""

    loss_n: torch.Tensor
    correct_n: torch.Tensor
    d_hidden: torch.Tensor
    d_norm: torch.Tensor
    d_weight: torch.Tensor


def reference(case: LossCase, factor: float, dtype: torch.dtype) -> Expected:
    """Return loss and gradients of ``factor * sum(mask * loss)`` by autograd in ``dtype``."""
    leaves = [
        x.detach().to(dtype).requires_grad_()
        for x in (case.hidden_tbh, case.norm.weight, case.weight_ph)
    ]
    hidden, norm, weight = leaves
    logits = (
        F.rms_norm(hidden, hidden.shape[-1:], norm, EPSILON).flatten(0, 1)
        @ weight[: case.shard.size].t()
    )
    if case.targets.index_n is not None:
        logits = logits[case.targets.index_n]
    losses = F.cross_entropy(logits, case.targets.labels_n, reduction="none")
    gradients = torch.autograd.grad(
        factor * (losses * case.targets.loss_mask_n.to(dtype)).sum(), leaves
    )
    return Expected(losses.detach(), logits.argmax(1) == case.targets.labels_n, *gradients)
