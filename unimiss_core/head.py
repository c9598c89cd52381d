"""The projection head of self-distillation: bottleneck on the unit sphere, then unit-norm prototypes.

Legend of shapes: B samples, E features of the bottleneck, K prototypes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Three linear layers with GELU, L2-normalised, then scores against prototypes (DINO, arXiv:2104.14294)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = Prototypes(bottleneck, prototypes)

    def bottleneck(self, features: Tensor) -> Tensor:
        """features (B, width) -> (B, E), each of length 1."""
        return F.normalize(at_least_float32(self.mlp(features)), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, width) -> logits (B, K)."""
        logits: Tensor = self.prototypes(self.bottleneck(features))
        return logits


class Prototypes(nn.Module):
    """Scores against K directions: a linear layer without bias whose rows count as if they had length 1.

    The function of weight normalisation with its gain held at 1, as published. Ours because torch's weight_norm
    breaks per-sample gradients and costs four times as much. Always in float32: with few rows of h the product is
    bound by reading the prototypes once, and a copy of them in half precision would cost more than it saves.
    """

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, bottleneck))
        self._gathering: _Gathering | None = None

    @contextmanager
    def gradient_at_the_end(self) -> Iterator[None]:
        """Within, backward passes reach h alone; at the end the weight gets the gradient of them all, in one product.

        For a batch that is met in parts: a product for each would cost a (K, E) matrix of its own, at the time when
        activations take the most memory. h must need gradients. Where the block raises, the weight gets none.
        """
        self._gathering = gathering = _Gathering(self.weight.detach())
        try:
            yield
        finally:
            self._gathering = None
        gradient = gathering.gradient()
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)

    def forward(self, h: Tensor) -> Tensor:
        """h (..., E) -> logits (..., K), linear in h: the mean of logits is the logits of the mean."""
        with torch.autocast(h.device.type, enabled=False):
            rows = at_least_float32(h).reshape(-1, h.shape[-1])
            logits: Tensor = (
                self._gathering.logits(rows) if self._gathering else _UnitRowProduct.apply(rows, self.weight)  # type: ignore[no-untyped-call]
            )
            return logits.reshape(*h.shape[:-1], -1)


class _UnitRowProduct(torch.autograd.Function):
    """z = (h W^T) / l with l the lengths of W's rows: the (R, K) logits are divided, never the (K, E) matrix.

    With s = dz / l, the gradients are dh = s W and dW = s^T h - c W, where c_k = sum_r dz_rk z_rk / l_k^2 is the part
    along each row. By autograd alone the same dW takes three more passes over a (K, E) matrix.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, weight: Tensor) -> Tensor:
        """h (R, E), weight (K, E) -> (R, K)."""
        logits: Tensor = (h @ weight.mT) / torch.linalg.vector_norm(weight, dim=1)
        return logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (h, weight, logits), (grad,) = ctx.saved_tensors, grads
        lengths = torch.linalg.vector_norm(weight, dim=1)
        product, along = _weight_gradient(h, lengths, logits, grad)
        return (grad / lengths) @ weight, torch.addcmul(product, weight, along, value=-1)  # in place, vmap would loop


class _Gathering:
    """The products of one batch with a weight (K, E) that stays as it is meanwhile."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._lengths = torch.linalg.vector_norm(weight, dim=1)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def logits(self, h: Tensor) -> Tensor:
        """h (R, E) -> (R, K)."""
        logits: Tensor = (h @ self._weight.mT) / self._lengths
        factors = (h.detach(), logits.detach())
        logits.register_hook(lambda grad: self._parts.append((*factors, grad)))
        return logits

    def gradient(self) -> Tensor:
        """The weight's (K, E), of all products that a backward pass went through."""
        h, logits, grad = (torch.cat(rows) for rows in zip(*self._parts, strict=True))
        product, along = _weight_gradient(h, self._lengths, logits, grad)
        return product.addcmul_(self._weight, along, value=-1)


def _weight_gradient(h: Tensor, lengths: Tensor, logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """s^T h (K, E) and c (K, 1) of `_UnitRowProduct`'s dW, with as many rows R of h, z and dz as there are."""
    along = (grad * logits).sum(0) / lengths.square()
    return (grad / lengths).mT @ h, along[:, None]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it was in half precision, else as it is: for norms, means, softmax and their like."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
