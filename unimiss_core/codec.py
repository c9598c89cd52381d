"""Tensors <-> a few long byte strings, one per parameter group.

Flower moves each array as its own HTTP request, so that 300 small tensors take four times as long as one large
array of the same bytes; and its arrays know no bf16. Both ends know the model, hence the order, names and shapes:
only values travel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unimiss_core.errors import WireError
from unimiss_core.groups import GROUPS, Group, group_of

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Names on the wire -> what values are rounded to."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's name and shape, as the model states them."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Layout = Mapping[Group, tuple[TensorSpec, ...]]
"""What travels for each parameter group, in the order it travels."""


def layout_of(network: nn.Module) -> dict[Group, tuple[TensorSpec, ...]]:
    """The layout of a network's parameters: sorted by name within each group."""
    specs: dict[Group, list[TensorSpec]] = {group: [] for group in GROUPS}
    for name, parameter in sorted(network.named_parameters()):
        specs[group_of(name)].append(TensorSpec(name, tuple(parameter.shape)))
    return {group: tuple(found) for group, found in specs.items()}


def pack(tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec], dtype: str) -> bytes:
    """The values of `specs` end to end, rounded to `dtype` (little-endian)."""
    flat = torch.cat([tensors[spec.name].detach().reshape(-1) for spec in specs])
    return flat.to(DTYPES[dtype]).cpu().view(torch.uint8).numpy().tobytes()


def unpack(payload: bytes, specs: Sequence[TensorSpec], dtype: str) -> dict[str, Tensor]:
    """The inverse of `pack`, in float32. Raises WireError `wrong_size` where the bytes do not fit the specs."""
    wire_dtype = DTYPES[dtype]
    expected = sum(spec.size for spec in specs) * wire_dtype.itemsize
    if len(payload) != expected:
        raise WireError("wrong_size", f"a parameter group came with {len(payload)} bytes, expected {expected}")
    return split(_widened(payload, wire_dtype), specs)


def split(flat: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The tensors of `specs`, which lie end to end in `flat` and go on sharing its memory."""
    parts = flat.split([spec.size for spec in specs])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(specs, parts, strict=True)}


def _widened(payload: bytes, dtype: torch.dtype) -> Tensor:
    """The payload's values in float32. NumPy reads bytes where they are and asks for large pages: a fifth of the time
    that torch takes for a bytearray's copy and its conversion."""
    if dtype == torch.float32:
        return torch.from_numpy(np.frombuffer(payload, "<f4").copy())
    bits = np.left_shift(np.frombuffer(payload, "<u2"), 16, dtype=np.uint32)  # bfloat16 is float32's upper half
    return torch.from_numpy(bits.view(np.float32))


def released(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """`tensors` as a receiver sees them: rounded to the wire's dtype, in float32."""
    return {name: tensor.detach().to(DTYPES[dtype]).float() for name, tensor in tensors.items()}
