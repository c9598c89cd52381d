"""MiT, the medical transformer of UniMiSS (ECCV 2022): one forward for images and volumes.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the token grid (as many axes as S),
N tokens of a grid. A sequence of tokens is (B, 1 + N, C): the class token comes first.
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
)
from unimiss_core.model_config import MiTSize
from unimiss_core.precision import Linear
from unimiss_core.scan import Rank

REDUCTIONS = (6, 4, 2, 1)
"""Spatial reduction of keys and values, by encoder stage; the decoder goes back through these and through the heads."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Sizes):
    """The numbers in which the sizes of MiT and its head differ."""

    reductions: ClassVar = REDUCTIONS
    stem: int
    widths: tuple[int, ...]
    """Channels of the four encoder stages; the decoder goes back through the first three."""

    @property
    def width(self) -> int:
        """Features of one scan: the class token's width after the decoder."""
        return self.widths[0]


_PUBLISHED_WIDTHS = (48, 128, 256, 512)

ARCHITECTURES: dict[MiTSize, Architecture] = {
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


class MiT(TokenNetwork):
    """Encoder and decoder with switchable patch embedding; the input's number of axes picks the path.

    input_sizes: by rank, the input that its position tables are made for. A rank left out has no tensors here, so
    a site without volumes can hold the model without its 3D part; shared and 2D tensors keep their names.
    channels: C of scans that are several images or volumes; None: each is one.
    The released code asks for stochastic depth of 0.1 and drops it in silence; there is none here.
    """

    architecture: Architecture

    def __init__(
        self, architecture: Architecture, input_sizes: dict[Rank, tuple[int, ...]], channels: int | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.channels = channels
        self.ranks = tuple(sorted(input_sizes))
        grids = {rank: token_grids(size) for rank, size in input_sizes.items()}
        self.encoder = Encoder(architecture, grids, channels)
        self.decoder = Decoder(architecture, grids)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> class token (B, width), normalised. The same as `features(x).class_token`, for less work.

        C is 3 or 1 for images, 1 for volumes, or what `channels` says. Raises ValueError: a rank, channels or a size
        that do not fit.
        """
        check_scans(x, self.ranks, self.channels)
        class_token: Tensor = self.decoder(*self.encoder(x), class_only=True)[0]
        return class_token

    def features(self, x: Tensor) -> Features:
        """x (B, C, *S) -> class token and every feature map, for segmentation and reconstruction. Errors as forward."""
        check_scans(x, self.ranks, self.channels)
        stem_map = self.encoder.stem(x)
        class_token, maps = self.encoder.through(stem_map)
        class_token, decoder_map = self.decoder(class_token, maps)
        return Features(class_token, stem_map, maps, decoder_map)

    @property
    def map_width(self) -> int:
        """Channels of the decoder's map."""
        return self.architecture.width

    @property
    def cells(self) -> Mapping[Rank, tuple[int, ...]]:
        """By rank, the voxels that a cell of the decoder's map stands for along each axis: stem and first stage have
        shrunk them to it."""
        return {rank: tuple(2 * stride for stride in STEM_STRIDE[rank]) for rank in self.ranks}

    @property
    def of_maps_alone(self) -> tuple[nn.Module, ...]:
        """What only `features` runs: the class token has been through everything."""
        return ()

    @property
    def fine(self) -> tuple[nn.Module, ...]:
        """What works on the fine grids, where most of a forward pass's memory is kept."""
        return self.encoder.stem, *self.encoder.stages[:2], *self.decoder.stages[-2:]

    def forward_features(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> normalised tokens (B, 1 + N, width), the class token first, then the decoder's map cell by
        cell. With `forward_head` the two halves that timm's models have; errors as forward."""
        found = self.features(x)
        return torch.cat([found.class_token[:, None], found.decoder_map.flatten(2).mT], dim=1)


class Encoder(StagedEncoder):
    """Stem and four stages, each halving the grid."""

    def __init__(
        self, architecture: Architecture, grids: dict[Rank, list[tuple[int, ...]]], channels: int | None = None
    ) -> None:
        super().__init__()
        widths = (architecture.stem, *architecture.widths)
        self.stem = Switched(
            lambda rank: ConvBlock(rank, channels or CHANNELS[rank], widths[0], 7, STEM_STRIDE[rank]), grids
        )
        self.class_token = nn.Parameter(torch.empty(1, widths[1]))
        self.stages = nn.ModuleList(
            _encoder_stage(i, widths[i], widths[i + 1], depth, {rank: grid[i] for rank, grid in grids.items()})
            for i, depth in enumerate(architecture.encoder_depths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, C, *S) -> class token and maps, as `through` gives them."""
        return self.through(self.stem(x))


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


def token_grids(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Input size S -> the grids of the four encoder stages, finest first; the stem halves H and W, a stage all axes."""
    rank: Rank = 2 if len(size) == 2 else 3
    grid = tuple(math.ceil(n / stride) for n, stride in zip(size, STEM_STRIDE[rank], strict=True))
    grids = []
    for _ in REDUCTIONS:
        grid = tuple(math.ceil(n / 2) for n in grid)
        grids.append(grid)
    return grids


def _encoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> Stage:
    return Stage(
        embed=Switched(lambda rank: ConvBlock(rank, before, width, 3, 2), grids),
        class_token=Linear(before, width) if i > 0 else nn.Identity(),
        position=Switched(lambda rank: PositionTable(grids[rank], width), grids),
        blocks=[Block(width, HEADS[i], REDUCTIONS[i], qkv_bias=True, norm_eps=1e-6, ranks=grids) for _ in range(depth)],
    )


def _decoder_stage(i: int, before: int, width: int, depth: int, grids: dict[Rank, tuple[int, ...]]) -> Stage:
    return Stage(
        embed=Switched(lambda rank: enlarging(rank, before, width, (2,) * rank), grids),
        class_token=Linear(before, width),
        position=Switched(lambda rank: PositionTable(grids[rank], width), grids),
        blocks=[
            Block(width, HEADS[i + 1], REDUCTIONS[i], qkv_bias=False, norm_eps=1e-5, ranks=grids) for _ in range(depth)
        ],
    )
