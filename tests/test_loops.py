"""The compiled loops against NumPy and Python's whole numbers, for every float type."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from server.loops import MOST_AT_ONCE, add_codes, extent, join_codes

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_extent_is_that_of_the_values(dtype: torch.dtype) -> None:
    values = drawn(dtype, 37, 11)
    wide = values.double().numpy()
    squares, largest = extent(values.T)  # whose values do not lie end to end
    assert squares == pytest.approx(float((wide**2).sum()), rel=1e-14)
    assert largest == np.abs(wide).max()
    assert extent(values[:0]) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_shows_among_any_number(dtype: torch.dtype, odd: float) -> None:
    for size in (1, 2, 64, 65, 1000):
        for place in (0, size // 2, size - 1):
            values = torch.ones(size, dtype=dtype)
            values[place] = odd
            assert not math.isfinite(extent(values)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("many", range(1, MOST_AT_ONCE + 1))
@pytest.mark.parametrize("begun", [True, False])
def test_codes_are_the_bits_of_float64_sums_one_by_one(dtype: torch.dtype, many: int, begun: bool) -> None:
    summands, weights, cutter = [drawn(dtype, 19, seed=i) for i in range(many)], [1.0, -2.5, 3.0, 0.1][:many], 3e12
    codes = torch.arange(2**62, 2**62 + 19)
    expected = [int(code) if begun else 0 for code in codes]
    for summand, weight in zip(summands, weights, strict=True):
        bits = (summand.double().numpy() * weight + cutter).view(np.int64)
        expected = [total + int(more) for total, more in zip(expected, bits, strict=True)]
    add_codes(codes, summands, weights, cutter, begun)
    assert codes.tolist() == [(total + 2**63) % 2**64 - 2**63 for total in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joined_codes_are_rounded_once_for_each_operation(dtype: torch.dtype) -> None:
    codes, result = torch.tensor([-(2**63), -7, 0, 5, 2**62 + 1]), torch.empty(5, dtype=dtype)
    join_codes(codes, 5, 2.0**-20, 3.0, result)
    wrapped = [(int(code) - 5 + 2**63) % 2**64 - 2**63 for code in codes]
    assert torch.equal(
        result, torch.tensor([float(code) * 2.0**-20 / 3.0 for code in wrapped], dtype=torch.float64).to(dtype)
    )
