"""What the benchmark of single operations sets side by side is one function, with one gradient."""

import pytest
import torch
from torch import Tensor

from benchmarks.operations import PAIRS


@pytest.mark.parametrize("name", PAIRS)
def test_both_ways_are_one_function(name: str) -> None:
    torch.manual_seed(0)
    pair = PAIRS[name]()
    plain, ours = pair.outcome(pair.plain), pair.outcome(pair.ours)
    near = 0.02 if pair.bf16 else 1e-4
    assert off(ours, plain) < near
    of_outcome = torch.randn_like(plain)
    gradients = [pair.gradients(outcome, of_outcome.to(outcome.dtype)) for outcome in (plain, ours)]
    assert len(gradients[0]) > 0
    for expected, found in zip(*gradients, strict=True):
        assert off(found, expected) < near


def off(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected norm."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = torch.linalg.vector_norm(expected)
    assert norm > 0
    return float(torch.linalg.vector_norm(found - expected) / norm)
