"""Convolutions as products: against torch's own layers, in whole numbers, which bfloat16 holds exactly up to 256."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unimiss_core.convolution import GreyConv3d, GreyOrColourConv2d, enlarging, reducing

Case = tuple[Callable[[], nn.Module], nn.Module, tuple[int, ...]]


def grey_or_colour(before: int, width: int, kernel: int, stride: int) -> nn.Module:
    return GreyOrColourConv2d(before, width, kernel, stride, padding=kernel // 2, bias=False)


def grey(before: int, width: int, kernel: int, stride: int | tuple[int, ...]) -> nn.Module:
    made: Any = GreyConv3d
    layer: nn.Module = made(before, width, kernel, stride, padding=kernel // 2, bias=False)
    return layer


CASES: dict[str, Case] = {
    "reducing, 2d": (lambda: reducing(2, 4, 3), nn.Conv2d(4, 4, 3, 3), (2, 4, 10, 12)),
    "reducing, 3d": (lambda: reducing(3, 4, 2), nn.Conv3d(4, 4, 2, 2), (2, 4, 4, 7, 5)),
    "many patches": (lambda: reducing(2, 4, 2), nn.Conv2d(4, 4, 2, 2), (3, 4, 8, 9)),
    "many cells": (lambda: enlarging(2, 4, 3, (2, 2)), nn.ConvTranspose2d(4, 3, 2, 2), (3, 4, 3, 5)),
    "reducing what is no patch": (lambda: reducing(2, 4, 3), nn.Conv2d(4, 4, 3, 3), (2, 4, 11, 3)),
    "doubling, 2d": (lambda: enlarging(2, 4, 3, (2, 2)), nn.ConvTranspose2d(4, 3, 2, 2), (2, 4, 3, 5)),
    "doubling, 3d": (lambda: enlarging(3, 4, 3, (2, 2, 2)), nn.ConvTranspose3d(4, 3, 2, 2), (2, 4, 2, 1, 3)),
    "few windows, 2d": (lambda: grey_or_colour(2, 16, 3, 2), nn.Conv2d(2, 16, 3, 2, 1, bias=False), (2, 2, 5, 4)),
    "few windows, 3d": (lambda: grey(2, 24, 3, 2), nn.Conv3d(2, 24, 3, 2, 1, bias=False), (2, 2, 3, 4, 5)),
    "windows of strides": (
        lambda: grey(2, 24, 3, (1, 2, 3)),
        nn.Conv3d(2, 24, 3, (1, 2, 3), 1, bias=False),
        (1, 2, 3, 4, 6),
    ),
    "stem": (
        lambda: GreyConv3d(1, 3, 7, (1, 2, 2), padding=3, bias=False),
        nn.Conv3d(1, 3, 7, (1, 2, 2), padding=3, bias=False),
        (2, 1, 5, 9, 6),
    ),
    "planes far apart": (
        lambda: GreyConv3d(1, 3, 3, 2, padding=1, bias=False),
        nn.Conv3d(1, 3, 3, 2, padding=1, bias=False),
        (2, 1, 6, 5, 8),
    ),
    "several channels": (
        lambda: GreyConv3d(2, 3, 3, 2, padding=1, bias=False),
        nn.Conv3d(2, 3, 3, 2, padding=1, bias=False),
        (2, 2, 6, 5, 8),
    ),
}


def whole_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """-1, 0 or 1."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def outcome(layer: nn.Module, x: Tensor, *, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    towards = whole_numbers(tuple(y.shape), seed=9).to(y.dtype)
    return y, list(torch.autograd.grad(y, [x, *layer.parameters()], towards))


def alike(case: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours, torch's with the same weights, and an input."""
    build, plain, shape = CASES[case]
    plain = copy.deepcopy(plain)
    for seed, parameter in enumerate(plain.parameters()):
        parameter.data = whole_numbers(tuple(parameter.shape), seed)
    ours = build()
    ours.load_state_dict(plain.state_dict())
    return ours, plain, whole_numbers(shape, seed=5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_products_in_bf16_are_the_convolution(case: str, channels_last: bool) -> None:
    ours, plain, x = alike(case)
    expected, expected_gradients = outcome(plain, x, bf16=False)
    assert max(t.abs().max().item() for t in (expected, *expected_gradients)) <= 256  # exact in bfloat16
    if channels_last:  # as maps that were tokens are
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y, gradients = outcome(ours, x, bf16=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), expected)
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, right)


@pytest.mark.parametrize("case", CASES)
def test_elsewhere_they_are_torchs_layers_bit_for_bit(case: str) -> None:
    ours, plain, _ = alike(case)
    for parameter in plain.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(CASES[case][2], generator=torch.Generator().manual_seed(2))
    (y, gradients), (expected, right) = outcome(ours, x, bf16=False), outcome(plain, x, bf16=False)
    assert all(map(torch.equal, [y, *gradients], [expected, *right]))


def test_an_input_in_bf16_needs_no_autocast() -> None:
    ours, plain, x = alike("reducing, 3d")
    y = ours(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), plain(x))


@pytest.mark.parametrize("case", [name for name in CASES if "windows" in name])
def test_few_windows_meet_the_weight_as_it_lies_in_memory_but_not_in_inference(case: str) -> None:
    """Torch's own layer would cast the weight to bfloat16 first, and have a gradient cast back."""
    ours, _, x = alike(case)
    with torch.autocast("cpu", torch.bfloat16), Operators() as training:
        ours(x)
    with torch.autocast("cpu", torch.bfloat16), Operators() as inference, torch.inference_mode():
        ours(x)
    assert not any("conv" in name for name in training.names)
    assert any("conv" in name for name in inference.names)


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))
