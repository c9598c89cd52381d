"""Recorded steps, with a stand-in for CUDA graphs on a CPU: what was recorded is done again, on the same memory.

The stand-in spoils all that was worked out while it recorded, for a GPU works out nothing then.
"""

import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_learner import apart, assert_same, everything, images, plus_study, study, volumes
from unimiss_core import execution
from unimiss_core.errors import NonFiniteLossError
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.objective import Loss


class Graph(TorchDispatchMode):
    """Operations and the memory that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.replays = 0
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = operation(*args, **(kwargs or {}))
        self._done.append((operation, args, kwargs or {}, outcome))
        return outcome

    def spoil(self) -> None:
        for _, args, kwargs, outcome in self._done:
            read = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
            for tensor in tensors(outcome):
                if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in read:
                    tensor.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, before in self._done:
            for place, value in zip(tensors(before), tensors(operation(*args, **kwargs)), strict=True):
                place.copy_(value)


def tensors(*of: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


class Card:
    """What is asked of torch.cuda meanwhile."""

    def __init__(self) -> None:
        self.recorded: list[Graph] = []
        self.entered: list[object] = []
        """Devices that were made current."""
        self.stream = "before"
        self.pools = self.streams = 0
        self.ended: list[tuple[str, object]] = []
        """What torch was told to do with pools that are no more."""
        self.segments: list[dict[str, object]] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.entered.append(device)
        yield

    @contextmanager
    def recording(self, graph: Graph, *, stream: str, **_: object) -> Iterator[None]:
        """As torch's, which leaves its stream current where something is raised."""
        self.stream = stream
        with graph:
            yield
        if not graph._done:
            warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=1)
        self.stream = "before"
        graph.spoil()
        self.recorded.append(graph)

    def new_stream(self) -> str:
        self.streams += 1
        return f"recording {self.streams}"

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def set_stream(self, stream: str) -> None:
        self.stream = stream


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": made.new_stream,
        "current_stream": lambda: made.stream,
        "device": made.device,
        "graph": made.recording,
        "graph_pool_handle": made.pool,
        "memory_snapshot": lambda: made.segments,
        "set_stream": made.set_stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name, stand_in in {
        "_cuda_endAllocateToPool": lambda _, pool: made.ended.append(("left", pool)),
        "_cuda_releasePool": lambda _, pool: made.ended.append(("released", pool)),
    }.items():
        monkeypatch.setattr(torch._C, name, stand_in, raising=False)
    monkeypatch.setattr(Learner, "_keeps_apart", lambda *_: False)  # as on a GPU
    return made


@pytest.fixture
def graphs(card: Card) -> list[Graph]:
    """All that have been recorded."""
    return card.recorded


def pair(objective: str = "unimiss", **settings: Any) -> tuple[Learner, Learner]:
    """One that records, and one that does not."""
    of = plus_study() if objective == "unimiss_plus" else study()
    ours, plain = (apart(Learner(of, ranks={2, 3}, execution=Execution(**settings))) for _ in range(2))
    ours._graphs.on = True
    return ours, plain


def taken(learner: Learner, batches: Sequence[Tensor]) -> list[Any]:
    return [learner.step(scans, step=step) for step, scans in enumerate(batches)]


BATCHES = [images(), images(seed=1), volumes(), volumes(seed=1), images(seed=2), volumes(seed=2), images(seed=3)]


