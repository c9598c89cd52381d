"""The gradient of a layer that meets few rows, kept as those rows and not as the matrix that they make.

A batch in parts goes backward several times. By autograd each time makes a matrix of the weight's size, at the moment
when activations take the most memory, and adds it to another. The rows behind it are a hundredth of that in the
projection head, which holds most of the parameters and meets one class token for each view or slice. So they are
gathered, and multiplied once, after the last backward pass: the same sum in another order.

Legend of shapes: R rows, O outputs and I inputs of the layer.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_VALUES = 2**20
"""Of a weight, whose gradient is worked out at a time: 4 MB in float32."""


class GatheredGradient(Protocol):
    """The gradient of a weight over all backward passes, which need not exist as a whole."""

    @property
    def weight(self) -> nn.Parameter: ...

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows of the weight, their gradient), until all have been met; for the weight as it now is there."""
        ...

    def norm(self) -> Tensor:
        """L2 norm, a scalar; the gradient is not made for it."""
        ...

    def write(self) -> None:
        """Add the whole to the weight's `grad`."""
        ...


class OuterProducts:
    """left^T right (O, I), kept as left (R, O) and right (R, I) for as long as these hold fewer values."""

    def __init__(self, like: Tensor) -> None:
        """like: the weight (O, I), whose type and shape the product has."""
        self._like = like.detach()
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._whole: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """More rows, in any precision."""
        self._left.append(left.detach().to(self._like.dtype))
        self._right.append(right.detach().to(self._like.dtype))
        rows = sum(len(part) for part in self._left)
        if rows * sum(self._like.shape) > self._like.numel():
            self._whole = self.rows(slice(None))
            self._left, self._right = [], []

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that was added."""
        return self._whole is None and not self._left

    @property
    def are_rows(self) -> bool:
        """Whether rows are all that is kept: there are few."""
        return self._whole is None

    def kept_rows(self) -> tuple[Tensor, Tensor]:
        """left (R, O) and right (R, I)."""
        none = self._like[:0]
        return torch.cat([none.new_empty(0, len(self._like)), *self._left]), torch.cat([none, *self._right])

    def scale_(self, factor: float) -> None:
        """Multiply the product by `factor`, by way of the rows where these are kept."""
        self._left = [part * factor for part in self._left]
        self._whole = None if self._whole is None else self._whole * factor

    def rows(self, rows: slice) -> Tensor:
        """Some of the O rows, in memory of their own: (o, I)."""
        whole = None if self._whole is None else self._whole[rows]
        if not self._left:
            return torch.zeros_like(self._like[rows]) if whole is None else whole.clone()
        if len(self._left) > 1:
            self._left, self._right = [torch.cat(self._left)], [torch.cat(self._right)]
        left, right = self._left[0][:, rows], self._right[0]
        return left.mT @ right if whole is None else torch.addmm(whole, left.mT, right)

    def square_norm(self) -> Tensor:
        """The sum of all squares, a scalar in float64: from the R x R products of rows, where rows are what is kept."""
        if self._whole is not None or not self._left:
            of_blocks = [self.rows(rows).square().sum(dtype=torch.float64) for rows in blocks_of(self._like)]
            return torch.stack(of_blocks).sum()
        left, right = torch.cat(self._left), torch.cat(self._right)
        squares: Tensor = ((left @ left.mT).double() * (right @ right.mT)).sum()
        return squares.clamp(min=0.0)  # where rows cancel, rounding may leave less than nothing


class RowsGradient:
    """That of a layer's weight (O, *), which is a matrix (O, I) to the rows that it meets."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.products = OuterProducts(weight.detach().flatten(1))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return ((rows, self._rows(rows)) for rows in blocks_of(self.weight))

    def norm(self) -> Tensor:
        return self.products.square_norm().sqrt().to(self.weight.dtype)

    def write(self) -> None:
        add_gradient_(self.weight, self._rows(slice(None)))

    def _rows(self, rows: slice) -> Tensor:
        return self.products.rows(rows).view(-1, *self.weight.shape[1:])


class Gathers(nn.Module):
    """A layer that, while `gathered` is set, adds the rows of its weight's gradient there; a bias has a gradient as
    ever."""

    weight: Tensor
    gathered: OuterProducts | None = None


@contextmanager
def gathered_by(layers: Collection[Gathers]) -> Iterator[list[RowsGradient]]:
    """Within, backward passes give the weights of these layers no gradient where they gather it. Weights must stay as
    they are meanwhile."""
    gradients = [RowsGradient(layer.get_parameter("weight")) for layer in layers]
    for layer, gradient in zip(layers, gradients, strict=True):
        layer.gathered = gradient.products
    try:
        yield gradients
    finally:
        for layer in layers:
            layer.gathered = None


def add_gradient_(weight: Tensor, gradient: Tensor) -> None:
    """Add to a weight's `grad`, or begin it."""
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def blocks_of(weight: Tensor) -> Iterator[slice]:
    """Slices that together are all rows of a weight, in order."""
    rows = max(1, BLOCK_VALUES // weight[0].numel())
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


class GatheringLinear(Gathers, nn.Linear):
    """A linear layer that gathers."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        if self.gathered is None or not torch.is_grad_enabled():
            return super().forward(x)
        y = F.linear(x, self.weight.detach(), self.bias)
        inputs, gathered = x.detach().flatten(0, -2), self.gathered
        if y.requires_grad:
            y.register_hook(lambda grad: gathered.add(grad.flatten(0, -2), inputs))
        return y
