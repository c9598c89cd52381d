"""Modules without values: what they are made of is known at once, and nothing is drawn that would be thrown away."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.constant_})
"""With what torch's own modules fill themselves when they are made."""


class _Undrawn(TorchFunctionMode):
    """On the meta device torch still works out, for each tensor, what it would draw: half of the time of a network."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        filled = args[0] if args else named.get("tensor")
        if func in _DRAWS and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **named)


@contextmanager
def unvalued() -> Iterator[None]:
    """Modules that are made inside are on torch's meta device, and stay undrawn."""
    with torch.device("meta"), _Undrawn():
        yield