@pytest.mark.parametrize("objective", ["unimiss", "unimiss_plus"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch": {2: 2, 3: 1}}, {"views_in_turn": True}, {"precision": "bf16"}],
    ids=["whole", "in parts", "in turn", "bf16"],
)
def test_recorded_steps_are_the_same_bits(card: Card, objective: str, settings: Mapping[str, Any]) -> None:
    """Of both ranks in turn, with weights, moments, teacher and centre that move in between."""
    ours, plain = pair(objective, **settings)
    assert taken(ours, BATCHES) == taken(plain, BATCHES)
    assert [graph.replays for graph in card.recorded] == [3, 2]
    assert (card.pools, card.streams) == (1, 1)  # whose memory both ranks use
    assert_same(everything(ours), everything(plain))


def test_a_round_begins_without_another_recording(graphs: list[Graph]) -> None:
    """Weights of another round are copied to where the graph reads them."""
    ours, plain = pair()
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
        begun = {name: tensor + 0.01 for name, tensor in learner.student.state_dict().items()}
        learner.start_round(begun, learner.teacher.state_dict() if learner.teacher else {})
        learner.restore(learner.state())
    assert taken(ours, [images(seed=2), images(seed=3)]) == taken(plain, [images(seed=2), images(seed=3)])
    assert sum(graph.replays for graph in graphs) == 2  # and once as written: a restored centre lies elsewhere


def test_another_shape_is_recorded_when_it_comes_twice_in_a_row(graphs: list[Graph]) -> None:
    ours, plain = pair()
    sizes = [3, 3, 2, 3, 2, 2, 2]
    batches = [images(seed=seed, scans=scans) for seed, scans in enumerate(sizes)]
    assert taken(ours, batches) == taken(plain, batches)
    assert [graph.replays for graph in graphs] == [1, 2]


def test_a_batch_that_is_not_finite_changes_nothing_and_the_next_is_replayed(graphs: list[Graph]) -> None:
    ours, plain = pair()
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
        with pytest.raises(NonFiniteLossError):
            learner.step(images(seed=2) * torch.nan, step=2)
    assert ours.step(images(seed=3), step=2) == plain.step(images(seed=3), step=2)
    assert [graph.replays for graph in graphs] == [3]
    assert_same(everything(ours), everything(plain))


def test_another_share_or_part_of_a_batch_is_recorded_anew(graphs: list[Graph]) -> None:
    ours, plain = pair()
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
    for step, (share, part) in enumerate([(0.5, 3), (0.5, 3), (0.5, 2), (0.5, 2)], start=2):
        reports = []
        for learner in (ours, plain):
            learner.micro_batch[2] = part
            reports.append(learner.step(images(seed=step), step=step, share=share))
        assert reports[0] == reports[1]
    assert [graph.replays for graph in graphs] == [1, 1, 1]


def failing_at(call: int, error: BaseException, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's objective raises once, at that call from now."""
    objective, calls = learner.objective, itertools.count(1)

    def failing(*args: Any) -> Loss:
        if next(calls) == call:
            raise error
        return objective(*args)

    monkeypatch.setattr(learner, "objective", failing)


def test_what_cannot_be_recorded_is_told_once_and_computed_as_written(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    failing_at(2, RuntimeError("operation not permitted when stream is capturing\nand a long story"), ours, monkeypatch)
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(any(p.grad is not None for p in parameters)))
    parameters = list(ours.student.parameters())
    assert taken(ours, BATCHES) == taken(plain, BATCHES)
    assert told == [
        "a step could not be recorded, going on without that: RuntimeError: operation not permitted when stream is "
        "capturing"
    ]
    assert card.recorded == []
    assert card.stream == "before"
    assert card.ended == [("left", (0, 1))]
    assert held == [False]


def test_the_memory_of_what_failed_is_counted_down_where_torch_does_not(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told by parts of it that are free and stay. What cuBLAS keeps there is none, nor is another's."""
    for segments, ended in (
        ([((0, 1), 0), ((0, 1), 32)], [("left", (0, 1)), ("released", (0, 1))]),
        ([((0, 2), 32), ((0, 7), 0)], [("left", (0, 2))]),
    ):
        card.segments = [{"segment_pool_id": pool, "active_size": size} for pool, size in segments]
        card.ended.clear()
        ours, _ = pair()
        failing_at(2, RuntimeError("no"), ours, monkeypatch)
        taken(ours, BATCHES[:2])
        assert card.ended == ended


def test_the_cause_is_told_and_not_what_torch_raises_over_it(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = card.recording

    @contextmanager
    def ending_in_an_error_of_its_own(*args: Any, **kwargs: Any) -> Iterator[None]:
        with recording(*args, **kwargs):
            try:
                yield
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 - as torch

    monkeypatch.setattr(torch.cuda, "graph", ending_in_an_error_of_its_own)
    ours, _ = pair()
    told: list[str] = []
    ours._tell = told.append
    failing_at(2, RuntimeError("operation not permitted when stream is capturing"), ours, monkeypatch)
    taken(ours, BATCHES[:2])
    assert told == [
        "a step could not be recorded, going on without that: RuntimeError: operation not permitted when stream is "
        "capturing"
    ]


def test_a_recording_of_nothing_is_none(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a card that is not the current one; its replays would leave one batch's gradients for ever."""
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    monkeypatch.setattr(
        Graph, "__torch_dispatch__", lambda _, operation, __, args=(), kwargs=None: operation(*args, **kwargs or {})
    )
    assert taken(ours, BATCHES[:2]) == taken(plain, BATCHES[:2])
    assert "The CUDA Graph is empty" in told[0]
    assert not ours._graphs.on
    assert card.entered == [images().device]


def test_an_interrupted_recording_stays_interrupted(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though torch raises an error of its own when it ends what was interrupted."""

    @contextmanager
    def recording(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            raise RuntimeError("the capture is invalid")  # noqa: B904 - as torch does

    ours, _ = pair()
    ours.step(images(), step=0)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    failing_at(1, KeyboardInterrupt(), ours, monkeypatch)
    with pytest.raises(RuntimeError, match="invalid"):
        ours.step(images(), step=1)
    assert card.stream == "before"


def test_where_memory_runs_out_beside_recorded_steps_these_go_first_and_come_back(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then is a batch met in parts. The first step of another rank has to fit beside them, later ones share
    their memory. Where it runs out again they go for good."""
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    full = torch.OutOfMemoryError("CUDA out of memory")
    for batches, call in (([images()] * 2, 9), ([volumes()] * 2 + [images()] * 2, 1), ([images(scans=2)] * 2, 1)):
        with monkeypatch.context() as patch:
            failing_at(call, full, ours, patch)
            assert taken(ours, batches) == taken(plain, batches)
    assert [graph.replays for graph in card.recorded] == [1, 1, 1]
    assert (card.pools, card.streams) == (2, 2)
    assert told == ["out of memory beside recorded steps: going on without these"]
    assert ours.micro_batch == {}
    assert not ours._graphs.on


def test_memory_that_runs_out_after_the_gradients_is_made_too(graphs: list[Graph]) -> None:
    ours, plain = pair()
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
    pull, failures = ours._proximal.pull_, [torch.OutOfMemoryError("CUDA out of memory")]

    def tight(*args: Any) -> dict[str, Tensor]:
        if failures:
            raise failures.pop()
        assert [at for at, gradient in enumerate(recorded) if gradient() is not None] == []
        return pull(*args)

    recorded = [weakref.ref(gradient) for _, gradient in ours._graphs._recorded[2].gradients]
    graphs.clear()  # a stand-in keeps what it recorded

    ours._proximal.pull_ = tight  # type: ignore[method-assign]
    assert ours.step(images(seed=2), step=2) == plain.step(images(seed=2), step=2)
    assert ours._graphs.on
    assert graphs == []  # the step was launched


def test_memory_that_is_there_only_without_recorded_steps_is_found(card: Card) -> None:
    """The step that is taken again is launched, for one that was recorded would need as much again."""
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    pull = ours._proximal.pull_

    def tight(*args: Any) -> dict[str, Tensor]:
        if ours._graphs.hold_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pull(*args)

    ours._proximal.pull_ = tight  # type: ignore[method-assign]
    batches = [images(seed=seed) for seed in range(5)]
    assert taken(ours, batches) == taken(plain, batches)
    assert_same(everything(ours), everything(plain))
    assert told == ["out of memory beside recorded steps: going on without these"]
    assert [graph.resets for graph in card.recorded] == [1, 1]


def test_memory_that_runs_out_while_recording_beside_another_rank_ends_it_the_second_time(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
    for _ in range(2):
        assert (ours._graphs.on, told) == (True, [])
        ours._graphs._met.pop(3, None)
        with monkeypatch.context() as patch:
            failing_at(2, torch.OutOfMemoryError("CUDA out of memory"), ours, patch)
            assert taken(ours, [volumes(), volumes(seed=1)]) == taken(plain, [volumes(), volumes(seed=1)])
        assert taken(ours, [images()] * 2) == taken(plain, [images()] * 2)
    assert told == ["a step could not be recorded, going on without that: OutOfMemoryError: CUDA out of memory"]
    assert len(card.recorded) == 2


@pytest.mark.usefixtures("graphs")
def test_memory_that_runs_out_before_anything_is_recorded_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    told: list[str] = []
    ours._tell = told.append
    failing_at(1, torch.OutOfMemoryError("CUDA out of memory"), ours, monkeypatch)
    taken(ours, BATCHES[:2])
    assert told == ["out of memory: 2D batches are met in parts of 1, not 3 scans"]
    assert ours._graphs.on


@pytest.mark.usefixtures("shallow")
def test_where_compilation_fails_steps_are_recorded_all_the_same(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(execution, "COMPILER", broken)
    ours, plain = pair(compile=True)
    plain._set_up_blocks(compiled=False)
    told: list[str] = []
    ours._tell = told.append
    assert taken(ours, BATCHES[:2]) == taken(plain, BATCHES[:2])
    assert len(told) == 1
    assert told[0].startswith("compilation failed, going on without it")
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.usefixtures("graphs")
def test_a_learner_that_is_done_with_holds_no_memory() -> None:
    ours, _ = pair()
    taken(ours, BATCHES[:4])
    gone = weakref.ref(ours)
    gc.collect()
    gc.disable()
    try:
        del ours
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("asked", [Learner.release, lambda learner: learner.fits(2, 1)], ids=["asked", "fits"])
def test_memory_is_given_back_when_asked_for_and_before_it_is_tried(
    graphs: list[Graph], asked: Callable[[Learner], object]
) -> None:
    ours, plain = pair()
    for learner in (ours, plain):
        taken(learner, [images(), images(seed=1)])
    asked(ours)
    assert not ours._graphs._recorded
    assert ours.step(images(seed=2), step=2) == plain.step(images(seed=2), step=2)
    assert len(graphs) == 2
