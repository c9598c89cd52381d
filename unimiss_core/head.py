"""The projection head of self-distillation: bottleneck on the unit sphere, then unit-norm prototypes.

Legend of shapes: B samples, E features of the bottleneck, K prototypes.
"""

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

    The function of weight normalisation with its gain held at 1, as published. Ours because
    torch's weight_norm breaks per-sample gradients, and because dividing the (B, K) logits by the K row lengths
    costs less than normalising a (K, E) matrix, which is the same by linearity.
    """

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, h: Tensor) -> Tensor:
        """h (..., E) -> logits (..., K), linear in h: the mean of logits is the logits of the mean."""
        lengths = torch.linalg.vector_norm(self.weight, dim=1)
        return F.linear(h, self.weight).div(lengths)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it was in half precision, else as it is: for norms, means, softmax and their like."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
