"""What the backbones are made of: stages of tokens over the cells of a grid, switched between images and volumes.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the token grid (as many axes as S),
N tokens of a grid, M keys. A sequence of tokens is (B, 1 + N, C): the class token comes first, where there is one.

Three things differ between 2D and 3D: patch convolution (and its transpose), position table and spatial reduction.
Each sits in a `Switched`, whose children are named `2d` and `3d`; a tensor is used by one rank only exactly if its
name holds that component. Everything else is shared.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimiss_core.convolution import GreyConv3d, GreyOrColourConv2d, reducing
from unimiss_core.precision import MLP, InstanceNorm2d, InstanceNorm3d, LayerNorm, Linear, in_bf16_on_cpu
from unimiss_core.scan import RANKS, SMALLEST, Rank

INSTANCE_NORM: dict[Rank, type[InstanceNorm2d] | type[InstanceNorm3d]] = {2: InstanceNorm2d, 3: InstanceNorm3d}

CHANNELS: dict[Rank, int] = {2: 3, 3: 1}
"""Channels of the stem in pretraining, and wherever a scan is one image or volume; a grey image counts as three equal
ones."""

STEM_STRIDE: dict[Rank, tuple[int, ...]] = {2: (2, 2), 3: (1, 2, 2)}

HEADS = (1, 2, 4, 8)
"""Attention heads by encoder stage."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that both backbones and their head are built by."""

    reductions: ClassVar[tuple[int, ...]]
    """Spatial reduction of keys and values, by encoder stage."""
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    head_hidden: int
    bottleneck: int

    @property
    def width(self) -> int:
        """Features of one scan: the width of its class token."""
        raise NotImplementedError

    def numbers(self) -> dict[str, int | tuple[int, ...]]:
        """All that a backbone of this size is built by."""
        return {**asdict(self), "heads": HEADS, "reductions": self.reductions}


@dataclass(frozen=True)
class Features:
    """What a backbone knows about B scans.

    class_token: (B, num_features): the representation that self-distillation and probes use.
    stem_map: (B, C, *S / stem stride), what enters the first stage (1/2 of H and W, all of D).
    encoder_maps: (B, widths[i], *G_i) of the four encoder stages, finest first (1/4 of H and W, 1/2 of D).
    decoder_map: (B, map_width, *G), whose cells stand for as many voxels as the backbone's `cells` say.
    """

    class_token: Tensor
    stem_map: Tensor
    encoder_maps: tuple[Tensor, ...]
    decoder_map: Tensor


class TokenNetwork(nn.Module):
    """What timm's models have, of either backbone."""

    architecture: Sizes

    @property
    def num_features(self) -> int:
        """Width of a token."""
        return self.architecture.width

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:  # noqa: ARG002
        """tokens (B, 1 + N, width) of `forward_features` -> class token (B, width): what `forward` gives of the same x,
        up to rounding.

        pre_logits: as in timm, whose classifier it leaves out; there is none here.
        """
        return tokens[:, 0]


