"""MiT, the medical transformer of UniMiSS (ECCV 2022): one forward for images and volumes.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the token grid (as many axes as S),
N tokens of a grid, M keys. A sequence of tokens is (B, 1 + N, C): the class token comes first.

Three things differ between 2D and 3D: patch convolution (and its transpose), position table and spatial reduction.
Each sits in a `Switched`, whose children are named `2d` and `3d`; a tensor is used by one rank only exactly if its
name holds that component. Everything else is shared.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimiss_core.convolution import GreyConv3d, GreyOrColourConv2d, doubling, reducing
from unimiss_core.precision import Linear, in_bf16_on_cpu
from unimiss_core.scan import RANKS, SMALLEST, Rank

INSTANCE_NORM: dict[Rank, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}

CHANNELS: dict[Rank, int] = {2: 3, 3: 1}
"""Channels of the stem; a grey image counts as three equal ones."""

STEM_STRIDE: dict[Rank, tuple[int, ...]] = {2: (2, 2), 3: (1, 2, 2)}

HEADS = (1, 2, 4, 8)
REDUCTIONS = (6, 4, 2, 1)
"""Attention heads and spatial reduction of keys and values, by encoder stage; the decoder goes back through them."""

Size = Literal["nano", "tiny", "small"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers in which the sizes of MiT and its head differ."""

    stem: int
    widths: tuple[int, ...]
    """Channels of the four encoder stages; the decoder goes back through the first three."""
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    head_hidden: int
    bottleneck: int

    @property
    def width(self) -> int:
        """Features of one scan: the class token's width after the decoder."""
        return self.widths[0]


_PUBLISHED_WIDTHS = (48, 128, 256, 512)

ARCHITECTURES: dict[Size, Architecture] = {
    "nano": Architecture(
        stem=16,
        widths=(32, 48, 64, 128),
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1),
        head_hidden=256,
        bottleneck=128,
    ),
    "tiny": Architecture(
        stem=32,
        widths=_PUBLISHED_WIDTHS,
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1),
        head_hidden=2048,
        bottleneck=256,
    ),
    "small": Architecture(
        stem=32,
        widths=_PUBLISHED_WIDTHS,
        encoder_depths=(2, 3, 4, 3),
        decoder_depths=(3, 4, 3),
        head_hidden=2048,
        bottleneck=256,
    ),
}


@dataclass(frozen=True)
class Features:
    """What MiT knows about B scans.

    class_token: (B, width), normalised: the representation that self-distillation and probes use.
    stem_map: (B, stem, *S / stem stride), the finest that there is (1/2 of H and W, all of D).
    encoder_maps: (B, widths[i], *G_i) of the four encoder stages, finest first (1/4 of H and W, 1/2 of D).
    decoder_map: (B, width, *G_0), as fine as encoder_maps[0].
    """

    class_token: Tensor
    stem_map: Tensor
    encoder_maps: tuple[Tensor, ...]
    decoder_map: Tensor


