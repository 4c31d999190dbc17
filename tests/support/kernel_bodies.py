"""Test bodies that run the fused operations on an NPU; the tests compare with plain torch."""

from types import SimpleNamespace

import torch

from megatron_sorted.model.attention import SdpaAttention
from megatron_sorted.model.norm import Norm
from megatron_sorted.model.spec import FusedSwiglu
from megatron_sorted.platform.select import choose_platform


def fused_results(settings, cases: list[dict]) -> list[dict]:
    """Return the output and input gradients of each case, computed on the device.

    A case has "kind", "inputs" (tensors), "gradient" of the output, and for attention "mask".
    """
    from megatron.core.models.common.embeddings import rope_utils

    platform = choose_platform(settings.device)
    platform.prepare()
    platform.select_device(0)
    place = platform.device()

    def run(case: dict, inputs: list[torch.Tensor]) -> torch.Tensor:
        config = SimpleNamespace(
            normalization="RMSNorm",
            params_dtype=inputs[0].dtype,
            sequence_parallel=False,
            attention_dropout=0.0,
            kv_channels=inputs[0].size(-1),
            apply_rope_fusion=True,
            rotary_interleaved=False,
            mrope_section=None,
        )
        if case["kind"] == "norm":
            norm = Norm(config, inputs[0].size(-1), 1e-5)
            norm.weight = torch.nn.Parameter(inputs[1].detach())
            out = norm(inputs[0])
            case["weight"] = norm.weight
            return out
        if case["kind"] == "swiglu":
            return FusedSwiglu(config)(inputs[0])
        if case["kind"] == "rotary":
            return rope_utils.apply_rotary_pos_emb(
                inputs[0], case["angles"].to(place), config, cp_group=object()
            )
        attention = SdpaAttention.__new__(SdpaAttention)
        torch.nn.Module.__init__(attention)
        attention.dropout, attention.config = 0.0, config
        attention.softmax_scale = inputs[0].size(-1) ** -0.5
        mask = case.get("mask")
        return attention(*inputs, None if mask is None else mask.to(place))

    results = []
    for case in cases:
        inputs = [x.to(place).requires_grad_() for x in case["inputs"]]
        out = run(case, inputs)
        out.backward(case["gradient"].to(place))
        if "weight" in case:
            inputs[1] = case["weight"]
        assert out.device == place
        results.append({"output": out.detach().cpu(), "gradients": [x.grad.cpu() for x in inputs]})
    return results
