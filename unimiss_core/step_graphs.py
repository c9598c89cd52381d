"""A GPU's steps recorded as CUDA graphs: one launch in place of some ten thousand, for which it would wait.

What a step computes hangs on its views, on weights and on the centre alone: nothing inside is drawn, read back or
decided by values. So what was launched once, for views of a shape, is what is launched again for the next views of
that shape, on the same memory: views are copied to where the graph reads them, weights and centre are moved in place,
gradients and loss stand where they stood before. `docs/performance.md` has what it brings.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from unimiss_core.scan import Rank

T = TypeVar("T")
Gather = Callable[[Tensor, Rank, float], T]


@dataclass(frozen=True)
class _Recorded(Generic[T]):
    """views: where the graph reads them. gradients: by parameter, where it writes them."""

    key: Hashable
    graph: torch.cuda.CUDAGraph
    views: Tensor
    found: T
    gradients: Sequence[tuple[nn.Parameter, Tensor]]


class StepGraphs(Generic[T]):
    """What `gather` does, by rank recorded the second time in a row that it is to do the same.

    gather: of views, their rank and their share of a batch, gives parameters their gradients and returns what else was
        found, all of it without graph. It may read nothing back from the GPU.
    launch: the same as it is done without recording, with whatever help it then has.
    parameters: those that may be given a gradient. They, and all else that `gather` reads, are changed in place.
    circumstances: what else decides what it does, and where that lies which is not always changed in place.
    tell: hears in a sentence why there is no recording any more.
    on: whether there is any to begin with.

    What a replay returned is overwritten by the next one, of either rank, for both use the same memory.
    """

    def __init__(
        self,
        gather: Gather[T],
        *,
        launch: Gather[T],
        parameters: Sequence[nn.Parameter],
        circumstances: Callable[[Rank], Hashable],
        tell: Callable[[str], None],
        on: bool,
    ) -> None:
        self._gather = gather
        self._launch = launch
        self._parameters = parameters
        self._circumstances = circumstances
        self._tell = tell
        self.on = on
        self._met: dict[Rank, Hashable] = {}
        self._recorded: dict[Rank, _Recorded[T]] = {}
        self._pool: Any = None

    def __call__(self, views: Tensor, rank: Rank, share: float) -> T:
        """`gather(views, rank, share)`. Raises whatever `launch` does."""
        key = (views.shape, views.dtype, share, self._circumstances(rank))
        if self.on and self._met.get(rank) == key and (recorded := self._of(key, views, rank, share)):
            recorded.views.copy_(views, non_blocking=True)
            recorded.graph.replay()
            for parameter, gradient in recorded.gradients:
                parameter.grad = gradient
            return recorded.found
        self._met[rank] = key  # a first time also loads kernels, which no recording may do
        try:
            return self._launch(views, rank, share)
        except torch.OutOfMemoryError:
            if not self._recorded:
                raise
        self._give_up("out of memory beside recorded steps: going on without these")
        return self._launch(views, rank, share)

    def _of(self, key: Hashable, views: Tensor, rank: Rank, share: float) -> _Recorded[T] | None:
        """The recording of this key, made where there is none; None where that fails, now and from then on."""
        if (recorded := self._recorded.get(rank)) and recorded.key == key:
            return recorded
        try:
            self._recorded[rank] = recorded = self._record(key, views, rank, share)
            return recorded
        except Exception as error:
            told = f"{type(error).__name__}: {error}".split("\n")[0]
        self._give_up(f"a step could not be recorded, going on without that: {told[:300]}")
        return None

    def _record(self, key: Hashable, views: Tensor, rank: Rank, share: float) -> _Recorded[T]:
        """Nothing is computed. Raises whatever comes; what torch then leaves as it was within is put right here."""
        self._recorded.pop(rank, None)
        pool = self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream, place = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), views.clone()
        try:
            # Other threads, which read scans or watch over NCCL, go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                found = self._gather(place, rank, share)
        except Exception:
            torch.cuda.set_stream(stream)  # its own is current still,
            with suppress(RuntimeError):  # and before torch 2.12 all that is allocated goes to the recording's memory
                torch._C._cuda_endAllocateToPool(views.device.index, pool)
            raise
        gradients = [(each, each.grad) for each in self._parameters if each.grad is not None]
        return _Recorded(key, graph, place, found, gradients)

    def _give_up(self, why: str) -> None:
        """For good, with all memory of it."""
        self.on = False
        self._recorded.clear()
        for parameter in self._parameters:
            parameter.grad = None
        torch.cuda.empty_cache()
        self._tell(why)
