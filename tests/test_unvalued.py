"""Modules without values."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unimiss_core.backbone import backbone_of
from unimiss_core.model_config import ModelConfig
from unimiss_core.network import build_network, empty_network
from unimiss_core.scan import RANKS
from unimiss_core.task_config import SegmentationConfig
from unimiss_core.tasks import build_task_model, empty_task_model
from unimiss_core.unvalued import unvalued


class Counted(TorchDispatchMode):
    """Which of torch's operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_is_drawn_for_a_network_without_values() -> None:
    with Counted() as ran:
        empty_network(ModelConfig())
        empty_task_model(ModelConfig(), SegmentationConfig(rank=2, classes=("a",)))
    assert ran.names, "no operation was seen: the line below proves nothing"
    assert not [name for name in ran.names if "uniform" in name or "normal" in name]


def test_modules_are_those_that_torch_makes_on_its_meta_device() -> None:
    with torch.device("meta"):
        drawn = backbone_of(ModelConfig())
    with unvalued():
        undrawn = backbone_of(ModelConfig())
    assert str(undrawn) == str(drawn)
    theirs = {name: (value.shape, value.dtype, value.device, value.requires_grad) for name, value in _all(drawn)}
    assert {n: (v.shape, v.dtype, v.device, v.requires_grad) for n, v in _all(undrawn)} == theirs


def _all(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def test_outside_torch_draws_as_ever() -> None:
    with unvalued():
        torch.nn.Linear(3, 3)
    layer = torch.nn.Linear(3, 3)
    assert layer.weight.device.type == "cpu"
    assert bool(layer.weight.detach().abs().gt(0).all())
    assert bool(layer.weight.detach().abs().le(3**-0.5).all())


def test_a_task_draws_only_what_it_is_not_given() -> None:
    """And what it draws is what it would draw if it were given nothing."""
    model = ModelConfig(prototypes=16)
    given = {name: value.detach() for name, value in build_network(model, seed=1).named_parameters()}
    for rank in RANKS:
        made, alone = (
            build_task_model(model, SegmentationConfig(rank=rank, classes=("a",)), seed=0, pretrained=pretrained)
            for pretrained in (given, None)
        )
        for (name, value), other in zip(made.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(value, given[name] if name.startswith("backbone.") else other), name
