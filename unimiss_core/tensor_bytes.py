"""Tensors with their metadata as one block of bytes, as safetensors has them."""

from collections.abc import Mapping

from safetensors.torch import load
from torch import Tensor

from unimiss_core.json_text import object_in


def load_whole(payload: bytes) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    """(metadata, tensors) of a safetensors file in memory. Raises SafetensorError, ValueError, KeyError."""
    tensors = load(payload)  # checks the header, too
    return object_in(payload[8 : 8 + int.from_bytes(payload[:8], "little")])["__metadata__"], tensors