class StagedEncoder(nn.Module):
    """An encoder's stages, which begin with a learned class token; what comes before them is each backbone's own."""

    class_token: nn.Parameter
    stages: nn.ModuleList

    def through(self, x: Tensor, *, class_only: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What enters the first stage (B, C, *G) -> class token of the last (B, widths[3]) and the maps of all, finest
        first.

        class_only: the last block works for the class token alone; the last map that comes back is then empty.
        """
        maps: list[Tensor] = []
        class_token = self.class_token.expand(x.shape[0], -1)
        for i, stage in enumerate(self.stages):
            class_token, x = stage(x, class_token, class_only=class_only and i == len(self.stages) - 1)
            maps.append(x)
        return class_token, tuple(maps)


def check_scans(x: Tensor, ranks: tuple[Rank, ...], channels: int | None) -> None:
    """channels: C of scans of several images or volumes; None: each is one.

    Raises ValueError: x is no (B, C, *S) of one of these ranks, with channels and a size that a backbone takes.
    """
    rank = x.ndim - 2
    if rank not in ranks:
        known = " or ".join(f"{r}D (B, C, {', '.join('DHW'[-r:])})" for r in ranks)
        raise ValueError(f"the model takes {known}; got a tensor of shape {tuple(x.shape)}")
    takes = {1, CHANNELS[rank]} if channels is None else {channels}
    if x.shape[1] not in takes:
        raise ValueError(f"{rank}D input needs {' or '.join(map(str, sorted(takes)))} channels; got {x.shape[1]}")
    size, least = tuple(x.shape[2:]), SMALLEST[rank]
    if any(have < need for have, need in zip(size, least, strict=True)):
        raise ValueError(f"{rank}D input of size {size} is too small: every axis needs at least {least}")


class Stage(nn.Module):
    """Embed a map at another resolution, add positions, run blocks over its tokens and the class token."""

    def __init__(self, *, embed: nn.Module, class_token: nn.Module, position: nn.Module, blocks: list["Block"]) -> None:
        super().__init__()
        self.embed = embed
        self.class_token = class_token
        self.position = position
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x: Tensor, class_token: Tensor, skip: Tensor | None = None, *, class_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x (B, C_before, *G_before), class_token (B, C_before) -> (B, C), (B, C, *G).

        skip: the encoder's map (B, C, *G), added after the embedding. Where an odd grid was halved, doubling it
        gives one row too many; that row is left off (the released code takes only sizes where this cannot occur).
        """
        x = self.embed(x)
        if skip is not None:
            x = cropped(x, skip.shape[2:]) + skip
        grid = x.shape[2:]
        token = self.class_token(class_token)[:, None].to(x.dtype)
        tokens = torch.cat([token, x.flatten(2).mT], dim=1) + self.position(x).to(x.dtype)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, grid, class_only=class_only and i == len(self.blocks) - 1)
        if class_only:
            return tokens[:, 0], x.new_empty((x.shape[0], tokens.shape[2], *(0 for _ in grid)))
        class_token, cells = tokens.split([1, tokens.shape[1] - 1], dim=1)
        return class_token.squeeze(1), cells.mT.unflatten(2, grid)


class Switched(nn.ModuleDict):
    """One child per rank, named `2d` and `3d`; the input's number of spatial axes picks the one that runs."""

    def __init__(self, build: Callable[[Rank], nn.Module], ranks: Iterable[Rank] = RANKS) -> None:
        super().__init__({f"{rank}d": build(rank) for rank in ranks})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[f"{x.ndim - 2}d"](x)
        return y


