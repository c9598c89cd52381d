"""How large an update is, found in one pass over its values for all who ask: admission, the rules, and the sums."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from server.loops import extent


@dataclass(frozen=True)
class Extent:
    """Of one tensor. squares: the sum of its values squared, in float64; nan or inf where a value is. largest: the
    largest |value|, 0 where there is none; of any content where a value is not finite."""

    squares: float
    largest: float


class Measured(Mapping[str, Tensor]):
    """Tensors and their extents, by name. Its tensors must not change."""

    def __init__(self, tensors: Mapping[str, Tensor], extents: Mapping[str, Extent]) -> None:
        self._tensors = tensors
        self.extents = extents

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def largest(self, name: str) -> float:
        """The largest |value| of a tensor."""
        return self.extents[name].largest

    def norm(self) -> float:
        """L2 norm of all values together, summed in float64; nan or inf where a value is."""
        return math.sqrt(sum(self.extents[name].squares for name in self))


def measured(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Measured:
    """Tensors of any float type, by name: those of `names`, or all; what is measured already is not measured again."""
    held = tensors if names is None else {name: tensors[name] for name in names}
    if isinstance(tensors, Measured):
        return Measured(held, tensors.extents)
    return Measured(held, {name: Extent(*extent(tensor)) for name, tensor in held.items()})
