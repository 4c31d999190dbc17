"""The method in plain PyTorch, on one process: the reference of every parallel layout.

A LLaMA-style (RMSNorm, rotary, SwiGLU, no bias) network whose every exit is read through a norm and
a head. It shares no code with megatron_sorted or Megatron. Parameters have the global names of the
sharded checkpoint.
"""

import torch
import torch.nn.functional as F


def rotate(x, positions, base=10000.0):
    """Return the rotary embedding of x [b, n, s, d], halves convention.

    Source: GPT-NeoX; Su et al., arXiv 2104.09864.
    """
    d = x.size(-1)
    angle = positions[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    left, right = x[..., : d // 2], x[..., d // 2 :]
    return x * cos + torch.cat((-right, left), -1) * sin


def mlp(x, norm, up, down, eps, post=None):
    """Return x [b, s, h] after a normed gated MLP with residual; ``post`` norms its output."""
    left, right = (F.rms_norm(x, x.shape[-1:], norm, eps) @ up.t()).chunk(2, -1)
    y = (F.silu(left) * right) @ down.t()
    return x + (y if post is None else F.rms_norm(y, x.shape[-1:], post, eps))


def experts_mlp(p, prefix, x, eps, topk, routed):
    """Return x [b, s, h] after a normed mixture of gated MLPs with residual.

    Each token is given to the ``topk`` experts of its largest router logits, whose softmax weighs
    them; a single one has its share of the softmax over all. Every expert is computed for every
    token, so that nothing is sent or sorted. Logits [b, s, e] and choices [b, s, topk] are appended
    to ``routed``.
    """
    y = F.rms_norm(x, x.shape[-1:], p[prefix + "pre_mlp_layernorm.weight"], eps)
    logits = y @ p[prefix + "mlp.router.weight"].t()
    best, chosen = logits.topk(topk, -1)
    shares = best.softmax(-1) if topk > 1 else logits.softmax(-1).gather(-1, chosen)
    routed.append((logits, chosen))
    for n in range(logits.size(-1)):
        expert = f"{prefix}mlp.experts.local_experts.{n}."
        left, right = (y @ p[expert + "linear_fc1.weight"].t()).chunk(2, -1)
        share = (shares * (chosen == n)).sum(-1, keepdim=True)
        x = x + share * ((F.silu(left) * right) @ p[expert + "linear_fc2.weight"].t())
    return x


def balance_losses(routed, micro_batch_size):
    """Return the load-balancing losses of all layers together, of every micro-batch, as a tensor.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, with shares of all choices.
    """
    total = 0.0
    for logits, chosen in routed:
        experts = logits.size(-1)
        taken = F.one_hot(chosen, experts).float().mean(2)
        losses = [
            experts * (t.mean((0, 1)) * q.mean((0, 1))).sum()
            for t, q in zip(
                taken.split(micro_batch_size),
                logits.softmax(-1).split(micro_batch_size),
                strict=True,
            )
        ]
        total = total + torch.stack(losses)
    return total


def layer(p, prefix, x, heads, groups, allowed, eps, topk=0, routed=None):
    """Return x [b, s, h] after the layer named ``prefix``; allowed [b, 1, s, s] is its mask.

    ``topk`` and ``routed`` are for a layer of experts (``experts_mlp``).
    """
    b, s, h = x.shape
    d = h // heads
    w = {
        key: p[prefix + key]
        for key in (
            "self_attention.linear_qkv.layer_norm_weight",
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
        )
    }
    y = F.rms_norm(x, (h,), w["self_attention.linear_qkv.layer_norm_weight"], eps)
    qkv = (y @ w["self_attention.linear_qkv.weight"].t()).view(
        b, s, groups, heads // groups + 2, d
    )  # per group: queries, key, value
    q = qkv[:, :, :, :-2].reshape(b, s, heads, d).transpose(1, 2)
    k, v = (qkv[:, :, :, n].transpose(1, 2).repeat_interleave(heads // groups, 1) for n in (-2, -1))
    positions = torch.arange(s, dtype=torch.float32)
    q, k = rotate(q, positions), rotate(k, positions)
    scores = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(~allowed, float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, h) @ w[
        "self_attention.linear_proj.weight"
    ].t()
    post = p.get(prefix + "post_self_attn_layernorm.weight")
    x = x + (y if post is None else F.rms_norm(y, (h,), post, eps))
    if prefix + "mlp.router.weight" in p:
        return experts_mlp(p, prefix, x, eps, topk, routed)
    return mlp(
        x,
        p[prefix + "mlp.linear_fc1.layer_norm_weight"],
        p[prefix + "mlp.linear_fc1.weight"],
        p[prefix + "mlp.linear_fc2.weight"],
        eps,
        p.get(prefix + "post_mlp_layernorm.weight"),
    )


def own_parts(p, depth, x, heads, groups, allowed, eps):
    """Return x after the exit's own parts: low-rank adapter, then a layer or an MLP."""
    if f"exit_adapters.{depth}.down.weight" in p:
        x = (
            x
            + x
            @ p[f"exit_adapters.{depth}.down.weight"].t()
            @ p[f"exit_adapters.{depth}.up.weight"].t()
        )
    if f"exit_blocks.{depth}.mlp.linear_fc2.weight" in p:
        x = layer(p, f"exit_blocks.{depth}.", x, heads, groups, allowed, eps)
    if f"exit_mlps.{depth}.linear_fc2.weight" in p:
        names = ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight")
        x = mlp(
            x,
            *(p[f"exit_mlps.{depth}.{name}"] for name in names),
            eps,
            p.get(f"exit_mlps.{depth}.post_mlp_layernorm.weight"),
        )
    return x


def exit_logits(
    p,
    tokens,
    segments,
    depths,
    heads,
    groups,
    vocab_size,
    eps=1e-5,
    read=lambda depth, x: x,
    split=lambda depth, x: (x, x),
    topk=0,
    routed=None,
):
    """Return {depth: logits [b, s, v]} over the real vocabulary.

    ``read`` may replace the tensor that an exit reads; ``split`` returns the input of the deeper
    layers and that of the exit. ``topk`` and ``routed`` are for experts (``experts_mlp``).
    """
    s = tokens.size(1)
    allowed = torch.ones(s, s, dtype=torch.bool).tril()[None, None]
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    x, logits = p["embedding.word_embeddings.weight"][tokens], {}
    for i in range(max(depths)):
        x = layer(p, f"decoder.layers.{i}.", x, heads, groups, allowed, eps, topk, routed)
        if i + 1 in depths:
            norm = p.get(f"exit_norms.{i + 1}.weight", p["decoder.final_layernorm.weight"])
            head = p.get(
                f"exit_output_layers.{i + 1}.weight",
                p.get("output_layer.weight", p["embedding.word_embeddings.weight"]),
            )
            x, seen = split(i + 1, x)
            y = own_parts(p, i + 1, read(i + 1, seen), heads, groups, allowed, eps)
            logits[i + 1] = F.rms_norm(y, x.shape[-1:], norm, eps) @ head[:vocab_size].t()
    return logits


def running_mean(weights, decay=None):
    """Return the average of a list of {name: weight}, in fp64, in the order given.

    Without ``decay`` all count alike; with it the average keeps this share of itself each time.
    Source: arXiv 1803.05407, equation 1: w_mean <- (n w_mean + w) / (n + 1).
    """
    mean = {name: weight.double() for name, weight in weights[0].items()}
    for n, later in enumerate(weights[1:], 1):
        keep = n / (n + 1) if decay is None else decay
        mean = {name: keep * old + (1 - keep) * later[name].double() for name, old in mean.items()}
    return mean


def exit_losses(
    p,
    tokens,
    labels,
    mask,
    segments,
    depths,
    heads,
    groups,
    vocab_size,
    eps=1e-5,
    topk=0,
    routed=None,
):
    """Return {depth: loss of every token [b, s] times its mask}; see ``experts_mlp``."""
    logits = exit_logits(
        p, tokens, segments, depths, heads, groups, vocab_size, eps, topk=topk, routed=routed
    )
    return {
        depth: F.cross_entropy(values.transpose(1, 2), labels, reduction="none") * mask
        for depth, values in logits.items()
    }
