"""Memory of tensors: shapes, write access, and comparison bit for bit."""

import pytest
import torch

from megatron_sorted.conversion.tensors.memory import LARGE_BYTES, bytes_of, new_tensor, same_bits


@pytest.mark.parametrize(
    "rows", [0, 3, LARGE_BYTES // 16 - 1, LARGE_BYTES // 16, LARGE_BYTES // 16 + 1]
)
def test_tensors_of_any_size_are_writable(rows):
    tensor = new_tensor((rows, 8), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes()) == (
        (rows, 8),
        torch.bfloat16,
        16 * rows,
    )
    tensor.fill_(1.5)
    assert (
        bytes_of(tensor)
        == torch.full((rows, 8), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    last = tensor[-1:].clone()
    del tensor
    assert (last == 1.5).all()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1001])
def test_every_bit_is_compared(length):
    one = torch.arange(length).to(torch.uint8)
    assert same_bits(one, one.clone())
    for at in {0, length // 2, length - 1}:
        other = one.clone()
        other[at] += 1
        assert not same_bits(one, other)


def test_equal_numbers_may_differ_in_bits():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    backing = torch.arange(40, dtype=torch.int16)
    assert same_bits(backing[3:20], backing[3:20].clone()) and not same_bits(
        backing[3:20], backing[4:21]
    )