class MiT(nn.Module):
    """Encoder and decoder with switchable patch embedding; the input's number of axes picks the path.

    input_sizes: by rank, the input that its position tables are made for. A rank left out has no tensors here, so
    a site without volumes can hold the model without its 3D part; shared and 2D tensors keep their names.
    The released code asks for stochastic depth of 0.1 and drops it in silence; there is none here.
    """

    def __init__(self, architecture: Architecture, input_sizes: dict[Rank, tuple[int, ...]]) -> None:
        super().__init__()
        self.architecture = architecture
        self.ranks = tuple(sorted(input_sizes))
        grids = {rank: token_grids(size) for rank, size in input_sizes.items()}
        self.encoder = Encoder(architecture, grids)
        self.decoder = Decoder(architecture, grids)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> class token (B, width). The same as `features(x).class_token`, for less work.

        C is 3 or 1 for images, 1 for volumes. Raises ValueError: a rank, channels or a size that do not fit.
        """
        self._check(x)
        class_token: Tensor = self.decoder(*self.encoder(x), class_only=True)[0]
        return class_token

    def features(self, x: Tensor) -> Features:
        """x (B, C, *S) -> class token and every feature map, for segmentation and reconstruction. Errors as forward."""
        self._check(x)
        stem_map = self.encoder.stem(x)
        class_token, maps = self.encoder.of_stem(stem_map)
        class_token, decoder_map = self.decoder(class_token, maps)
        return Features(class_token, stem_map, maps, decoder_map)

    @property
    def num_features(self) -> int:
        """Width of a token, as timm's models call it."""
        return self.architecture.width

    def forward_features(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> normalised tokens (B, 1 + N, width), the class token first, then the decoder's map cell by
        cell. With `forward_head` the two halves that timm's models have; errors as forward."""
        found = self.features(x)
        return torch.cat([found.class_token[:, None], found.decoder_map.flatten(2).mT], dim=1)

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:  # noqa: ARG002
        """tokens (B, 1 + N, width) -> class token (B, width): what `forward` gives of the same x, up to rounding.

        pre_logits: as in timm, whose classifier it leaves out; there is none here.
        """
        return tokens[:, 0]

    def _check(self, x: Tensor) -> None:
        rank = x.ndim - 2
        if rank not in self.ranks:
            known = " or ".join(f"{r}D (B, C, {', '.join('DHW'[-r:])})" for r in self.ranks)
            raise ValueError(f"the model takes {known}; got a tensor of shape {tuple(x.shape)}")
        if x.shape[1] not in {1, CHANNELS[rank]}:
            raise ValueError(f"{rank}D input needs 1{' or 3' * (rank == 2)} channels; got {x.shape[1]}")
        size, least = tuple(x.shape[2:]), SMALLEST[rank]
        if any(have < need for have, need in zip(size, least, strict=True)):
            raise ValueError(f"{rank}D input of size {size} is too small: every axis needs at least {least}")


class Encoder(nn.Module):
    """Stem and four stages, each halving the grid."""

    def __init__(self, architecture: Architecture, grids: dict[Rank, list[tuple[int, ...]]]) -> None:
        super().__init__()
        widths = (architecture.stem, *architecture.widths)
        self.stem = Switched(lambda rank: ConvBlock(rank, CHANNELS[rank], widths[0], 7, STEM_STRIDE[rank]), grids)
        self.class_token = nn.Parameter(torch.empty(1, widths[1]))
        self.stages = nn.ModuleList(
            _encoder_stage(i, widths[i], widths[i + 1], depth, {rank: grid[i] for rank, grid in grids.items()})
            for i, depth in enumerate(architecture.encoder_depths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, C, *S) -> class token of the last stage (B, widths[3]) and the maps of all, finest first."""
        return self.of_stem(self.stem(x))

    def of_stem(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The stem's map (B, stem, *S / stem stride) -> what `forward` gives."""
        maps: list[Tensor] = []
        class_token = self.class_token.expand(x.shape[0], -1)
        for stage in self.stages:
            class_token, x = stage(x, class_token)
            maps.append(x)
        return class_token, tuple(maps)


class Decoder(nn.Module):
    """Three stages, each doubling the grid and adding the encoder's map of that resolution."""

    def __init__(self, architecture: Architecture, grids: dict[Rank, list[tuple[int, ...]]]) -> None:
        super().__init__()
        widths = architecture.widths[::-1]
        self.stages = nn.ModuleList(
            _decoder_stage(2 - i, widths[i], widths[i + 1], depth, {rank: grid[2 - i] for rank, grid in grids.items()})
            for i, depth in enumerate(architecture.decoder_depths)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-5)

    def forward(
        self, class_token: Tensor, encoder_maps: tuple[Tensor, ...], *, class_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The encoder's outcome -> normalised class token (B, width) and map (B, width, *G).

        class_only: the last block works for the class token alone, since nothing reads the other tokens' outcome;
        the map that comes back is then empty.
        """
        x = encoder_maps[-1]
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            class_token, x = stage(x, class_token, encoder_maps[-2 - i], class_only=class_only and last)
        tokens: Tensor = self.norm(torch.cat([class_token[:, None], x.flatten(2).mT], dim=1))
        return tokens[:, 0], tokens[:, 1:].mT.unflatten(2, x.shape[2:])


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
            x = _cropped(x, skip.shape[2:]) + skip
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
    """A learned vector for the class token and for each cell of a grid: (1 + N, C)."""

    def __init__(self, grid: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1 + math.prod(grid), width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *G) -> (1 + N, C), resized without its class row where G is not the table's own grid.

        Bicubic or trilinear, as published: the scale factor is (n + 0.1) / N per axis, and that factor, not the
        ratio of the sizes, sets where the table is sampled. A plain resize would differ a little, and released
        weights were trained with this one.
        """
        if x.shape[2:] == self.grid:
            return self.table
        cells = self.table[1:].mT.unflatten(1, self.grid)[None]
        scale = [(n + 0.1) / old for n, old in zip(x.shape[2:], self.grid, strict=True)]
        mode = "bicubic" if len(self.grid) == 2 else "trilinear"
        resized = F.interpolate(cells, scale_factor=scale, mode=mode, align_corners=False)
        return torch.cat([self.table[:1], resized[0].flatten(1).mT])


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, ratio: int, *, qkv_bias: bool, norm_eps: float, ranks: Collection[Rank]
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, ratio, bias=qkv_bias, ranks=ranks)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, tokens: Tensor, grid: torch.Size, *, class_only: bool = False) -> Tensor:
        """tokens (B, 1 + N, C) -> the same shape, or (B, 1, C) where only the class token's outcome is wanted."""
        attended = self.attention(self.norm1(tokens), grid, class_only=class_only)
        tokens = (tokens[:, :1] if class_only else tokens) + attended
        y: Tensor = tokens + self.mlp(self.norm2(tokens))
        return y


class Attention(nn.Module):
    """Multi-head attention whose keys and values come from a spatially reduced sequence (PVT, arXiv:2102.12122).

    The grid is reduced by a strided convolution of `ratio`; the class token is kept beside it.
    """

    def __init__(self, width: int, heads: int, ratio: int, *, bias: bool, ranks: Collection[Rank]) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=bias)
        self.key_value = Linear(width, 2 * width, bias=bias)
        self.project = Linear(width, width)
        self.reduces = ratio > 1
        if self.reduces:
            self.reduce = Switched(lambda rank: reducing(rank, width, ratio), ranks)
            self.reduce_norm = nn.LayerNorm(width, eps=1e-5)

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
        class_token, cells = tokens.split([1, tokens.shape[1] - 1], dim=1)
        cells = self.reduce(cells.mT.unflatten(2, grid))
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


