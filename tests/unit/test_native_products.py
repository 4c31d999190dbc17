"""Products of packed matrices equal independent ones, whatever the instructions and numbers."""

import numpy as np
import pytest

from megatron_sorted.decoding.native.library import BFLOAT16, FLOAT32, INT8, KINDS
from tests.support.native_libraries import (
    GROUP,
    WANTED,
    PackedMatrix,
    expected_product,
    library_for,
    quantized,
    rounded_to_bfloat16,
    targets,
)

SHAPES = [(1, 1), (70, 172), (129, 64), (64, 320), (3, 65), (200, 7)]
"""Outputs and inputs; most are no multiple of a block or group."""


@pytest.fixture(params=targets())
def library(request):
    return library_for(request.param)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random numbers of very different sizes, some zero."""
    generator = np.random.default_rng([seed, *shape])
    values = generator.standard_normal(shape) * np.exp(2 * generator.standard_normal(shape))
    return np.where(generator.random(shape) < 0.05, 0, values).astype(np.float32)


@pytest.mark.parametrize("target", targets())
def test_the_instructions_of_a_library_are_those_it_was_compiled_for(target):
    got = library_for(target).native_instructions().decode()
    if target in WANTED:
        assert got == WANTED[target][1]
    else:
        assert got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_a_reference_that_adds_the_same_terms(library, shape, kind):
    weights, rows = numbers(*shape), numbers(19, shape[1], seed=1)
    for bias in (None, numbers(shape[0])):
        matrix = PackedMatrix(library, KINDS[kind], weights, bias)
        np.testing.assert_array_equal(matrix(rows), expected_product(matrix, weights, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_n_rows_at_once_equal_each_alone(library, kind):
    # 2,080 inputs: several chunks, the last one short; 100 and 250 rows: several spans of them
    matrix = PackedMatrix(library, KINDS[kind], numbers(70, 2080), numbers(70))
    rows = numbers(250, 2080, seed=1)
    alone = np.concatenate([matrix(rows[i : i + 1]) for i in range(len(rows))])
    for n in (*range(1, 17), 23, 24, 70, 100, 250):
        for threads in (1, 3):
            np.testing.assert_array_equal(
                matrix(rows[:n], threads), alone[:n], f"{n} rows, {threads} threads"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_where_memory_lies(library, kind):
    matrix, rows = PackedMatrix(library, KINDS[kind], numbers(70, 172)), numbers(5, 172, seed=1)
    expected = matrix(rows)
    for shift in range(1, 17):
        shifted = np.zeros(5 * 172 + shift, np.float32)[shift:].reshape(5, 172)
        shifted[:] = rows
        np.testing.assert_array_equal(matrix(shifted), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_those_in_double_precision(library, kind):
    weights, rows = numbers(70, 172), numbers(9, 172, seed=1)
    got = PackedMatrix(library, KINDS[kind], weights)(rows)
    rows, weights = rows.astype(np.float64), weights.astype(np.float64)
    # largest error of every input and weight, by rounding
    relative = {"float32": 0, "bfloat16": 2.0**-8, "int8": 0}[kind]
    errors = [np.abs(rows) * relative, np.abs(weights) * relative]
    if kind == "int8":
        errors = [
            np.repeat(quantized(values)[1] / 2, GROUP, axis=1)[:, :172]
            for values in (rows, weights)
        ]
    of_rows, of_weights = errors
    sizes = np.abs(rows) @ np.abs(weights).T
    bound = of_rows @ np.abs(weights).T + np.abs(rows) @ of_weights.T + of_rows @ of_weights.T
    assert (np.abs(got - rows @ weights.T) <= 1.001 * bound + 1e-5 * sizes).all()


def test_no_rows_and_no_inputs(library):
    for kind in KINDS.values():
        assert PackedMatrix(library, kind, numbers(70, 172))(numbers(0, 172)).shape == (0, 70)
        bias = numbers(70)
        matrix = PackedMatrix(library, kind, np.zeros((70, 0), np.float32), bias)
        np.testing.assert_array_equal(matrix(np.zeros((30, 0), np.float32))[7], bias)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1), "alternating"])
def test_the_largest_int8_products_do_not_saturate(library, signs):
    weights, rows = np.ones((40, 192), np.float32), np.ones((3, 192), np.float32)
    if signs == "alternating":
        weights[:, ::2] *= -1
        rows[:, ::2] *= -1
    else:
        weights, rows = weights * signs[0], rows * signs[1]
    got = PackedMatrix(library, INT8, weights)(rows)
    # every product of bytes is 127 * 127 in size, with the same sign
    np.testing.assert_allclose(got, (rows @ weights.T), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_itself_alone(library, kind, value):
    weights, rows = numbers(70, 172), numbers(13, 172, seed=1)
    weights[weights == 0] = 1
    matrix = PackedMatrix(library, KINDS[kind], weights)
    expected = matrix(rows)
    rows[4, 171] = value
    got = matrix(rows)
    assert not np.isfinite(got[4]).any()
    if np.isnan(value) or kind == "int8":
        assert np.isnan(got[4]).all()
    others = np.arange(13) != 4
    np.testing.assert_array_equal(got[others], expected[others])


def test_tiny_and_huge_numbers_in_int8(library):
    weights = numbers(70, 256)
    weights[:, :64] *= np.float32(1e-33)  # groups that count as zero
    weights[:, 64:128] *= np.float32(1e30)
    rows = numbers(4, 256, seed=1)
    rows[:, 64:128] *= np.float32(1e-36)
    rows[:, 128:192] = 0
    matrix = PackedMatrix(library, INT8, weights)
    got = matrix(rows)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, expected_product(matrix, weights, rows))


def test_int8_is_packed_in_blocks_of_four_inputs(library):
    weights = numbers(70, 172)
    matrix = PackedMatrix(library, INT8, weights)
    block = library.native_block()
    blocks, groups = -(-70 // block), 3
    packed = matrix.packed.view(np.int8).reshape(blocks, groups * GROUP // 4, block, 4)
    got = packed.transpose(0, 2, 1, 3).reshape(blocks * block, groups * GROUP).astype(np.int64)
    if "VNNI" in library.native_instructions().decode():
        got = np.where(got < 0, got + 128, got - 128)
    expected, scales = quantized(weights)
    np.testing.assert_array_equal(got[:70], expected.reshape(70, -1))
    assert not got[70:].any()
    got_scales = matrix.scales.reshape(blocks, groups, block).transpose(0, 2, 1)
    np.testing.assert_array_equal(got_scales.reshape(-1, groups)[:70], scales)


def test_bfloat16_is_packed_in_pairs_rounded_to_even(library):
    weights = numbers(70, 173)
    weights[0, :3] = (
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        np.float32(3.4e38),
    )  # two ties, and up to infinity
    matrix = PackedMatrix(library, BFLOAT16, weights)
    block = library.native_block()
    blocks = -(-70 // block)
    packed = matrix.packed.view(np.uint16).reshape(blocks, 87, block, 2)
    got = packed.transpose(0, 2, 1, 3).reshape(blocks * block, 174)
    as_floats = (got.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(as_floats[:70, :173], rounded_to_bfloat16(weights))
    assert not got[70:].any() and not got[:, 173].any()


def test_a_matrix_is_packed_the_same_by_several_threads(library):
    weights = numbers(530, 172)
    for kind in (FLOAT32, BFLOAT16, INT8):
        one, three = (PackedMatrix(library, kind, weights, threads=n) for n in (1, 3))
        np.testing.assert_array_equal(one.packed, three.packed)
        np.testing.assert_array_equal(one.scales, three.scales)


def test_rounding_of_the_calling_thread_does_not_matter(library):
    import torch

    matrix = PackedMatrix(library, FLOAT32, numbers(70, 172) * np.float32(1e-20))
    rows = numbers(40, 172, seed=1) * np.float32(1e-20)
    expected = matrix(rows, 3)
    assert ((expected != 0) & (np.abs(expected) < 1e-38)).any(), "denormal numbers"
    try:
        torch.set_flush_denormal(True)
        np.testing.assert_array_equal(matrix(rows, 3), expected)
    finally:
        torch.set_flush_denormal(False)
