"""Sums against exact rational arithmetic, in any order."""

import math
import random
import weakref
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server import exact_sum
from server.exact_sum import MOST_SUMMANDS, ExactSum, SpareMemory
from tests.federation import StubSite, metric_rows
from tests.test_rounds import federate
from unimiss_core import stretches
from unimiss_core.study import LARGEST_SUMMAND

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
        total.add({"a": column}, weight)
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
    """Up to what is dropped of each value: 2^-46 of it, for it is alone in its tensor, or 2^-93 of the largest."""
    exact = sum(Fraction(value) for value in values)
    found = Fraction(summed([torch.tensor([v]) for v in values]).take("a", 1.0).item())
    dropped = sum(max(abs(Fraction(value)) / 2**46, Fraction(LARGEST) / 2**93) for value in values)
    assert abs(found - exact) <= abs(exact) * Fraction(2) ** -24 + dropped


@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_what_is_dropped_is_bounded_by_the_largest_value_of_the_same_tensor(values: list[float]) -> None:
    """And no value of at least 2^-22 of it loses its last bit, down to 2^-68 of the bound on all."""
    tensor = torch.tensor(values)
    found, largest = summed([tensor]).take("a", 1.0), tensor.abs().max()
    kept = tensor.abs() >= max(largest * 2.0**-22, LARGEST * 2.0**-68)
    assert torch.equal(found[kept], tensor[kept])
    assert ((found.double() - tensor.double()).abs() <= largest.double() * 2.0**-46 + LARGEST * 2.0**-93).all()


def test_sites_of_very_different_size_are_each_summed_to_their_own_precision() -> None:
    """In one running sum, what is exact for the first would round the second away."""
    large, small = torch.tensor([1e3, -1e3]), torch.tensor([1e-9, 3e-9])
    total = summed([large, small, -large])
    assert torch.equal(total.take("a", 1.0), small)


