"""From the decoder's map back to pixels: what a network must keep of a scan to draw it again.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the decoder's grid.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unimiss_core.convolution import CONV_TRANSPOSED
from unimiss_core.head import at_least_float32
from unimiss_core.layers import CHANNELS, Switched
from unimiss_core.scan import Rank


class Reconstruction(nn.Module):
    """Each vector of the decoder's map becomes the patch that it stands for, by one linear layer and a sigmoid.

    After MiTplus, whose map has a vector for each voxel, it is the published 1x1 convolution. The decoder there is
    handed the encoder's maps at full resolution, out of which an input can be copied; after MiT all that is drawn has
    been through the tokens.
    """

    def __init__(self, width: int, cells: Mapping[Rank, tuple[int, ...]]) -> None:
        """width: channels of the map. cells: by rank, the voxels that one of its vectors stands for along each axis."""
        super().__init__()
        self.patch = Switched(lambda rank: _to_patches(rank, width, cells[rank]), cells)

    def forward(self, decoder_map: Tensor, size: torch.Size) -> Tensor:
        """decoder_map (B, width, *G) of an input of `size` -> (B, C, *size) in (0, 1); an image has three channels."""
        pixels = self.patch(decoder_map)[(..., *(slice(n) for n in size))]
        return torch.sigmoid(at_least_float32(pixels))


def _to_patches(rank: Rank, width: int, cell: tuple[int, ...]) -> nn.Module:
    layer: Any = CONV_TRANSPOSED[rank]
    made: nn.Module = layer(width, CHANNELS[rank], kernel_size=cell, stride=cell)
    return made
