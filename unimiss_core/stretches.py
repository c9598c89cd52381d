"""Long vectors, a piece at a time.

An operation on a whole model writes fresh memory, which takes the system longer to provide than the processor to fill,
and the next operation reads it from there again. What is made of a stretch stays in the caches.
"""

from collections.abc import Iterator

from torch import Tensor

AT_ONCE = 131_072
"""Values: in float64 they fit into the caches of two cores. Half as many take a tenth longer, for calls begin to count;
twice as many no longer fit."""


def stretches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The values of tensors of one size side by side, AT_ONCE of each: views, where a tensor is contiguous."""
    return zip(*(tensor.reshape(-1).split(AT_ONCE) for tensor in tensors), strict=True)
