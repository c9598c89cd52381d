"""Recorded steps, with a stand-in for CUDA graphs on a CPU: what was recorded is done again, on the same memory.

The stand-in spoils all that was worked out while it recorded, for a GPU works out nothing then.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_learner import apart, assert_same, everything, images, plus_study, study, volumes
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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """All that have been recorded."""
    recorded: list[Graph] = []

    @contextmanager
    def recording(graph: Graph, **_: object) -> Iterator[None]:
        with graph:
            yield
        graph.spoil()
        recorded.append(graph)

    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": recording,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda: None,
        "set_stream": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    monkeypatch.setattr(Learner, "_keeps_apart", lambda *_: False)  # as on a GPU
    return recorded


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
def test_recorded_steps_are_the_same_bits(graphs: list[Graph], objective: str, settings: Mapping[str, Any]) -> None:
    """Of both ranks in turn, with weights, moments, teacher and centre that move in between."""
    ours, plain = pair(objective, **settings)
    assert taken(ours, BATCHES) == taken(plain, BATCHES)
    assert [graph.replays for graph in graphs] == [3, 2]
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


def test_what_cannot_be_recorded_is_told_once_and_computed_as_written(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    objective, calls = ours.objective, []

    def failing(*args: Any) -> Loss:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
        return objective(*args)

    monkeypatch.setattr(ours, "objective", failing)
    assert taken(ours, BATCHES) == taken(plain, BATCHES)
    assert told == [
        "a step could not be recorded, going on without that: RuntimeError: operation not permitted when stream is "
        "capturing"
    ]
    assert graphs == []


def test_where_memory_runs_out_beside_recorded_steps_these_go_first(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then is a batch met in parts."""
    ours, plain = pair()
    told: list[str] = []
    ours._tell = told.append
    taken(ours, BATCHES[:2])
    taken(plain, BATCHES[:2])
    objective, failures = ours.objective, [torch.OutOfMemoryError("CUDA out of memory")]

    def tight(*args: Any) -> Loss:
        if failures:
            raise failures.pop()
        return objective(*args)

    monkeypatch.setattr(ours, "objective", tight)
    assert ours.step(volumes(), step=2) == plain.step(volumes(), step=2)
    assert told == ["out of memory beside recorded steps: going on without these"]
    assert ours.micro_batch == {}
    assert len(graphs) == 1


@pytest.mark.usefixtures("graphs")
def test_memory_that_runs_out_before_anything_is_recorded_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    told: list[str] = []
    ours._tell = told.append
    objective, failures = ours.objective, [torch.OutOfMemoryError("CUDA out of memory")]

    def tight(*args: Any) -> Loss:
        if failures:
            raise failures.pop()
        return objective(*args)

    monkeypatch.setattr(ours, "objective", tight)
    taken(ours, BATCHES[:2])
    assert told == ["out of memory: 2D batches are met in parts of 1, not 3 scans"]
    assert ours._graphs.on
