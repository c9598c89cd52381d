"""From the decoder's map back to pixels: what a network must keep of a scan to draw it again.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the decoder's grid.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from unimiss_core.convolution import CONV_TRANSPOSED
from unimiss_core.head import at_least_float32
from unimiss_core.model import CHANNELS, STEM_STRIDE, Switched
from unimiss_core.scan import RANKS, Rank

_PATCH: dict[Rank, tuple[int, ...]] = {rank: tuple(2 * stride for stride in STEM_STRIDE[rank]) for rank in RANKS}
"""Pixels that a cell of the decoder's map stands for, along each axis: stem and first stage have shrunk them to it."""


class Reconstruction(nn.Module):
    """Each vector of the decoder's map becomes the patch that it stands for, by one linear layer and a sigmoid.

    The released UniMiSS+ goes up in two convolutional stages that are handed the encoder's maps at full resolution,
    out of which an input can be copied; here all that is drawn has been through the tokens.
    """

    def __init__(self, width: int, ranks: Collection[Rank]) -> None:
        super().__init__()
        self.patch = Switched(lambda rank: _to_patches(rank, width), ranks)

    def forward(self, decoder_map: Tensor, size: torch.Size) -> Tensor:
        """decoder_map (B, width, *G) of an input of `size` -> (B, C, *size) in (0, 1); an image has three channels."""
        pixels = self.patch(decoder_map)[(..., *(slice(n) for n in size))]
        return torch.sigmoid(at_least_float32(pixels))


def _to_patches(rank: Rank, width: int) -> nn.Module:
    layer: Any = CONV_TRANSPOSED[rank]
    made: nn.Module = layer(width, CHANNELS[rank], kernel_size=_PATCH[rank], stride=_PATCH[rank])
    return made
