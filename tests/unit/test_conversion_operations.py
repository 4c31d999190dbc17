import pytest
import torch

from megatron_sorted.conversion.tensors.operations import Copy, QueryKeyValue, Stack, Vocabulary


def rows(*values):
    return torch.tensor([[value, value + 0.5] for value in values], dtype=torch.float32)


def test_queries_keys_and_values_are_ordered_by_group():
    # 4 query heads of width 2, 2 groups: rows are numbered head * 10 + channel
    query, key, value = (
        rows(0, 1, 10, 11, 20, 21, 30, 31),
        rows(100, 101, 110, 111),
        rows(200, 201, 210, 211),
    )
    operation = QueryKeyValue(4, 2)
    shape = operation.joined_shape([(8, 2), (4, 2), (4, 2)])
    assert shape == (16, 2)
    fused = operation.join(iter((query, key, value)), shape)
    assert fused[:, 0].tolist() == [
        0,
        1,
        10,
        11,
        100,
        101,
        200,
        201,
        20,
        21,
        30,
        31,
        110,
        111,
        210,
        211,
    ]
    assert all(
        torch.equal(*pair) for pair in zip(operation.split(fused), (query, key, value), strict=True)
    )


def test_a_bias_is_ordered_like_its_matrix():
    operation = QueryKeyValue(2, 1)
    fused = operation.join(
        iter((torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6]), torch.tensor([7.0, 8]))), (8,)
    )
    assert fused.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [part.tolist() for part in operation.split(fused)] == [[1, 2, 3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 2), (4, 1, 3), (6, 3, 1), (1, 1, 5)])
def test_splitting_gives_back_what_was_joined(heads, groups, width):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(count * width, 7, generator=generator).bfloat16()
        for count in (heads, groups, groups)
    ]
    operation = QueryKeyValue(heads, groups)
    fused = operation.join(
        iter(parts), operation.joined_shape([tuple(part.shape) for part in parts])
    )
    assert fused.dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(operation.split(fused), parts, strict=True))


def test_gate_rows_come_before_up_rows():
    gate, up = rows(1, 2), rows(3, 4)
    stacked = Stack().join(iter((gate, up)), Stack().joined_shape([(2, 2), (2, 2)]))
    assert stacked[:, 0].tolist() == [1, 2, 3, 4]
    assert [part[:, 0].tolist() for part in Stack().split(stacked)] == [[1, 2], [3, 4]]


def test_padding_of_the_vocabulary_is_removed():
    assert [part.tolist() for part in Vocabulary(2).split(rows(1, 2, 0, 0))] == [
        rows(1, 2).tolist()
    ]
    assert Vocabulary(2).join(iter((rows(1, 2),)), (2, 2)).tolist() == rows(1, 2).tolist()
    assert torch.equal(Copy().split(rows(1))[0], rows(1))