def token_grids(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Input size S -> the grids of the four encoder stages, finest first; the stem halves H and W, a stage all axes."""
    rank: Rank = 2 if len(size) == 2 else 3
    grid = tuple(math.ceil(n / stride) for n, stride in zip(size, STEM_STRIDE[rank], strict=True))
    grids = []
    for _ in REDUCTIONS:
        grid = tuple(math.ceil(n / 2) for n in grid)
        grids.append(grid)
    return grids


def _cropped(x: Tensor, grid: torch.Size) -> Tensor:
    """x (B, C, *G) without what lies beyond `grid` at the end of each axis."""
    for axis, n in enumerate(grid, start=2):
        x = x.narrow(axis, 0, n)
    return x


def _encoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> Stage:
    return Stage(
        embed=Switched(lambda rank: ConvBlock(rank, before, width, 3, 2), grids),
        class_token=Linear(before, width) if i > 0 else nn.Identity(),
        position=Switched(lambda rank: PositionTable(grids[rank], width), grids),
        blocks=[Block(width, HEADS[i], REDUCTIONS[i], qkv_bias=True, norm_eps=1e-6, ranks=grids) for _ in range(depth)],
    )


def _decoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> Stage:
    return Stage(
        embed=Switched(lambda rank: doubling(rank, before, width), grids),
        class_token=Linear(before, width),
        position=Switched(lambda rank: PositionTable(grids[rank], width), grids),
        blocks=[
            Block(width, HEADS[i + 1], REDUCTIONS[i], qkv_bias=False, norm_eps=1e-5, ranks=grids) for _ in range(depth)
        ],
    )
