"""The learned rules in plain PyTorch on one process; shares no code with megatron_sorted."""

import hashlib
import math

import torch
import torch.nn.functional as F

from tests.support.reference import layer


def chance(text):
    """Return a number in [0, 1) from a text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def softmax(x):
    return torch.tensor(x, dtype=torch.float64).softmax(0).tolist()


class ReferenceRule:
    """A rule whose lists are in the order of depths; ``s`` holds the run's settings."""

    def __init__(self, name, s, depths):
        self.name, self.s, self.depths, self.e = name, s, depths, len(depths)
        self.memory = [None] * self.e
        self.history, self.shares, self.range, self.multiplier, self.average = (
            [],
            [1 / self.e] * self.e,
            (0.0, 1.0),
            0.0,
            None,
        )

    def base(self, step):
        s, e = self.s, self.e
        if self.name == "uncertainty":
            w = [
                math.exp(-(m if m is not None else math.log(s.exit_uncertainty_variance)))
                for m in self.memory
            ]
        elif self.name == "inverse_loss":
            w = [1.0] * e if None in self.memory else [1 / m for m in self.memory]
        elif self.name == "dwa":
            n, whole = s.exit_dwa_window, len(self.history) // s.exit_dwa_window
            ratio = [1.0] * e
            if whole >= 2:
                windows = [self.history[(whole - k) * n : (whole - k + 1) * n] for k in (1, 2)]
                last, before = (
                    torch.tensor(window, dtype=torch.float64).mean(0) for window in windows
                )
                ratio = (last / before).tolist()
            w = softmax([r / s.exit_dwa_temperature for r in ratio])
        elif self.name == "gradnorm":
            w = softmax([m or 0.0 for m in self.memory])
        elif self.name == "simulated_exit":
            b = s.exit_simulated_sharpness * step / s.train_iters
            rows = [
                softmax([-b * abs(leaves - other) for other in range(e)]) for leaves in range(e)
            ]
            w = [
                sum(m * row[other] for m, row in zip(self.shares, rows, strict=True))
                for other in range(e)
            ]
        elif self.name == "excess_loss":
            w = self.shares
        else:
            w = [1.0] * e
        return [x / sum(w) for x in w]

    def coefficients(self, step):
        w = self.base(step)
        if self.s.exit_guard:
            w = [
                (x + self.multiplier * (i == self.e - 1)) / (1 + self.multiplier)
                for i, x in enumerate(w)
            ]
        return dict(zip(self.depths, w, strict=True))

    def thresholds(self, step):
        low, high = self.range
        return [
            low + (high - low) * chance(f"exit threshold {self.s.seed}/{step}/{k}")
            for k in range(self.s.exit_simulated_thresholds)
        ]

    def observe(self, step, losses, unit_norms, confidence_ne):
        s, now = self.s, self.base(step)
        if self.name == "uncertainty":
            self.memory = [
                math.log(s.exit_uncertainty_variance) if m is None else m for m in self.memory
            ]
            tensor = torch.tensor(self.memory, dtype=torch.float64, requires_grad=True)
            (
                torch.tensor(losses, dtype=torch.float64) / (2 * tensor.exp()) + tensor / 2
            ).sum().backward()
            self.memory = (tensor - s.exit_uncertainty_rate * tensor.grad).tolist()
        if self.name == "inverse_loss":
            d = s.exit_inverse_loss_decay
            self.memory = [
                x if m is None else d * m + (1 - d) * x
                for m, x in zip(self.memory, losses, strict=True)
            ]
        if self.name == "gradnorm":
            self.history = self.history or [losses]
            scores = torch.tensor(
                [m or 0.0 for m in self.memory], dtype=torch.float64, requires_grad=True
            )
            norm = self.e * scores.softmax(0) * torch.tensor(unit_norms, dtype=torch.float64)
            ratio = torch.tensor(losses, dtype=torch.float64) / torch.tensor(
                self.history[0], dtype=torch.float64
            )
            (
                norm / norm.detach().mean() - (ratio / ratio.mean()) ** s.exit_gradnorm_alpha
            ).abs().sum().backward()
            self.memory = (scores - s.exit_gradnorm_rate * scores.grad).tolist()
        if self.name == "dwa":
            self.history.append(losses)
        if self.name == "excess_loss":
            grown = [
                m * math.exp(s.exit_excess_rate * max(x - r, 0))
                for m, x, r in zip(now, losses, s.exit_reference_loss, strict=True)
            ]
            self.shares = [
                (1 - s.exit_excess_smoothing) * g / sum(grown) + s.exit_excess_smoothing / self.e
                for g in grown
            ]
        if self.name == "simulated_exit":
            counts = [0] * self.e
            for threshold in self.thresholds(step):
                for row in confidence_ne.tolist():
                    counts[next((i for i, c in enumerate(row) if c > threshold), self.e - 1)] += 1
            self.shares = [c / sum(counts) for c in counts]
            place = (
                ((1 + confidence_ne.double().log() / math.log(s.vocab_size)) * 64)
                .floor()
                .clamp(0, 63)
            )
            self.range = (
                s.vocab_size ** (place.min().item() / 64 - 1),
                s.vocab_size ** ((place.max().item() + 1) / 64 - 1),
            )
        if s.exit_guard:
            d = s.exit_guard_decay
            self.average = (
                losses[-1] if self.average is None else d * self.average + (1 - d) * losses[-1]
            )
            over = self.average - s.exit_guard_loss - s.exit_guard_margin
            self.multiplier = min(
                max(self.multiplier + s.exit_guard_rate * over, 0), s.exit_guard_largest
            )


