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

from unimiss_core.device import is_out_of_memory
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
            self._go_for_now()
        return True

    def release(self) -> None:
        """Give the device's memory back, and gradients with it. The next step of a rank is recorded anew."""
        for rank in tuple(self._recorded):
            self._drop(rank)
        for parameter in self._parameters:
            parameter.grad = None
        torch.cuda.empty_cache()

    def _drop(self, rank: Rank) -> None:
        self._recorded.pop(rank).graph.reset()  # or its memory would be used as long as anybody holds the graph

    def _go_for_now(self) -> None:
        """Recorded steps go, and the next step of each rank is launched: one that was recorded at once would need as
        much memory again."""
        self._had_to_go = True
        self._met.clear()
        self.release()

    def _of(
        self, rank: Rank, key: Hashable, gather: Gather[T], views: Tensor, tell: Callable[[str], None]
    ) -> _Recorded[T] | None:
        """The recording of this key, made where there is none; None where that fails."""
        if rank in self._recorded:
            if self._recorded[rank].key == key:
                return self._recorded[rank]
            self._drop(rank)
        others = bool(self._recorded)
        try:
            with _one_at_a_time, torch.cuda.device(views.device):
                self._recorded[rank] = self._record(key, gather, views)
            return self._recorded[rank]
        except Exception as error:
            cause = error.__context__ or error  # torch's own comes over what made the recording end
            if not isinstance(cause, Exception):
                raise
            told = f"{type(cause).__name__}: {first_line(cause)}"
            beside_others = others and not self._had_to_go and is_out_of_memory(cause)
        del cause  # which holds on to what was made
        if beside_others:
            self._go_for_now()
        else:
            self._give_up(f"a step could not be recorded, going on without that: {told}", tell)
        self._let_go_of_what_failed(views.device)
        return None

    def _record(self, key: Hashable, gather: Gather[T], views: Tensor) -> _Recorded[T]:
        """Nothing is computed. Raises whatever comes; what torch then leaves as it was within is put right here."""
        if not self._recorded:  # or there would be memory that no recording holds, which torch refuses to use again
            # Memory is of a stream; torch's own stream for this is of the device on which the process recorded first.
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        # What records on this stream must use this pool: with a graph goes what cuBLAS holds in it for the stream.
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
            graph.reset()
            raise
        gradients = [(each, each.grad) for each in self._parameters if each.grad is not None]
        return _Recorded(key, graph, place, found, gradients)

    def _let_go_of_what_failed(self, device: torch.device) -> None:
        """Give back the memory of a recording that came to no end, which a torch without its change of July 2026
        (#190348) counts as used for ever. Nothing else may use it by now.

        Where nothing is counted, what is free of it is gone already, and to count down once more would break torch.
        """
        pool, _ = self._place
        segments = (each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) == tuple(pool))
        if any(segment["active_size"] == 0 for segment in segments):
            torch._C._cuda_releasePool(device.index, pool)
            torch.cuda.empty_cache()

    def _give_up(self, why: str, tell: Callable[[str], None]) -> None:
        self.on = False
        self.release()
        tell(why)
