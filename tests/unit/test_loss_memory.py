"""Nothing as large as the logits or the output matrix is ever made."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sorted.loss.linear_cross_entropy import exit_loss
from tests.support.loss_case import make_case


class Allocations(TorchDispatchMode):
    """Records the size in bytes of every storage that an operation makes."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Return what the operation returns."""
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given | self.known:
                self.sizes.append(storage.nbytes())
        return result


def largest_allocation(dtype, chunk_tokens):
    """Return (largest new storage of a training call, bytes of a chunk's logits in fp32).

    The head is 1000 x 64, for 128 tokens.
    """
    case = make_case(t=64, b=2, h=64, rows=1000, dtype=dtype)
    case.weight_ph.main_grad, case.norm.weight.main_grad = torch.zeros(1000, 64), torch.zeros(64)
    with Allocations([case.weight_ph, case.weight_ph.main_grad]) as seen:
        exit_loss(
            case.hidden_tbh, case.norm, case.weight_ph, case.loss(chunk_tokens), torch.tensor(1.0)
        )
    return max(seen.sizes), chunk_tokens * 1000 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_tensor_is_a_chunk_of_logits(dtype):
    largest, chunk_bytes = largest_allocation(dtype, chunk_tokens=16)
    assert (
        largest <= chunk_bytes
    )  # 64,000 bytes; the head has 256,000 in fp32 (128,000 in bf16), all logits 512,000


def test_recorder_sees_whole_logits():
    assert largest_allocation(torch.float32, chunk_tokens=128)[0] == 128 * 1000 * 4
