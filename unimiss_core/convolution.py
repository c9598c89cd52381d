"""The backbones' convolutions, each in the form that is cheapest where it runs: same function, parameters and names.

In bfloat16 on a CPU a matrix product reaches several times the rate of a convolution, most of all backward
(docs/performance.md). A convolution whose stride is its kernel's size is one product: no input meets two patches. So is
one whose windows are few, though these may overlap. Elsewhere, and in any other precision, all of these are torch's own
layers, bit for bit.

Legend of shapes: B scans, C channels in, O channels out, S spatial axes of the input, k the kernel's size along
each of them, G the grid of patches (S // k) or windows, N = prod(G).
"""

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimiss_core.gathering import Gathers, OuterProducts
from unimiss_core.precision import in_bf16, in_bf16_on_cpu, in_fitting_precision
from unimiss_core.scan import Rank

CONV: dict[Rank, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSED: dict[Rank, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class ReducingConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel's size, without padding: (B, C, *S) -> (B, O, *G)."""

    def forward(self, x: Tensor) -> Tensor:
        return _reduced(x, self) if in_bf16_on_cpu(x) else super().forward(x)


class ReducingConv3d(nn.Conv3d):
    """As `ReducingConv2d`, of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        return _reduced(x, self) if in_bf16_on_cpu(x) else super().forward(x)


class EnlargingConv2d(nn.ConvTranspose2d):
    """A transposed convolution whose stride is its kernel's size: (B, C, *S) -> (B, O, *(k S))."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        return _enlarged(x, self) if in_bf16_on_cpu(x) else super().forward(x)


class EnlargingConv3d(nn.ConvTranspose3d):
    """As `EnlargingConv2d`, of volumes."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        return _enlarged(x, self) if in_bf16_on_cpu(x) else super().forward(x)


def reducing(rank: Rank, width: int, ratio: int, *, depthwise: bool = False) -> nn.Module:
    """(B, width, *S) -> (B, width, *(S // ratio)). depthwise: each channel alone, which is no product of matrices."""
    made: Any = CONV[rank] if depthwise else {2: ReducingConv2d, 3: ReducingConv3d}[rank]
    layer: nn.Module = made(width, width, ratio, ratio, groups=width if depthwise else 1)
    return layer


def enlarging(rank: Rank, before: int, width: int, factors: tuple[int, ...]) -> nn.Module:
    """(B, before, *S) -> (B, width, *(factors S))."""
    made: Any = {2: EnlargingConv2d, 3: EnlargingConv3d}[rank]
    layer: nn.Module = made(before, width, factors, factors)
    return layer


class GreyOrColourConv2d(Gathers, nn.Conv2d):
    """A 2D convolution that also takes one channel where it was made for several.

    A grey image repeated over all channels, as the released code feeds it, meets the sum of the kernel over its
    input channels: the sum is taken first, which is the same function for a third of the multiplications.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_better_as_product(x, self):
            return _convolved(x, self)
        grey = x.shape[1] == 1 < self.in_channels
        weight = self.weight.sum(1, keepdim=True) if grey else self.weight
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class GreyConv3d(Gathers, nn.Conv3d):
    """A 3D convolution without bias that, over one channel, can count the kernel's planes as channels: a 2D convolution
    of each plane with its neighbours. Kernels for bfloat16 leave most of their width empty over a single channel."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_better_as_product(x, self):
            return _convolved(x, self)
        if x.shape[1] > 1 or not in_bf16(x):
            return super().forward(x)
        (along, *step), (planes, *_) = self.stride, self.kernel_size
        before, *around = _padding(self)
        stacks = F.pad(x[:, 0].to(torch.bfloat16), (0, 0, 0, 0, before, before)).unfold(1, planes, along)
        images = stacks.movedim(-1, 2).flatten(0, 1)  # (B x D', planes, H, W)
        y = F.conv2d(images, self.weight[:, 0].to(torch.bfloat16), None, step, around)
        by_plane: Tensor = y.unflatten(0, (len(x), -1))
        return by_plane.transpose(1, 2)


def _reduced(x: Tensor, layer: ReducingConv2d | ReducingConv3d) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # or few rows would be cast to bfloat16 all the same
        y: Tensor = _PatchProduct.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return y


def _enlarged(x: Tensor, layer: EnlargingConv2d | EnlargingConv3d) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # or few rows would be cast to bfloat16 all the same
        y: Tensor = _ProductInPatches.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return y


def _is_better_as_product(x: Tensor, layer: GreyOrColourConv2d | GreyConv3d) -> bool:
    """Whether the windows are so few that the weight is the larger factor: torch's layer spends its time on laying that
    and its gradient out anew. Not in inference: there a scan's answer must not hang on how many are asked about."""
    is_plain = x.shape[1] == layer.in_channels and layer.bias is None
    if not (is_plain and in_bf16_on_cpu(x)) or torch.is_inference_mode_enabled():
        return False
    geometry = zip(x.shape[2:], layer.kernel_size, layer.stride, _padding(layer), strict=True)
    return len(x) * math.prod((n + 2 * p - k) // step + 1 for n, k, step, p in geometry) <= layer.out_channels


def _convolved(x: Tensor, layer: GreyOrColourConv2d | GreyConv3d) -> Tensor:
    geometry = layer.stride, _padding(layer)
    with torch.autocast("cpu", enabled=False):  # or few rows would be cast to bfloat16 all the same
        y: Tensor = _WindowProduct.apply(x, layer.weight, *geometry, layer.gathered)  # type: ignore[no-untyped-call]
    return y


def _padding(layer: GreyOrColourConv2d | GreyConv3d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)
    return layer.padding


class _WindowProduct(torch.autograd.Function):
    """x (B, C, *S), weight (O, C, *k) -> (B, O, *G) in bfloat16, as the product (B N, C k) (C k, O), for a stride and a
    padding of each axis: the weight is used as it lies in memory. Windows may overlap; what meets in a cell on the way
    back is added in float32. gathered: where the rows of the weight's gradient go, if it is not to be made here."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        gathered: OuterProducts | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.gathered = stride, padding, gathered
        windows = _windows(x, weight.shape[2:], stride, padding)
        y = _rows(windows) @ weight.to(windows.dtype).flatten(1).mT
        by_window: Tensor = y.to(torch.bfloat16).unflatten(0, windows.shape[:-1])
        return by_window.movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        windows = _windows(x, weight.shape[2:], ctx.stride, ctx.padding)
        rows = _rows(grads[0].movedim(1, -1)).to(windows.dtype)  # (B N, O)
        of_weight = None
        if ctx.gathered is None and ctx.needs_input_grad[1]:
            of_weight = (rows.mT @ _rows(windows)).to(weight.dtype).view_as(weight)
        elif ctx.gathered is not None:
            ctx.gathered.add(rows, _rows(windows))
        of_windows = (rows @ weight.to(rows.dtype).flatten(1)).view_as(windows)
        of_x = _overlaid(of_windows.unflatten(-1, weight.shape[1:]), x.shape[2:], ctx.stride, ctx.padding)
        return of_x.to(x.dtype), of_weight, None, None, None


class _PatchProduct(torch.autograd.Function):
    """x (B, C, *S), weight (O, C, *k), bias (O) -> (B, O, *G) in bfloat16, as the product (B N, k C) (k C, O).

    Of what it works with only x and the weight are kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        patches = _patches(x, weight.shape[2:])
        y = torch.addmm(bias.to(patches.dtype), _rows(patches), _matrix(weight, patches.dtype).mT)
        by_patch: Tensor = y.to(torch.bfloat16).unflatten(0, patches.shape[:-1])
        return by_patch.movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        patches = _patches(x, weight.shape[2:])
        rows = _rows(grads[0].movedim(1, -1)).to(patches.dtype)  # (B N, O)
        of_weight = _as_weight(rows.mT @ _rows(patches), weight)
        of_patches = (rows @ _matrix(weight, rows.dtype)).view_as(patches)
        return _joined(of_patches, x.shape[2:], weight.shape[2:]).to(x.dtype), of_weight, _sum(rows)


class _ProductInPatches(torch.autograd.Function):
    """x (B, C, *S), weight (C, O, *k), bias (O) -> (B, O, *(k S)) in bfloat16, as the product (B N, C) (C, k O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        cells, kernel = _cells(x), weight.shape[2:]
        shifts = bias.to(cells.dtype).repeat(kernel.numel())
        y = torch.addmm(shifts, _rows(cells), _matrix(weight, cells.dtype)).to(torch.bfloat16)
        size = torch.Size(n * k for n, k in zip(x.shape[2:], kernel, strict=True))
        return _joined(y.unflatten(0, cells.shape[:-1]), size, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        cells = _cells(x)
        rows = _rows(_patches(grads[0], weight.shape[2:])).to(cells.dtype)  # (B N, k O)
        of_x = (rows @ _matrix(weight, rows.dtype).mT).view_as(cells).movedim(-1, 1).to(x.dtype)
        of_weight = _as_weight(_rows(cells).mT @ rows, weight)
        return of_x, of_weight, _sum(_rows(rows.unflatten(1, (-1, weight.shape[1]))))


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A kernel (P, Q, *k) -> (P, k Q)."""
    return weight.to(dtype).movedim(1, -1).flatten(1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """`_matrix`, undone: (P, k Q) -> (P, Q, *k), in the weight's type and layout."""
    kernel = matrix.unflatten(1, (*weight.shape[2:], weight.shape[1])).movedim(-1, 1)
    return torch.empty_like(weight).copy_(kernel)


def _patches(x: Tensor, kernel: torch.Size) -> Tensor:
    """x (B, C, *S) -> (B, *G, k C), few in float32; what is left over at an axis's end is in none."""
    x = x.movedim(1, -1)
    for axis, k in enumerate(kernel):
        at = 1 + 2 * axis
        x = x.narrow(at, 0, x.shape[at] // k * k).unflatten(at, (-1, k))
    axes = len(kernel)
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), -1)
    return in_fitting_precision(x.flatten(1 + axes))


def _joined(patches: Tensor, size: torch.Size, kernel: torch.Size) -> Tensor:
    """`_patches`, undone: (B, *G, k C) -> (B, C, *S) of this size; zero where there was no patch."""
    axes = len(kernel)
    x: Tensor = patches.unflatten(-1, (*kernel, -1))  # (B, *G, *k, C)
    x = x.permute(0, *(axis for g in range(1, 1 + axes) for axis in (g, g + axes)), -1)
    for axis in range(1, 1 + axes):
        x = x.flatten(axis, axis + 1)
    left_over = [n - m for n, m in zip(size, x.shape[1:-1], strict=True)]
    if any(left_over):
        x = F.pad(x, (0, 0, *(n for left in reversed(left_over) for n in (0, left))))
    return x.movedim(-1, 1)


def _windows(x: Tensor, kernel: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """x (B, C, *S) -> (B, *G, C k), few in float32."""
    axes = len(kernel)
    x = F.pad(x, [n for p in reversed(padding) for n in (p, p)])
    for axis, (k, step) in enumerate(zip(kernel, stride, strict=True), start=2):
        x = x.unfold(axis, k, step)
    return in_fitting_precision(x.movedim(1, 1 + axes).flatten(1 + axes))


def _overlaid(windows: Tensor, size: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """`_windows`, undone: (B, *G, C, *k) -> (B, C, *S) of this size in float32, the sum of what meets in a cell."""
    axes = len(size)
    grid, channels, kernel = windows.shape[1 : 1 + axes], windows.shape[1 + axes], windows.shape[2 + axes :]
    padded = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    x = windows.new_zeros((len(windows), *padded, channels), dtype=torch.float32)
    for place, values in zip(product(*map(range, kernel)), windows.flatten(2 + axes).unbind(-1), strict=True):
        cells = [slice(at, at + step * n, step) for at, step, n in zip(place, stride, grid, strict=True)]
        x[(slice(None), *cells)] += values
    for axis, (n, p) in enumerate(zip(size, padding, strict=True), start=1):
        x = x.narrow(axis, p, n)
    return x.movedim(-1, 1)


def _cells(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, *S, C), as channels lie in a sequence of tokens; few in float32."""
    return in_fitting_precision(x.movedim(1, -1))


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (R, C)."""
    return x.flatten(0, -2)


def _sum(rows: Tensor) -> Tensor:
    """(R, C) -> (C), in float32."""
    return rows.sum(0, dtype=torch.float32)
