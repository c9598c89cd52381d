"""Gradients of one loss against those of another that should be the same."""

import math

import torch
from torch import Tensor, nn


def assert_same_gradients(
    ours: tuple[nn.Module, Tensor], theirs: tuple[nn.Module, Tensor], *, rtol: float, least: float
) -> None:
    """Each is a module and a loss of it; the modules have the same parameters, and each of these has or has not a
    gradient in both. rtol: of a gradient's norm, or of `least` times the norm of all where that is larger, since a
    gradient that is nought, as that of a key's bias, is rounding alone."""
    mine, oracles = (
        torch.autograd.grad(loss, list(module.parameters()), allow_unused=True) for module, loss in (ours, theirs)
    )
    whole = math.sqrt(sum(g.square().sum().item() for g in oracles if g is not None))
    for (name, _), gradient, oracle in zip(ours[0].named_parameters(), mine, oracles, strict=True):
        assert (gradient is None) == (oracle is None), name
        if gradient is not None and oracle is not None:
            assert (gradient - oracle).norm() <= rtol * max(oracle.norm().item(), least * whole), name
