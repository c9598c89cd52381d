"""MiTplus, the network of UniMiSS+ (TPAMI 2024): the class token of the encoder, and a decoder that draws every voxel.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the token grid (as many axes as S),
N tokens of a grid. The encoder's sequences of tokens are (B, 1 + N, C), the class token first; the decoder's, without
class token, are (B, N, C).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unimiss_core.convolution import enlarging
from unimiss_core.layers import (
    CHANNELS,
    HEADS,
    STEM_STRIDE,
    Block,
    ConvBlock,
    Features,
    PositionTable,
    Sizes,
    Stage,
    StagedEncoder,
    Switched,
    TokenNetwork,
    check_scans,
    cropped,
)
from unimiss_core.model_config import PlusSize
from unimiss_core.precision import Linear
from unimiss_core.scan import Rank

REDUCTIONS = (8, 4, 2, 1)
"""Spatial reduction of keys and values, by encoder stage; the decoder goes back through the first three of these and of
the heads."""

STRIDES: dict[Rank, tuple[tuple[int, ...], ...]] = {
    2: ((2, 2), (2, 2), (2, 2), (2, 2)),
    3: ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
}
"""By encoder stage; the decoder goes back through the last three, and once more through the first."""


@dataclass(frozen=True, kw_only=True)
class PlusArchitecture(Sizes):
    """The numbers in which the sizes of MiTplus and its head differ."""

    reductions: ClassVar = REDUCTIONS
    stem: tuple[int, int]
    """Channels of the convolutions at full resolution, and of those at half; the decoder ends with them, reversed."""
    widths: tuple[int, int, int, int]
    """Channels of the encoder stages; the decoder goes back through the first three."""

    @property
    def width(self) -> int:
        """Features of one scan: the class token's width after the encoder."""
        return self.widths[-1]


PLUS_ARCHITECTURES: dict[PlusSize, PlusArchitecture] = {
    "plus_nano": PlusArchitecture(
        stem=(8, 16),
        widths=(32, 48, 64, 64),
        encoder_depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1),
        head_hidden=256,
        bottleneck=128,
    ),
    "plus": PlusArchitecture(
        stem=(32, 64),
        widths=(128, 256, 320, 320),
        encoder_depths=(1, 2, 4, 2),
        decoder_depths=(1, 1, 1),
        head_hidden=2048,
        bottleneck=256,
    ),
}


