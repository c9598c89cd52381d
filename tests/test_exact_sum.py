"""Sums against exact rational arithmetic, in any order."""

import math
import random
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server import exact_sum
from server.exact_sum import MOST_SUMMANDS, ExactSum

LARGEST = 1e3
CANCELLING = st.builds(math.ldexp, st.sampled_from([-1.0, 1.0, 3.0]), st.sampled_from([0, -1, -24, -53, -54, -80]))
"""Values whose sums float64 rounds by their order, and which leave little when the large ones cancel."""
COLUMN = st.one_of(
    st.lists(CANCELLING, min_size=2, max_size=6).map(lambda values: values + [-value for value in values[1:]]),
    st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=12),
)


def summed(columns: list[Tensor], weight: float = 1.0) -> ExactSum:
    total = ExactSum(LARGEST * weight)
    for column in columns:
        total.add("a", [column], weight)
    return total


@given(COLUMN, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_a_sum_is_the_same_bit_for_bit_in_any_order(values: list[float], shuffler: random.Random) -> None:
    shuffled = shuffler.sample(values, len(values))
    ours, theirs = (summed([torch.tensor([v]) for v in order]).take("a", 3.0) for order in (values, shuffled))
    assert torch.equal(ours, theirs)


@given(COLUMN)
@settings(max_examples=200, deadline=None)
def test_a_sum_is_the_true_one_rounded(values: list[float]) -> None:
    """Up to what is dropped of each value, 2^-80 of the largest."""
    exact = sum(Fraction(value) for value in values)
    found = Fraction(summed([torch.tensor([v]) for v in values]).take("a", 1.0).item())
    assert abs(found - exact) <= abs(exact) * Fraction(2) ** -24 + len(values) * Fraction(LARGEST) * Fraction(2) ** -80


def test_as_many_of_the_largest_as_are_promised_leave_nothing_out() -> None:
    values = torch.tensor([LARGEST, -LARGEST, 1e-9])
    total = ExactSum(LARGEST)
    for _ in range(MOST_SUMMANDS):
        total.add("a", [values], 1.0)
    assert torch.equal(total.take("a", MOST_SUMMANDS), values)


def test_plain_float64_sums_do_depend_on_the_order() -> None:
    """Without which there would be nothing to prove."""
    values = [1.0, 2.0**-53, 2.0**-53, -1.0]
    plain = [sum(torch.tensor(v, dtype=torch.float64) for v in order) for order in (values, values[::-1])]
    assert plain[0] != plain[1]
    ours = [summed([torch.tensor([v]) for v in order]).take("a", 1.0) for order in (values, values[::-1])]
    assert ours[0].item() == ours[1].item() == 2.0**-52


def test_a_tensor_longer_than_a_stretch_is_summed_in_full(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(exact_sum, "_AT_ONCE", 5)
    columns = [torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = sum(0.3 * column.double() for column in columns).flatten() / 2  # type: ignore[union-attr]
    torch.testing.assert_close(summed(columns, 0.3).take("a", 2.0).double(), expected, rtol=1e-7, atol=0)
