"""A GPU's steps recorded as CUDA graphs: one launch in place of some ten thousand, for which it would wait.

What a step computes hangs on its views, on weights and on the centre alone: nothing inside is drawn, read back or
decided by values. So what was launched once, for views of a shape, is what is launched again for the next views of
that shape, on the same memory: views are copied to where the graph reads them, weights and centre are moved in place,
gradients and loss stand where they stood before. `docs/performance.md` has what it brings.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from unimiss_core.errors import first_line
from unimiss_core.scan import Rank

T = TypeVar("T")
Gather = Callable[[Tensor], T]

_one_at_a_time = Lock()
"""A process has one recording at a time, whichever thread makes it."""


@dataclass(frozen=True)
class _Recorded(Generic[T]):
    """views: where the graph reads them. gradients: by parameter, where it writes them."""

    key: Hashable
    graph: torch.cuda.CUDAGraph
    views: Tensor
    found: T
    gradients: Sequence[tuple[nn.Parameter, Tensor]]


class StepGraphs(Generic[T]):
    """Of each rank the steps so far, recorded the second time in a row that the same is to be done.

    parameters: those that may be given a gradient. They, and all else that is read, are changed in place.
    on: whether there is any recording; it ends for good where one fails.

    What a replay returned is overwritten by the next one, of either rank, for both use the same memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, on: bool) -> None:
        self._parameters = parameters
        self.on = on
        self._had_to_go = False
        self._met: dict[Rank, Hashable] = {}
        self._recorded: dict[Rank, _Recorded[T]] = {}
        self._place: tuple[Any, Any] = None, None

    @property
    def hold_memory(self) -> bool:
        """Whether there are recorded steps."""
        return bool(self._recorded)

    def take(
        self,
        rank: Rank,
        gather: Gather[T],
        views: Tensor,
        *,
        launch: Gather[T],
        circumstances: Hashable,
        tell: Callable[[str], None],
    ) -> T:
        """`gather(views)`, which gives parameters their gradients and returns what else was found, all of it without
        graph; it may read nothing back from the GPU.

        launch: the same as it is done without recording, with whatever help it then has. circumstances: what else
        decides what is done, and where that lies which is not always changed in place. tell: hears in a sentence why
        there is no recording any more. Raises whatever `launch` does.
        """
        key = (views.shape, views.dtype, circumstances)
        if self.on and self._met.get(rank) == key and (recorded := self._of(rank, key, gather, views, tell)):
            recorded.views.copy_(views, non_blocking=True)
            recorded.graph.replay()
            for parameter, gradient in recorded.gradients:
                parameter.grad = gradient
            return recorded.found
        found = launch(views)
        self._met[rank] = key  # a first time also loads kernels, which no recording may do
        return found

    def make_room(self, tell: Callable[[str], None]) -> bool:
        """Memory has run out: recorded steps go, and where that happens again, for good. False where there are none."""
        if not self.hold_memory:
            return False
        if self._had_to_go:
            self._give_up("out of memory beside recorded steps: going on without these", tell)
        else:
            self._had_to_go = True
            self.release()
        return True

    def release(self) -> None:
        """Give the device's memory back, and gradients with it. The next step of a rank is recorded anew."""
        self._recorded.clear()
        for parameter in self._parameters:
            parameter.grad = None
        torch.cuda.empty_cache()

    def _of(
        self, rank: Rank, key: Hashable, gather: Gather[T], views: Tensor, tell: Callable[[str], None]
    ) -> _Recorded[T] | None:
        """The recording of this key, made where there is none; None where that fails."""
        if (recorded := self._recorded.get(rank)) and recorded.key == key:
            return recorded
        self._recorded.pop(rank, None)
        try:
            with _one_at_a_time, torch.cuda.device(views.device):
                self._recorded[rank] = recorded = self._record(key, gather, views)
            return recorded
        except Exception as error:
            if not isinstance(error.__context__ or error, Exception):  # torch's own came over somebody's Ctrl-C
                raise
            told = f"{type(error).__name__}: {first_line(error)}"
        self._give_up(f"a step could not be recorded, going on without that: {told}", tell)
        return None

    def _record(self, key: Hashable, gather: Gather[T], views: Tensor) -> _Recorded[T]:
        """Nothing is computed. Raises whatever comes; what torch then leaves as it was within is put right here."""
        if not self._recorded:  # or there would be memory that no recording holds, which torch refuses to use again
            # Memory is of a stream; torch's own stream for this is of the device on which the process recorded first.
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        pool, stream = self._place
        graph, before, place = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), views.clone()
        # Other threads, which draw views or watch over NCCL, go on using the device meanwhile.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "The CUDA Graph is empty")
                with recording:
                    found = gather(place)
        except BaseException:
            torch.cuda.set_stream(before)  # that of the recording is current still,
            with suppress(RuntimeError):  # and before torch 2.12 its memory is where all is allocated, for ever
                torch._C._cuda_endAllocateToPool(views.device.index, pool)
                torch._C._cuda_releasePool(views.device.index, pool)
            raise
        gradients = [(each, each.grad) for each in self._parameters if each.grad is not None]
        return _Recorded(key, graph, place, found, gradients)

    def _give_up(self, why: str, tell: Callable[[str], None]) -> None:
        self.on = False
        self.release()
        tell(why)
