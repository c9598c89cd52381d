"""The one place that knows which network a model's size stands for; all else takes any backbone.

A backbone, of UniMiSS or of UniMiSS+, gives of scans (B, C, *S) one class token each (`forward`), and that with all
its maps (`features`). Its parameters say what they are of: `encoder.*`, `decoder.*`, and below them `2d` or `3d` where
they are of one rank.
"""

from collections.abc import Collection

from unimiss_core.mit_plus import PLUS_ARCHITECTURES, MiTPlus, PlusArchitecture
from unimiss_core.model import ARCHITECTURES, Architecture, MiT
from unimiss_core.model_config import ModelConfig
from unimiss_core.scan import RANKS, Rank

Backbone = MiT | MiTPlus


def architecture_of(model: ModelConfig) -> Architecture | PlusArchitecture:
    """The numbers that the model's size stands for."""
    if model.size == "plus" or model.size == "plus_nano":
        return PLUS_ARCHITECTURES[model.size]
    return ARCHITECTURES[model.size]


def backbone_of(model: ModelConfig, ranks: Collection[Rank] = RANKS, *, channels: int | None = None) -> Backbone:
    """The backbone of this model, with the tensors of these ranks, on the device that torch makes tensors on.

    channels: C of scans that are several images or volumes; None: each is one, as in pretraining.
    """
    needed = {rank: model.size_of(rank) for rank in sorted(ranks)}
    architecture = architecture_of(model)
    if isinstance(architecture, PlusArchitecture):
        return MiTPlus(architecture, needed, channels)
    return MiT(architecture, needed, channels)


def scan_kernel(model: ModelConfig, rank: Rank) -> str:
    """Below the backbone, the name of what convolves the scan itself, (O, C, *k): the one tensor that hangs on how many
    channels a scan has."""
    first = "at_full" if isinstance(architecture_of(model), PlusArchitecture) else "stem"
    return f"encoder.{first}.{rank}d.conv.weight"
