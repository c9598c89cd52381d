"""Where bfloat16 does not pay on a CPU, and what then stays in float32; where it pays on a GPU, and autocast has not.

Every shape of product in bfloat16 costs the CPU's library half a megabyte for its kernels, and every pass a copy of the
weights. Few rows do not earn that back: such a product reads its weights once, whatever their type.

Legend of shapes: B scans, N tokens, R rows, O outputs, I inputs of a layer and H of the one behind it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 64
"""At most so many are met in float32."""

HIDDEN_VALUES = 2**21
"""Of an MLP's hidden layer at a time: 4 MB in bfloat16."""

gelu_backward = torch.ops.aten.gelu_backward


def in_bf16(x: Tensor) -> bool:
    """Whether products with x are taken in bfloat16."""
    kind = x.device.type  # meta tensors have no autocast
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.dtype == torch.bfloat16 or (autocast and torch.get_autocast_dtype(kind) == torch.bfloat16)


def in_bf16_on_cpu(x: Tensor) -> bool:
    """Whether they are on a CPU, where kernels differ most in their rates."""
    return x.device.type == "cpu" and in_bf16(x)


def is_few(x: Tensor) -> bool:
    """Whether x (..., I) has so few rows that a product with them is bound by reading the weights. Not in inference:
    there a scan's answer must not hang on how many are asked about at once."""
    return math.prod(x.shape[:-1]) <= FEW_ROWS and not torch.is_inference_mode_enabled()


def in_fitting_precision(x: Tensor) -> Tensor:
    """x (..., I) in bfloat16, or where it is few rows in float32."""
    return x.float() if is_few(x) else x.to(torch.bfloat16)


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


class InstanceNorm2d(nn.InstanceNorm2d):
    """(B, C, *S) -> (B, C, *S). In bfloat16 on a GPU by the kernels of layer norm, over all of a channel's cells: those
    of batch norm, by which torch does it, have few threads sum many values. Mean and variance are float32 in both, as
    they would not be in group norm's. Torch's compiler makes kernels of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return _over_cells(x, self) if _is_on_gpu_in_bf16(x) else super().forward(x)


class InstanceNorm3d(nn.InstanceNorm3d):
    """As `InstanceNorm2d`, of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        return _over_cells(x, self) if _is_on_gpu_in_bf16(x) else super().forward(x)


def _is_on_gpu_in_bf16(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def _over_cells(x: Tensor, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(x.contiguous(), x.shape[2:], eps=norm.eps)
        weight, bias = (of.to(x.dtype).view(-1, *[1] * (x.ndim - 2)) for of in (norm.weight, norm.bias))
        return torch.addcmul(bias, normed, weight)


class MLP(nn.Sequential):
    """Linear, GELU, linear: (B, N, I) -> (B, N, I), with H features between. In bfloat16 on a CPU some scans at a time,
    and only what enters is kept for the way back: the hidden layer, of four times as many values, is computed again."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(Linear(width, hidden), nn.GELU(), Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        inner, active, outer = self
        if not in_bf16_on_cpu(x):
            plain: Tensor = outer(active(inner(x)))
            return plain
        layers = inner.weight, inner.bias, outer.weight, outer.bias
        with torch.autocast("cpu", enabled=False):  # or few rows would be cast to bfloat16 all the same
            y: Tensor = _MLPInParts.apply(x, *layers)  # type: ignore[no-untyped-call]
        return y


class _MLPInParts(torch.autograd.Function):
    """Weights are cast in each pass: autocast would keep a copy of each in bfloat16 until the step's end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(x, *layers)
        inner, shift, outer, last = _as_they_meet(x, layers)
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        for rows, into in zip(_parts(x, inner), _parts(y, inner), strict=True):
            into.copy_(_linear(F.gelu(_linear(rows, inner, shift)), outer, last))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *layers = ctx.saved_tensors
        inner, shift, outer, _ = _as_they_meet(x, layers)
        of_x, of_layers = torch.empty(x.shape, dtype=x.dtype), [torch.zeros_like(layer) for layer in layers]
        for rows, grad, into in zip(_parts(x, inner), _parts(grads[0], inner), _parts(of_x, inner), strict=True):
            hidden = _linear(rows, inner, shift)
            of_active, *of_second = _linear_backward(grad, F.gelu(hidden), outer)
            of_rows, *of_first = _linear_backward(gelu_backward(of_active, hidden), rows, inner)
            into.copy_(of_rows)
            for total, more in zip(of_layers, [*of_first, *of_second], strict=True):
                total.add_(more)
        return of_x, *of_layers


def _parts(x: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
    """x (B, N, C), as rows (R, C) of some scans at a time: so few that the hidden layer stays in the processor's cache,
    and as many in each part, to one scan, for every number of rows costs kernels of its own."""
    count = -(-math.prod(x.shape[:-1]) * len(inner) // HIDDEN_VALUES)
    return tuple(part.flatten(0, -2) for part in x.tensor_split(max(1, min(len(x), count))))


def _as_they_meet(x: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Weights and biases in the precision in which the rows of x meet them."""
    dtype = torch.float32 if is_few(x) else torch.bfloat16
    return [layer.to(dtype) for layer in layers]


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(R, I) -> (R, O) in bfloat16, by a product in the weight's precision."""
    return torch.addmm(bias, rows.to(weight.dtype), weight.mT).to(torch.bfloat16)


def _linear_backward(grad: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of its outcome (R, O) -> the gradients of the rows (R, I), in bfloat16, of the weight (O, I) and the bias (O)."""
    grad, rows = grad.to(weight.dtype), rows.to(weight.dtype)
    of_rows = (grad @ weight).to(torch.bfloat16)
    return of_rows, grad.mT @ rows, grad.sum(0, dtype=torch.float32)
