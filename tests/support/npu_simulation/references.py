"""Plain versions of the fused operations that the project calls on NPUs, forward and backward.

They run on CPU tensors and follow the documentation of the operations. Results are summed in fp32
and have the dtype of the operands.
"""

import torch
from torch.nn.functional import silu

MASK_TOKENS = 2048  # sides of the only mask that sparse mode 2 takes, for every length
_seen_masks: set[int] = set()  # addresses of masks that were checked


def _heads(x: torch.Tensor, heads: int, layout: str) -> torch.Tensor:
    """Return [b, n, s, d] in fp32, from the layouts SBH, BSH, BSND and BNSD."""
    if layout == "BNSD":
        return x.float()
    if layout == "BSND":
        return x.float().transpose(1, 2)
    if layout not in ("SBH", "BSH"):
        raise NotImplementedError(f"attention layout {layout} is not simulated")
    split = x.float().unflatten(-1, (heads, -1))
    return split.permute(1, 2, 0, 3) if layout == "SBH" else split.transpose(1, 2)


def _joined(x_bnsd: torch.Tensor, like: torch.Tensor, layout: str) -> torch.Tensor:
    """Join what ``_heads`` has split, in the dtype of ``like``."""
    order = {"SBH": (2, 0, 1, 3), "BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}[
        layout
    ]
    joined = x_bnsd.permute(order)
    return (joined.flatten(-2) if layout in ("SBH", "BSH") else joined).to(like.dtype).contiguous()


def _operands(query, key, value, head_num, layout):
    """Return query, key and value by heads, and how often key and value were repeated."""
    axis = {"BNSD": 1, "BSND": 2}.get(layout)
    groups = key.size(axis) if axis else key.size(-1) // (query.size(-1) // head_num)
    times = head_num // groups
    key, value = (_heads(x, groups, layout).repeat_interleave(times, 1) for x in (key, value))
    return _heads(query, head_num, layout), key, value, times


def _scores(query, key, scale, atten_mask, sparse_mode):
    """Return the masked scores [b, n, s, s]; the mask is True where attention is forbidden."""
    scores = query @ key.transpose(-1, -2) * scale
    rows, columns = scores.shape[-2:]
    if sparse_mode == 2:
        assert atten_mask is not None and atten_mask.shape[-2:] == (MASK_TOKENS, MASK_TOKENS), (
            "sparse mode 2 takes the fixed mask"
        )
        if atten_mask.data_ptr() not in _seen_masks:
            assert torch.equal(
                atten_mask.bool(), torch.ones(MASK_TOKENS, MASK_TOKENS, dtype=torch.bool).triu(1)
            ), "an upper triangle"
            _seen_masks.add(atten_mask.data_ptr())
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    elif sparse_mode in (0, 1):
        assert sparse_mode == 0 or atten_mask is not None, "sparse mode 1 takes a whole mask"
        if atten_mask is None or not atten_mask.numel():
            return scores
        assert atten_mask.dtype in (torch.bool, torch.uint8), (
            f"masks of {atten_mask.dtype} are not taken"
        )
        assert atten_mask.shape[-2:] == (rows, columns), (
            f"mask {tuple(atten_mask.shape)} of {rows} by {columns} scores"
        )
        hidden = atten_mask.bool()
    else:
        raise NotImplementedError(f"sparse mode {sparse_mode} is not simulated")
    return scores.masked_fill(hidden, float("-inf"))


def fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    sparse_mode=0,
    pse=None,
    padding_mask=None,
    **_unused,
):
    """Return the attention output, maxima and sums of the softmax, and four unused values.

    Maxima and sums are repeated eight times, as on the device.
    """
    assert keep_prob == 1.0 and pse is None and padding_mask is None, (
        "dropout, biases and padding are not simulated"
    )
    q, k, v, _ = _operands(query, key, value, head_num, input_layout)
    scores = _scores(q, k, scale, atten_mask, sparse_mode)
    highest = scores.amax(-1, keepdim=True)
    exponentials = (scores - highest).exp()
    total = exponentials.sum(-1, keepdim=True)
    statistics = [x.expand(*x.shape[:-1], 8).contiguous() for x in (highest, total)]
    return (
        _joined(exponentials / total @ v, query, input_layout),
        *statistics,
        query.new_empty(0),
        0,
        0,
        0,
    )