def drops(s, step, num_samples):
    """Return [layers, samples], whether a sample passes a layer unchanged."""
    grown = (
        math.exp(step * math.log(2) / (s.train_iters - 1)) - 1
        if s.layer_dropout_schedule == "exponential"
        else 1.0
    )
    limits = [
        s.layer_dropout * grown * (math.exp(i * math.log(2) / (s.num_layers - 1)) - 1)
        for i in range(s.num_layers)
    ]
    return [
        [chance(f"layer dropout {s.seed}/{step}/{n}/{i}") < limit for n in range(num_samples)]
        for i, limit in enumerate(limits)
    ]


def reference_step(p, s, samples, step, depths):
    """Return for each exit: masked loss of every token [b, s], the exit's input, and the logits."""
    allowed = torch.ones(s.seq_length, s.seq_length, dtype=torch.bool).tril()[None, None]
    allowed = allowed & (
        samples["segments"][:, None, :, None] == samples["segments"][:, None, None, :]
    )
    x, losses, reads, logits = p["embedding.word_embeddings.weight"][samples["tokens"]], {}, {}, {}
    dropped = drops(s, step, x.size(0))
    for i in range(s.num_layers):
        out = layer(
            p,
            f"decoder.layers.{i}.",
            x,
            s.num_attention_heads,
            s.num_query_groups,
            allowed,
            s.norm_epsilon,
        )
        x = (
            x + (~torch.tensor(dropped[i])).float()[:, None, None] * (out - x)
            if any(dropped[i])
            else out
        )
        if i + 1 in depths:
            reads[i + 1] = x
            normed = F.rms_norm(
                x, x.shape[-1:], p["decoder.final_layernorm.weight"], s.norm_epsilon
            )
            logits[i + 1] = normed @ p["embedding.word_embeddings.weight"][: s.vocab_size].t()
            losses[i + 1] = (
                F.cross_entropy(logits[i + 1].transpose(1, 2), samples["labels"], reduction="none")
                * samples["mask"]
            )
    return losses, reads, logits


def reference_run(s, weights, steps, depths, make_samples, skipped=()):
    """Return losses, coefficients and final weights; steps in ``skipped`` change nothing."""
    p = {name: w.clone().requires_grad_() for name, w in weights.items()}
    groups = [
        {"params": [w for w in p.values() if w.dim() > 1], "weight_decay": s.weight_decay},
        {"params": [w for w in p.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=s.lr, betas=(s.adam_beta1, s.adam_beta2), eps=s.adam_eps
    )
    rule, seen_losses, seen_coefficients = (
        ReferenceRule(s.exit_layer_weight_rule, s, depths),
        [],
        [],
    )
    for step in range(steps):
        samples = make_samples(s.global_batch_size, s.seq_length, 100 + step, True, True)
        losses, reads, logits = reference_step(p, s, samples, step, depths)
        means = {d: loss.sum() / samples["mask"].sum() for d, loss in losses.items()}
        coefficients = rule.coefficients(step)
        norms = [
            torch.autograd.grad(means[d], reads[d], retain_graph=True)[0].norm().item()
            for d in depths
        ]
        counted = samples["mask"].bool()
        confidence = torch.stack(
            [logits[d].softmax(-1).amax(-1)[counted] for d in depths], 1
        ).detach()
        seen_coefficients.append(coefficients)
        seen_losses.append({d: m.item() for d, m in means.items()})
        if step in skipped:
            continue
        optimizer.zero_grad()
        sum(coefficients[d] * means[d] for d in depths).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), s.clip_grad)
        optimizer.step()
        rule.observe(step, [means[d].item() for d in depths], norms, confidence)
    return (
        seen_losses,
        seen_coefficients,
        {name: w.detach() for name, w in p.items()},
        rule.coefficients(steps),
    )
