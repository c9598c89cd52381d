"""Where bfloat16 does not pay on a CPU, and what then stays in float32.

Every shape of product in bfloat16 costs the CPU's library half a megabyte for its kernels, and every pass a copy of the
weights. Few rows do not earn that back: such a product reads its weights once, whatever their type.

Legend of shapes: R rows, O outputs and I inputs of a layer.
"""

import torch
from torch import Tensor, nn


def in_bf16_on_cpu(x: Tensor) -> bool:
    """Whether products with x are taken in bfloat16 on a CPU, where kernels differ most in their rates."""
    if x.device.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast or x.dtype == torch.bfloat16


class FewRowsLinear(nn.Linear):
    """A linear layer that meets one row for each scan or slice: (R, I) -> (R, O), on a CPU never in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if not in_bf16_on_cpu(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())