class MiTPlus(TokenNetwork):
    """Convolutions, four stages of tokens, and back up to full resolution; the input's number of axes picks the path.

    input_sizes, channels: as of `MiT`. The released code drops paths of the decoder's blocks by chance in pretraining,
    those of the last with a probability of 0.1; nothing here is dropped.
    """

    architecture: PlusArchitecture

    def __init__(
        self, architecture: PlusArchitecture, input_sizes: dict[Rank, tuple[int, ...]], channels: int | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.channels = channels
        self.ranks = tuple(sorted(input_sizes))
        grids = {rank: plus_grids(size) for rank, size in input_sizes.items()}
        self.encoder = PlusEncoder(architecture, grids, channels)
        self.decoder = PlusDecoder(architecture, grids)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> class token (B, width) as the last block leaves it, not normalised; the decoder is not run.

        C is 3 or 1 for images, 1 for volumes, or what `channels` says. Raises ValueError: a rank, channels or a size
        that do not fit.
        """
        check_scans(x, self.ranks, self.channels)
        _, half = self.encoder.convolved(x)
        class_token: Tensor = self.encoder.through(half, class_only=True)[0]
        return class_token

    def features(self, x: Tensor) -> Features:
        """x (B, C, *S) -> class token and every feature map; the decoder's is as fine as x. Errors as forward."""
        check_scans(x, self.ranks, self.channels)
        full, half = self.encoder.convolved(x)
        class_token, maps = self.encoder.through(half)
        return Features(class_token, half, maps, self.decoder(maps, half, full))

    @property
    def map_width(self) -> int:
        """Channels of the decoder's map."""
        return self.architecture.stem[0]

    @property
    def cells(self) -> Mapping[Rank, tuple[int, ...]]:
        """By rank, the voxels that a cell of the decoder's map stands for along each axis: one."""
        return {rank: (1,) * rank for rank in self.ranks}

    @property
    def of_maps_alone(self) -> tuple[nn.Module, ...]:
        """What only `features` runs: the class token never sees the decoder."""
        return (self.decoder,)

    @property
    def fine(self) -> tuple[nn.Module, ...]:
        """What works on the fine grids, where most of a forward pass's memory is kept."""
        ends = self.encoder.at_full, self.encoder.at_half, self.decoder.at_half
        return *ends, *self.encoder.stages[:2], *self.decoder.stages[-2:]

    def forward_features(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> tokens (B, 1 + N, width) of the encoder's last stage, the class token first, then its map
        cell by cell. With `forward_head` the two halves that timm's models have; errors as forward."""
        check_scans(x, self.ranks, self.channels)
        _, half = self.encoder.convolved(x)
        class_token, maps = self.encoder.through(half)
        return torch.cat([class_token[:, None], maps[-1].flatten(2).mT], dim=1)


class PlusEncoder(StagedEncoder):
    """Convolutions at full and at half resolution, and four stages."""

    def __init__(
        self, architecture: PlusArchitecture, grids: dict[Rank, list[tuple[int, ...]]], channels: int | None = None
    ) -> None:
        super().__init__()
        full, half = architecture.stem
        widths = (half, *architecture.widths)
        self.at_full = Switched(lambda rank: ConvBlock(rank, channels or CHANNELS[rank], full, 3, 1), grids)
        self.at_half = Switched(lambda rank: _two_convolutions(rank, full, half, STEM_STRIDE[rank]), grids)
        self.class_token = nn.Parameter(torch.empty(1, widths[1]))
        self.stages = nn.ModuleList(
            _encoder_stage(i, widths[i], widths[i + 1], depth, {rank: grid[i] for rank, grid in grids.items()})
            for i, depth in enumerate(architecture.encoder_depths)
        )

    def convolved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, *S) -> the maps at full resolution (B, stem[0], *S) and at half (B, stem[1], *S / stem stride)."""
        full = self.at_full(x)
        return full, self.at_half(full)


class PlusDecoder(nn.Module):
    """Three stages of tokens, then convolutions alone, each adding the encoder's map of its resolution."""

    def __init__(self, architecture: PlusArchitecture, grids: dict[Rank, list[tuple[int, ...]]]) -> None:
        super().__init__()
        full, half = architecture.stem
        widths = architecture.widths[::-1]
        self.stages = nn.ModuleList(
            _decoder_stage(2 - i, widths[i], widths[i + 1], depth, {rank: grid[2 - i] for rank, grid in grids.items()})
            for i, depth in enumerate(architecture.decoder_depths)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-5)
        self.to_half = Switched(lambda rank: enlarging(rank, widths[-1], half, STRIDES[rank][0]), grids)
        self.at_half = Switched(lambda rank: ConvBlock(rank, half, half, 3, 1), grids)
        self.to_full = Switched(lambda rank: enlarging(rank, half, full, STEM_STRIDE[rank]), grids)

    def forward(self, encoder_maps: tuple[Tensor, ...], half: Tensor, full: Tensor) -> Tensor:
        """The maps of all encoder stages, finest first, and of its convolutions -> map (B, stem[0], *S)."""
        x = encoder_maps[-1]
        for stage, skip in zip(self.stages, encoder_maps[-2::-1], strict=True):
            x = stage(x, skip)
        tokens: Tensor = self.norm(x.flatten(2).mT)
        x = tokens.mT.unflatten(2, x.shape[2:])
        x = self.at_half(cropped(self.to_half(x), half.shape[2:]) + half)
        y: Tensor = cropped(self.to_full(x), full.shape[2:]) + full
        return y


class CellStage(nn.Module):
    """Embed a map at a finer resolution, add the encoder's and positions, run blocks over its cells.

    No class token goes with them, and so a position table has no row for one. The released code resizes these tables
    as if their first cell were one, which fails for any input but of the size that they are made for.
    """

    def __init__(self, *, embed: nn.Module, position: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.embed = embed
        self.position = position
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C_before, *G_before), the encoder's map skip (B, C, *G) -> (B, C, *G); odd grids as in `Stage`."""
        x = cropped(self.embed(x), skip.shape[2:]) + skip
        grid = x.shape[2:]
        tokens = x.flatten(2).mT + self.position(x).to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, grid)
        y: Tensor = tokens.mT.unflatten(2, grid)
        return y


def plus_grids(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Input size S -> the grids of the four encoder stages, finest first."""
    rank: Rank = 2 if len(size) == 2 else 3
    grids = [size]
    for strides in (STEM_STRIDE[rank], *STRIDES[rank]):
        grids.append(tuple(math.ceil(n / stride) for n, stride in zip(grids[-1], strides, strict=True)))
    return grids[2:]


def _encoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> Stage:
    return Stage(
        embed=Switched(lambda rank: _two_convolutions(rank, before, width, STRIDES[rank][i]), grids),
        class_token=Linear(before, width) if i > 0 else nn.Identity(),
        position=Switched(lambda rank: PositionTable(grids[rank], width), grids),
        blocks=[_block(i, width, grids, qkv_bias=True, norm_eps=1e-6) for _ in range(depth)],
    )


def _decoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> CellStage:
    return CellStage(
        embed=Switched(lambda rank: _enlarged_and_convolved(rank, before, width, STRIDES[rank][i + 1]), grids),
        position=Switched(lambda rank: PositionTable(grids[rank], width, class_rows=0), grids),
        blocks=[_block(i, width, grids, qkv_bias=False, norm_eps=1e-5) for _ in range(depth)],
    )


def _block(i: int, width: int, grids: dict[Rank, tuple[int, ...]], *, qkv_bias: bool, norm_eps: float) -> Block:
    return Block(
        width, HEADS[i], REDUCTIONS[i], qkv_bias=qkv_bias, norm_eps=norm_eps, ranks=grids.keys(), depthwise=True
    )


def _two_convolutions(rank: Rank, before: int, width: int, stride: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(ConvBlock(rank, before, width, 3, stride), ConvBlock(rank, width, width, 3, 1))


def _enlarged_and_convolved(rank: Rank, before: int, width: int, factors: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(enlarging(rank, before, width, factors), ConvBlock(rank, width, width, 3, 1))