@pytest.mark.parametrize("most", [1, 2, 7, 12, 23, 100])
def test_more_than_one_int64_holds_are_summed_as_exactly(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As if it held no more than `most` of 23 tensors, whose values are multiples k of the grid: rounded once, at the
    end, and to the nearest, whenever upper halves were moved away."""
    monkeypatch.setattr(exact_sum, "MOST_SUMMANDS", most)
    chance, grid = random.Random(most), 2.0 ** (10 - 51)  # LARGEST is just below 2^10
    codes = [
        [chance.randrange(2**50, 2**51 - 2**46) * chance.choice([1, 1, 1, -1]) for _ in range(500)] for _ in range(23)
    ]
    found = summed([torch.tensor(row, dtype=torch.float64) * grid for row in codes]).take_whole("a")
    exact = [Fraction(sum(column)) * Fraction(grid) for column in zip(*codes, strict=True)]
    assert found.tolist() == [float(each) for each in exact]


def test_as_many_of_the_largest_as_are_promised_leave_nothing_out() -> None:
    values = torch.tensor([LARGEST, -LARGEST, 1e-3])
    total = ExactSum(LARGEST)
    for _ in range(MOST_SUMMANDS):
        total.add({"a": values}, 1.0)
    assert torch.equal(total.take("a", MOST_SUMMANDS), values)


@pytest.mark.parametrize("many", [MOST_SUMMANDS + 1, 3 * MOST_SUMMANDS + 2])
def test_more_of_the_largest_than_an_int64_holds_leave_nothing_out(many: int) -> None:
    """Nor the last one, which may not have a partner to be added with."""
    values = torch.tensor([LARGEST, -LARGEST, 1e-3])
    total = ExactSum(LARGEST)
    for _ in range(many):
        total.add({"a": values}, 1.0)
    assert torch.equal(total.take("a", many), values)


def test_plain_float64_sums_do_depend_on_the_order() -> None:
    """Without which there would be nothing to prove."""
    values = [1.0, 2.0**-53, 2.0**-53, -1.0]
    plain = [sum(torch.tensor(v, dtype=torch.float64) for v in order) for order in (values, values[::-1])]
    assert plain[0] != plain[1]
    ours = [summed([torch.tensor([v]) for v in order]).take("a", 1.0) for order in (values, values[::-1])]
    assert ours[0].item() == ours[1].item() == 2.0**-52


def test_a_tensor_longer_than_a_stretch_is_summed_in_full(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(stretches, "AT_ONCE", 5)
    columns = [torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = sum(0.3 * column.double() for column in columns).flatten() / 2  # type: ignore[union-attr]
    torch.testing.assert_close(summed(columns, 0.3).take("a", 2.0).double(), expected, rtol=1e-7, atol=0)


def test_memory_of_an_earlier_sum_changes_no_bit_of_the_next() -> None:
    spare = SpareMemory()
    columns = [torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    for many in (5, 1, 2, 4):
        total = ExactSum(LARGEST, spare)
        for column in columns[:many]:
            total.add({"a": column}, 1.0)
        kept = total.take("a", 1.0)
        assert torch.equal(kept, summed(columns[:many]).take("a", 1.0))


def test_sites_of_unlike_size_keep_no_more_updates_waiting_than_others() -> None:
    """An update's memory is one for all of its tensors: it stays while any of them waits."""
    total, waiting = ExactSum(LARGEST), list[weakref.ref[Tensor]]()
    for index in range(40):
        update = torch.full((6,), 1e-3 * 2.0 ** -(index % 11), dtype=torch.bfloat16)
        waiting.append(weakref.ref(update))
        total.add({"a": update[:3], "b": update[3:]}, 1.0)
        total.add({"c": update}, 1.0)
        del update
        assert sum(held() is not None for held in waiting) <= 3
    assert total.take("a", 40.0).isfinite().all()


def test_sums_begin_in_the_memory_of_the_last() -> None:
    spare = SpareMemory()
    spare.keep("a", held := torch.full((2,), 7))
    total = ExactSum(LARGEST, spare)
    total.add({"a": torch.ones(2)}, 1.0)
    total.add({"a": torch.ones(2)}, 1.0)
    assert held.ne(7).all()
    assert torch.equal(total.take("a", 1.0), torch.full((2,), 2.0))
    assert spare.get("a", 2) is held


def test_a_round_of_more_sites_than_an_int64_holds_comes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it held two: four sites and more ended the coordinator in mid-round."""
    sites = [StubSite(name, {2: 10}) for name in "abcde"]
    plain = federate(tmp_path / "plain", sites)
    monkeypatch.setattr(exact_sum, "MOST_SUMMANDS", 2)
    crowded = federate(tmp_path / "crowded", sites)
    assert {
        name: line["status"] for name, line in metric_rows(tmp_path / "crowded")[0]["sites"].items()
    } == dict.fromkeys("abcde", "ok")
    assert all(torch.equal(crowded.student[name], plain.student[name]) for name in plain.student)


@pytest.mark.parametrize("weight", [1.0, 1000.0])
@pytest.mark.parametrize("size", [1e-2, 1e-5, 6e-8])
def test_under_the_largest_bound_of_a_study_no_update_is_rounded_as_float32_rounds(size: float, weight: float) -> None:
    """And under one that a study is refused for, all are lost."""
    generator = torch.Generator().manual_seed(3)
    updates = [size * (2 * torch.rand(5000, generator=generator) - 1) for _ in range(5)]
    expected = sum(update.double() for update in updates) / len(updates)
    for largest, share in ((LARGEST_SUMMAND, 2.0**-29), (1e36, None)):
        total = ExactSum(largest)
        for update in updates:
            total.add({"a": update}, weight)
        error = (total.take_whole("a") / (weight * len(updates)) - expected).abs().max().item()
        assert error < size * share if share else error > size / 10
