"""The projection head of self-distillation: bottleneck on the unit sphere, then unit-norm prototypes.

Legend of shapes: B samples, E features of the bottleneck, K prototypes, R rows, which may be samples of several parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimiss_core.gathering import GatheringLinear
from unimiss_core.precision import in_bf16_on_cpu
from unimiss_core.prototypes_gradient import PrototypesGradient


class Head(nn.Module):
    """Three linear layers with GELU, L2-normalised, then scores against prototypes (DINO, arXiv:2104.14294)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            GatheringLinear(width, hidden),
            nn.GELU(),
            GatheringLinear(hidden, hidden),
            nn.GELU(),
            GatheringLinear(hidden, bottleneck),
        )
        self.prototypes = Prototypes(bottleneck, prototypes)

    def bottleneck(self, features: Tensor) -> Tensor:
        """features (B, width) -> (B, E), each of length 1; in float32 on CPUs (`unimiss_core.precision`)."""
        if in_bf16_on_cpu(features):
            with torch.autocast("cpu", enabled=False):
                return self.bottleneck(features.float())
        return F.normalize(at_least_float32(self.mlp(features)), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, width) -> logits (B, K)."""
        logits: Tensor = self.prototypes(self.bottleneck(features))
        return logits

    @contextmanager
    def gathering(self) -> Iterator[PrototypesGradient]:
        """Within, backward passes give the prototypes no gradient: it is what is yielded, to be written or used in
        pieces. The prototypes must stay as they are meanwhile."""
        self.prototypes.gathered = gradient = PrototypesGradient(self.prototypes.weight)
        try:
            yield gradient
        finally:
            self.prototypes.gathered = None


class Prototypes(nn.Module):
    """Scores against K directions: a linear layer without bias whose rows count as if they had length 1.

    The function of weight normalisation with its gain held at 1, as published. Ours because torch's weight_norm
    breaks per-sample gradients, and because its gradient is a whole matrix. Always in float32: with few rows of h the
    product is bound by reading the prototypes once, and a copy of them in half precision would cost more than it saves.
    """

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gathered: PrototypesGradient | None = None

    def forward(self, h: Tensor) -> Tensor:
        """h (..., E) -> logits (..., K), linear in h: the mean of logits is the logits of the mean."""
        with torch.autocast(h.device.type, enabled=False):
            rows = at_least_float32(h).reshape(-1, h.shape[-1])
            logits: Tensor = (
                self.gathered.logits(rows) if self.gathered else _UnitRowProduct.apply(rows, self.weight)  # type: ignore[no-untyped-call]
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
        scaled, along = grad / lengths, (grad * logits).sum(0) / lengths.square()
        return scaled @ weight, torch.addcmul(scaled.mT @ h, weight, along[:, None], value=-1)  # in place, vmap loops


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it was in half precision, else as it is: for norms, means, softmax and their like."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
