"""Aggregation per parameter group, against brute force over the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.aggregation import WeightedMean, group_weights, norm
from tests.federation import layout_for, random_tensors
from unimiss_core.codec import Layout, TensorSpec
from unimiss_core.groups import GROUPS, Group, group_of

LAYOUT: Layout = {
    "shared": (TensorSpec("backbone.a", (3, 2)),),
    "2d": (TensorSpec("backbone.e.2d.w", (5,)),),
    "3d": (TensorSpec("backbone.e.3d.w", (2, 2)),),
    "head": (TensorSpec("head.w", (4,)),),
}
TWO_D, BOTH = ("shared", "2d", "head"), GROUPS


def site(seed: int, groups: tuple[Group, ...], weight: float) -> tuple[dict[str, Tensor], dict[Group, float]]:
    tensors = random_tensors({group: LAYOUT[group] for group in groups}, seed)
    return tensors, dict.fromkeys(groups, weight)


def joined(sites: list[tuple[dict[str, Tensor], dict[Group, float]]]) -> dict[str, Tensor]:
    mean = WeightedMean(LAYOUT, largest=1e6)
    for update, weights in sites:
        mean.fold(update, weights)
    return mean.result()


SITES = [site(0, TWO_D, 3.0), site(1, TWO_D, 1.0), site(2, BOTH, 2.0), site(3, BOTH, 5.0)]


def test_equals_brute_force_over_those_who_trained_the_group() -> None:
    result = joined(SITES)
    for specs in LAYOUT.values():
        for spec in specs:
            trained = [(u, w) for u, w in SITES if spec.name in u]
            total = sum(w[group_of(spec.name)] for _, w in trained)
            expected = sum(w[group_of(spec.name)] * u[spec.name].double() for u, w in trained) / total
            torch.testing.assert_close(result[spec.name].double(), expected, rtol=1e-6, atol=1e-7)


@given(st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_order_of_sites_does_not_matter(order: list[int]) -> None:
    expected = joined(SITES)
    for name, tensor in joined([SITES[i] for i in order]).items():
        assert torch.equal(tensor, expected[name])


@given(st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scaling_all_weights_does_not_matter(factor: float) -> None:
    scaled = [(u, {g: w * factor for g, w in weights.items()}) for u, weights in SITES]
    expected = joined(SITES)
    for name, tensor in joined(scaled).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_a_group_that_nobody_trained_is_not_in_the_result() -> None:
    assert set(joined(SITES[:2])) == {"backbone.a", "backbone.e.2d.w", "head.w"}


def test_one_more_two_dimensional_site_leaves_the_three_dimensional_step_alone() -> None:
    """Naive averaging would shrink it by the 2D sites' share."""
    name = "backbone.e.3d.w"
    assert torch.equal(joined(SITES)[name], joined([*SITES, site(9, TWO_D, 100.0)])[name])


def test_one_site_alone_gives_its_own_model() -> None:
    update, weights = site(4, BOTH, 7.0)
    for name, tensor in joined([(update, weights)]).items():
        torch.testing.assert_close(tensor, update[name], rtol=1e-6, atol=0)


def test_weight_zero_is_as_if_the_site_were_not_there() -> None:
    assert joined([site(0, TWO_D, 0.0)]) == {}


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", {"shared": 1.0, "2d": 1.0, "head": 1.0, "3d": 1.0}),
        ("scans", {"shared": 25.0, "2d": 25.0, "head": 25.0, "3d": 9.0}),
        ("sqrt", {"shared": 5.0, "2d": 5.0, "head": 5.0, "3d": 3.0}),
    ],
)
def test_weights_count_what_was_trained_of_each_group(weighting, expected) -> None:  # type: ignore[no-untyped-def]
    assert group_weights({2: 16, 3: 9}, GROUPS, weighting) == expected


def test_a_site_without_volumes_has_no_weight_for_three_dimensional_tensors() -> None:
    assert "3d" not in group_weights({2: 16, 3: 0}, layout_for(frozenset({2})), "uniform")
    assert group_weights({2: 16, 3: 0}, GROUPS, "uniform")["3d"] == 0.0


def test_norm_is_that_of_the_concatenation_and_tells_nan() -> None:
    tensors = random_tensors(LAYOUT, 3)
    flat = torch.cat([t.double().flatten() for t in tensors.values()])
    assert norm(tensors) == pytest.approx(float(flat.norm()), rel=1e-12)
    assert not norm({"a": torch.tensor([1.0, float("nan")])}) < 1e30
