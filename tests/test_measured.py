"""An update's extents against NumPy, and that nothing is measured twice."""

import math

import numpy as np
import pytest
import torch

from server import measured as module
from server.measured import measured
from unimiss_core import stretches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extents_are_those_of_the_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "AT_ONCE", 5)
    drawn = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=drawn).to(dtype) for name, shape in (("a", (3, 7)), ("b", ()))}
    tensors["a"][1, 2] = -9.0
    found, values = measured(tensors), {name: tensor.double().numpy().ravel() for name, tensor in tensors.items()}
    assert {name: found.largest(name) for name in found} == {name: np.abs(v).max() for name, v in values.items()}
    assert found.norm() == pytest.approx(np.linalg.norm(np.concatenate(list(values.values()))), rel=1e-14)
    assert measured(found, ["a"]).norm() == pytest.approx(np.linalg.norm(values["a"]), rel=1e-14)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_the_norm_wherever_it_stands(odd: float) -> None:
    for place in (0, 1, stretches.AT_ONCE, stretches.AT_ONCE + 2):
        values = torch.ones(stretches.AT_ONCE + 3, dtype=torch.bfloat16)
        values[place] = odd
        assert not math.isfinite(measured({"a": torch.zeros(2), "b": values}).norm())


def test_the_squares_of_the_largest_and_smallest_floats_are_seen() -> None:
    """In float32 the first would be infinite and the second nothing."""
    assert measured({"a": torch.tensor([1e38, 1e38])}).norm() == pytest.approx(math.sqrt(2) * 1e38)
    assert measured({"a": torch.tensor([1e-30])}).norm() == pytest.approx(1e-30)


def test_what_is_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured({"a": torch.ones(3), "b": torch.ones(4)})
    monkeypatch.setattr(module, "extent", None)
    assert measured(found) is not None
    assert measured(found, ["b"]).norm() == 2.0