def fusion_attention_grad(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    scale_value=1.0,
    sparse_mode=0,
    **_unused,
):
    """Return the gradients of query, key and value, and two unused values."""
    q, k, v, times = _operands(query, key, value, head_num, input_layout)
    d_context = _heads(dy, head_num, input_layout)
    probabilities = _scores(q, k, scale_value, atten_mask, sparse_mode).softmax(-1)
    d_probabilities = d_context @ v.transpose(-1, -2)
    d_scores = (
        probabilities
        * (d_probabilities - (d_probabilities * probabilities).sum(-1, keepdim=True))
        * scale_value
    )

    def grouped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _joined(x.unflatten(1, (-1, times)).sum(2), like, input_layout)

    return (
        _joined(d_scores @ k, query, input_layout),
        grouped(d_scores.transpose(-1, -2) @ q, key),
        grouped(probabilities.transpose(-1, -2) @ d_context, value),
        torch.empty(0),
        torch.empty(0),
    )


def rms_norm(input, gamma, epsilon=1e-6):
    """Return the norm over the dimensions of ``gamma`` and the inverse root mean square."""
    x = input.float()
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * inverse * gamma.float()).to(input.dtype), inverse


def rms_norm_backward(dy, input, gamma, rstd):
    """Return the gradients of input and ``gamma``."""
    normed, d_normed = input.float() * rstd, dy.float() * gamma.float()
    d_input = rstd * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_input.to(input.dtype), (dy.float() * normed).flatten(0, -2).sum(0)


def swiglu(input, dim=-1):
    """Return silu of the first half times the second."""
    gate, up = input.float().chunk(2, dim)
    return (silu(gate) * up).to(input.dtype)


def swiglu_backward(grad_output, input, dim=-1):
    """Return the gradient of the input."""
    gate, up = input.float().chunk(2, dim)
    grad, open_gate = grad_output.float(), gate.sigmoid()
    d_gate = grad * up * (open_gate + gate * open_gate * (1 - open_gate))
    return torch.cat((d_gate, grad * gate * open_gate), dim).to(input.dtype)


def _quarter_turn(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    """Return the input turned by angles whose cosines and sines are ``r1`` and ``r2``."""
    if rotary_mode != "half":
        raise NotImplementedError(f"rotary mode {rotary_mode} is not simulated")
    return input * r1 + _quarter_turn(input) * r2


def rotary_mul_backward(grad, input, r1, r2, rotary_mode="half"):
    """Return the gradients of the input, ``r1`` and ``r2``."""
    turned_back = _quarter_turn(grad * r2).neg()
    return (
        grad * r1 + turned_back,
        (grad * input).sum_to_size(r1.shape),
        (grad * _quarter_turn(input)).sum_to_size(r2.shape),
    )


def matmul_backward(grad, self, other, mask):
    """Return the gradients of both factors, which the device's own product computes in one call."""
    left = self[None] if self.dim() == 1 else self
    right = other[:, None] if other.dim() == 1 else other
    grad = grad.unsqueeze(-2) if self.dim() == 1 else grad
    grad = grad.unsqueeze(-1) if other.dim() == 1 else grad
    d_left = (
        (grad @ right.transpose(-1, -2)).sum_to_size(left.shape).reshape(self.shape)
        if mask[0]
        else None
    )
    d_right = (
        (left.transpose(-1, -2) @ grad).sum_to_size(right.shape).reshape(other.shape)
        if mask[1]
        else None
    )
    return d_left, d_right


def linear_backward(self, grad_output, weight, output_mask):
    """Return the gradients of a linear layer's input, weight and bias."""
    rows, grads = self.flatten(0, -2), grad_output.flatten(0, -2)
    return (
        grad_output @ weight if output_mask[0] else None,
        grads.t() @ rows if output_mask[1] else None,
        grads.sum(0) if output_mask[2] else None,
    )


REFERENCES = {
    "npu::npu_fusion_attention": fusion_attention,
    "npu::npu_fusion_attention_grad": fusion_attention_grad,
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_rms_norm_backward": rms_norm_backward,
    "npu::npu_swiglu": swiglu,
    "npu::npu_swiglu_backward": swiglu_backward,
    "npu::npu_rotary_mul": rotary_mul,
    "npu::npu_rotary_mul_backward": rotary_mul_backward,
    "aten::matmul_backward": matmul_backward,
    "aten::linear_backward": linear_backward,
}
