"""A GPU's steps recorded as CUDA graphs: one launch in place of some ten thousand, for which it would wait.

What a step computes hangs on its views, on weights and on the centre alone: nothing inside is drawn, read back or
decided by values. So what was launched once, for views of a shape, is what is launched again for the next views of
that shape, on the same memory: views are copied to where the graph reads them, weights and centre are moved in place,
gradients and loss stand where they stood before. `docs/performance.md` has what it brings.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from unimiss_core.scan import Rank

T = TypeVar("T")


class RecordingError(Exception):
    """A step could not be recorded; nothing but gradients has changed."""


@dataclass(frozen=True)
class _Recorded(Generic[T]):
    """views: where the graph reads them. gradients: by parameter, where it writes them."""

    key: Hashable
    graph: torch.cuda.CUDAGraph
    views: Tensor
    found: T
    gradients: Sequence[tuple[nn.Parameter, Tensor]]


class StepGraphs(Generic[T]):
    """What `gather` does, recorded the second time that it would do the same thing, by rank.

    gather: from views and its other arguments, gives parameters their gradients and returns what else was found, all of
    it without graph; it may read nothing back from the GPU.
    trained: the parameters that it may give one. They, and all else that it reads, must be changed in place.
    read: those of the tensors it reads that are not always: where they are others than before it is recorded anew.

    What a replay returned is overwritten by the next one, of either rank, for both use the same memory.
    """

    def __init__(
        self,
        gather: Callable[[Tensor, Rank, float], T],
        trained: Sequence[nn.Parameter],
        read: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._gather = gather
        self._trained = trained
        self._read = read
        self._met: dict[Rank, Hashable] = {}
        self._recorded: dict[Rank, _Recorded[T]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def hold_memory(self) -> bool:
        """Whether a graph keeps the memory of its activations."""
        return bool(self._recorded)

    def __call__(self, views: Tensor, rank: Rank, share: float, *circumstances: Hashable) -> T:
        """`gather(views, rank, share)`. circumstances: what else decides about what it launches.

        Raises RecordingError, and whatever `gather` raises where it is not recorded.
        """
        places = tuple(tensor.data_ptr() for tensor in self._read())
        key = (views.shape, views.dtype, share, circumstances, places)
        if self._met.get(rank) != key:  # the first time also loads kernels, which no recording may do
            self._met[rank] = key
            return self._gather(views, rank, share)
        recorded = self._recorded.get(rank)
        if recorded is None or recorded.key != key:
            recorded = self._record(key, views, rank, share)
        recorded.views.copy_(views, non_blocking=True)
        recorded.graph.replay()
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        return recorded.found

    def _record(self, key: Hashable, views: Tensor, rank: Rank, share: float) -> _Recorded[T]:
        """Recorded and kept, in place of an older one; nothing has been computed then."""
        self._recorded.pop(rank, None)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            place = views.clone()
            # Other threads, which read scans or watch over NCCL, go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = self._gather(place, rank, share)
        except Exception as error:
            torch.cuda.set_stream(stream)  # torch leaves its own current where a recording fails,
            with suppress(RuntimeError):  # and before 2.12 the memory of it reserved
                torch._C._cuda_endAllocateToPool(views.device.index, self._pool)
            raise RecordingError(f"{type(error).__name__}: {error}".split("\n")[0]) from None
        gradients = [(parameter, parameter.grad) for parameter in self._trained if parameter.grad is not None]
        self._recorded[rank] = recorded = _Recorded(key, graph, place, found, gradients)
        return recorded
