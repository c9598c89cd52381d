"""Tensors <-> a few long byte strings, one per parameter group.

Flower moves each array as its own HTTP request, so that 300 small tensors take four times as long as one large
array of the same bytes; and its arrays know no bf16. Both ends know the model, hence the order, names and shapes:
only values travel, in one of `unimiss_core.formats`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unimiss_core.errors import WireError
from unimiss_core.formats import FORMATS
from unimiss_core.groups import GROUPS, Group, group_of


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


Payloads = Mapping[Group, bytes]
"""Tensors as they travel."""


def layout_of(network: nn.Module) -> dict[Group, tuple[TensorSpec, ...]]:
    """The layout of a network's parameters: sorted by name within each group."""
    specs: dict[Group, list[TensorSpec]] = {group: [] for group in GROUPS}
    for name, parameter in sorted(network.named_parameters()):
        specs[group_of(name)].append(TensorSpec(name, tuple(parameter.shape)))
    return {group: tuple(found) for group, found in specs.items()}


def num_bytes(layout: Layout, dtype: str) -> int:
    """Bytes of the tensors of `layout` on the wire, exactly."""
    return sum(FORMATS[dtype].num_bytes(_size(specs)) for specs in layout.values())


def pack(tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec], dtype: str) -> bytes:
    """The values of `specs` end to end, as `dtype`."""
    return FORMATS[dtype].encode(_flat(tensors, specs))


def unpack(payload: bytes, specs: Sequence[TensorSpec], dtype: str) -> dict[str, Tensor]:
    """The inverse of `pack`, in float32. Raises WireError: `wrong_size` where the bytes do not fit the specs, or what
    the format says of values that no `pack` writes."""
    return split(FORMATS[dtype].decode(payload, _checked_size(payload, specs, dtype)), specs)


def view(payload: bytes, specs: Sequence[TensorSpec], dtype: str) -> dict[str, Tensor]:
    """As `unpack`, without a copy where the format needs none: of any float type, and to be read only."""
    return split(FORMATS[dtype].view(payload, _checked_size(payload, specs, dtype)), specs)


def split(flat: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The tensors of `specs`, which lie end to end in `flat` and go on sharing its memory."""
    parts = flat.split([spec.size for spec in specs])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(specs, parts, strict=True)}


def released(tensors: Mapping[str, Tensor], layout: Layout, dtype: str) -> dict[str, Tensor]:
    """The tensors of `layout` as a receiver sees them, in float32. Raises WireError as `unpack` does."""
    seen: dict[str, Tensor] = {}
    for specs in layout.values():
        seen |= split(FORMATS[dtype].rounded_(torch.cat(_flat(tensors, specs)).float()), specs)
    return seen


def carried_over(
    update: Mapping[str, Tensor], lost: Mapping[str, Tensor], layout: Layout, dtype: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what to send for `update`, what rounding it will lose): error feedback for the tensors of `layout`.

    v = update + lost; the receiver sees Q(v), and v - Q(v) is lost until it is given to the next call. So the sum of
    all that was received plus what is lost now is the sum of all updates: no error adds up over rounds (Seide et al.,
    2014; Karimireddy et al., arXiv:1901.09847). lost: by name; a tensor that is not there has lost nothing. Raises
    WireError `not_finite` where a value is not a finite number: such a loss would never end.
    """
    names = [spec.name for specs in layout.values() for spec in specs]
    sent = {name: update[name] + lost[name] if name in lost else update[name] for name in names}
    seen = released(sent, layout, dtype)
    return sent, {name: tensor - seen[name] for name, tensor in sent.items()}


def _flat(tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Each of `specs` as a vector, in its own memory."""
    return [tensors[spec.name].detach().reshape(-1) for spec in specs]


def _checked_size(payload: bytes, specs: Sequence[TensorSpec], dtype: str) -> int:
    """Values of `specs`. Raises WireError `wrong_size` where the payload is of another length."""
    expected = FORMATS[dtype].num_bytes(size := _size(specs))
    if len(payload) != expected:
        raise WireError("wrong_size", f"a parameter group came with {len(payload)} bytes, expected {expected}")
    return size


def _size(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.size for spec in specs)
