"""Which network is trained: its sizes, which everything that holds its weights must state."""

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from unimiss_core.config import Config
from unimiss_core.scan import SMALLEST, Rank


def _large_enough(size: tuple[int, ...]) -> tuple[int, ...]:
    least = SMALLEST[2 if len(size) == 2 else 3]
    if any(have < need for have, need in zip(size, least, strict=True)):
        raise ValueError(f"{list(size)} is too small for the network; every axis needs at least {list(least)}")
    return size


Axis = Annotated[int, Field(gt=0, le=4096)]
ImageSize = Annotated[tuple[Axis, Axis], AfterValidator(_large_enough)]
"""(H, W) that the network takes."""
VolumeSize = Annotated[tuple[Axis, Axis, Axis], AfterValidator(_large_enough)]
"""(D, H, W) that the network takes."""


MiTSize = Literal["nano", "tiny", "small"]
PlusSize = Literal["plus_nano", "plus"]
AnySize = Literal[MiTSize, PlusSize]


class ModelConfig(Config):
    """Which network is trained; see `unimiss_core.backbone` for the architectures."""

    size: AnySize = "nano"
    """nano, tiny and small are MiT, the network of UniMiSS; plus_nano and plus are MiTplus, that of UniMiSS+. The nanos
    are for laptops and tests, the others are as published."""
    image_size: ImageSize = (64, 64)
    """(H, W) that the 2D position tables are made for; published: (224, 224), of plus (96, 96)."""
    volume_size: VolumeSize = (16, 64, 64)
    """(D, H, W) that the 3D position tables are made for; published: (16, 96, 96)."""
    prototypes: Annotated[int, Field(ge=2, le=2**20)] = 512
    """Rows of the last layer; 65,536 as published, 512-1,024 for small archives."""
    reconstruction: Annotated[bool, Field(exclude_if=lambda on: not on)] = False
    """Whether the network can draw its input again, as the objective `unimiss_plus` asks for. Not written out where it
    is off, so that studies and checkpoints older than this setting keep their digests."""

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        """S that the position tables of this rank are made for."""
        return self.image_size if rank == 2 else self.volume_size

    @property
    def is_plus(self) -> bool:
        return self.size in get_args(PlusSize)

    @property
    def classifies_by_decoder(self) -> bool:
        """Whether the class token has been through the decoder."""
        return not self.is_plus

    @property
    def network(self) -> str:
        """As its authors call it."""
        return "MiTplus" if self.is_plus else "MiT"
