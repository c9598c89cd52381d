"""Where bfloat16 does not pay on a CPU, and what then stays in float32; where it pays on a GPU, and autocast has not.

Every shape of product in bfloat16 costs the CPU's library half a megabyte for its kernels, and every pass a copy of the
weights. Few rows do not earn that back: such a product reads its weights once, whatever their type.

Legend of shapes: O outputs and I inputs of a layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 32


def in_bf16_on_cpu(x: Tensor) -> bool:
    """Whether products with x are taken in bfloat16 on a CPU, where kernels differ most in their rates."""
    if x.device.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast or x.dtype == torch.bfloat16


def is_few(x: Tensor) -> bool:
    """Whether x (..., I) has so few rows that a product with them is bound by reading the weights. Not in inference:
    there a scan's answer must not hang on how many are asked about at once."""
    return math.prod(x.shape[:-1]) <= FEW_ROWS and not torch.is_inference_mode_enabled()


class Linear(nn.Linear):
    """A linear layer, (..., I) -> (..., O), that meets few rows in float32 where it would in bfloat16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (in_bf16_on_cpu(x) and is_few(x)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.bfloat16)


class LayerNorm(nn.LayerNorm):
    """(..., I) -> (..., I). On a GPU bfloat16 goes in and comes out; mean and variance are summed in float32 inside.

    Autocast would have the whole of it in float32: five times the bytes, for what the next layer rounds to bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or x.dtype != torch.bfloat16:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