class ConvBlock(nn.Module):
    """Convolution without bias, InstanceNorm, LeakyReLU: (B, C_in, *S) -> (B, C_out, *ceil(S / stride))."""

    def __init__(
        self, rank: Rank, channels_in: int, channels_out: int, kernel: int, stride: int | tuple[int, ...]
    ) -> None:
        super().__init__()
        conv: Any = GreyOrColourConv2d if rank == 2 else GreyConv3d
        self.conv = conv(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = INSTANCE_NORM[rank](channels_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return F.leaky_relu(y, 0.01, inplace=True)


class PositionTable(nn.Module):
    """A learned vector for the class token and for each cell of a grid: (1 + N, C).

    class_rows: 0 where no class token goes with the cells; the table is then (N, C).
    """

    def __init__(self, grid: tuple[int, ...], width: int, *, class_rows: int = 1) -> None:
        super().__init__()
        self.grid = grid
        self.class_rows = class_rows
        self.table = nn.Parameter(torch.empty(class_rows + math.prod(grid), width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *G) -> (1 + N, C), resized without its class row where G is not the table's own grid.

        Bicubic or trilinear, as published: the scale factor is (n + 0.1) / N per axis, and that factor, not the
        ratio of the sizes, sets where the table is sampled. A plain resize would differ a little, and released
        weights were trained with this one. An axis of a volume that keeps its length keeps its rows, whatever the
        factor: torch's CPU kernel has it so; its compiler and, as its source reads, its GPU kernel have not.
        """
        if x.shape[2:] == self.grid:
            return self.table
        class_row, rows = self.table.tensor_split([self.class_rows])
        cells = rows.mT.unflatten(1, self.grid)[None]
        is_volume, lengths = len(self.grid) == 3, zip(x.shape[2:], self.grid, strict=True)
        scale = [1.0 if is_volume and n == old else (n + 0.1) / old for n, old in lengths]
        mode = "trilinear" if is_volume else "bicubic"
        resized = F.interpolate(cells, scale_factor=scale, mode=mode, align_corners=False)
        return torch.cat([class_row, resized[0].flatten(1).mT])


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        ratio: int,
        *,
        qkv_bias: bool,
        norm_eps: float,
        ranks: Collection[Rank],
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, ratio, bias=qkv_bias, ranks=ranks, depthwise=depthwise)
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, 4 * width)

    def forward(self, tokens: Tensor, grid: torch.Size, *, class_only: bool = False) -> Tensor:
        """tokens (B, 1 + N, C) -> the same shape, or (B, 1, C) where only the class token's outcome is wanted."""
        attended = self.attention(self.norm1(tokens), grid, class_only=class_only)
        tokens = (tokens[:, :1] if class_only else tokens) + attended
        y: Tensor = tokens + self.mlp(self.norm2(tokens))
        return y


class Attention(nn.Module):
    """Multi-head attention whose keys and values come from a spatially reduced sequence (PVT, arXiv:2102.12122).

    The grid is reduced by a strided convolution of `ratio`, of each channel alone where it is depthwise; a class token
    before the cells, if there is one, is kept beside it.
    """

    def __init__(
        self, width: int, heads: int, ratio: int, *, bias: bool, ranks: Collection[Rank], depthwise: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.ratio = ratio
        self.query = Linear(width, width, bias=bias)
        self.key_value = Linear(width, 2 * width, bias=bias)
        self.project = Linear(width, width)
        self.reduces = ratio > 1
        if self.reduces:
            self.reduce = Switched(lambda rank: reducing(rank, width, ratio, depthwise=depthwise), ranks)
            self.reduce_norm = LayerNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor, grid: torch.Size, *, class_only: bool = False) -> Tensor:
        """tokens (B, 1 + N, C) of a grid -> (B, 1 + N, C), or (B, 1, C) with the class token as only query."""
        context = self._reduced(tokens, grid) if self.reduces else tokens
        query = self.query(tokens[:, :1] if class_only else tokens)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value)
        y: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return y

    def _reduced(self, tokens: Tensor, grid: torch.Size) -> Tensor:
        """tokens (B, 1 + N, C) -> (B, 1 + M, C) with M about N / ratio**rank."""
        count = math.prod(grid)
        class_token, cells = tokens.split([tokens.shape[1] - count, count], dim=1)
        cells = self.reduce(_at_least(cells.mT.unflatten(2, grid), self.ratio))
        y: Tensor = self.reduce_norm(torch.cat([class_token, cells.flatten(2).mT], dim=1))
        return y


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: query (B, heads, N, d), key and value (B, heads, M, d) -> (B, heads, N, d).

    In float32 on CPUs: few keys are left after reduction, and there the fused kernel's backward takes 3 to 10 times as
    long in bfloat16, while plain products take as long and half a megabyte for each shape (docs/performance.md).
    """
    if in_bf16_on_cpu(query):
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float()).to(torch.bfloat16)
    return F.scaled_dot_product_attention(query, key, value)


def _at_least(x: Tensor, length: int) -> Tensor:
    """x (B, C, *G), with zeros at the end of each axis that is shorter than `length`."""
    missing = [max(0, length - n) for n in x.shape[2:]]
    return F.pad(x, [n for short in reversed(missing) for n in (0, short)]) if any(missing) else x


def cropped(x: Tensor, grid: torch.Size) -> Tensor:
    """x (B, C, *G) without what lies beyond `grid` at the end of each axis."""
    for axis, n in enumerate(grid, start=2):
        x = x.narrow(axis, 0, n)
    return x
