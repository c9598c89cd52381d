"""What the coordinator makes of a round's joined update before it is added to the student.

The update d stands for a gradient, with its sign turned (Reddi et al. 2021, arXiv:2003.00295, algorithm 1). Every
optimiser here works value by value on the tensors that it is given, and it is given those of the groups that somebody
trained: what belongs to another group keeps its state bit for bit, as if there had been no round. Neither paper's
algorithm corrects for a start at zero, so nothing depends on a count of rounds either.

State is named as the parameter is, behind a prefix: `momentum.head.layers.0.weight`. A tensor that was never trained
has none.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from unimiss_core.study import FedAdamConfig, FedAvgMConfig, NoServerOptimiserConfig, ServerOptimiserConfig

PREFIXES = ("momentum.", "second_moment.")

State = Mapping[str, Tensor]
"""prefix.name -> tensor, float32, of the parameter's shape."""


class ServerOptimiser(Protocol):
    """One step of a server optimiser: a function, so that a round that fails leaves nothing half done."""

    def step(self, update: Mapping[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        """(what to add to the student, the state afterwards). Neither argument is changed."""


class Plain:
    """The update is added as it is."""

    def step(self, update: Mapping[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        return dict(update), state


class FedAvgM:
    """v <- beta v + d;  x <- x + lr v.  Hsu et al. 2019 (arXiv:1909.06335), there with lr = 1."""

    def __init__(self, config: FedAvgMConfig) -> None:
        self._config = config

    def step(self, update: Mapping[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        momenta = {
            f"momentum.{name}": delta.add(_before(state, "momentum", name, delta), alpha=self._config.momentum)
            for name, delta in update.items()
        }
        return {name: self._config.lr * momenta[f"momentum.{name}"] for name in update}, {**state, **momenta}


class FedAdam:
    """m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2;  x <- x + lr m / (sqrt(v) + tau).

    Reddi et al. 2021 (arXiv:2003.00295), algorithm 2 with m from 0 and v from tau^2, without correction of the bias.
    """

    def __init__(self, config: FedAdamConfig) -> None:
        self._config = config

    def step(self, update: Mapping[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        config, step, after = self._config, dict[str, Tensor](), dict(state)
        for name, delta in update.items():
            first = _before(state, "momentum", name, delta).lerp(delta, 1 - config.beta1)
            second = _before(state, "second_moment", name, delta, start=config.tau**2)
            second = second.lerp(delta.square(), 1 - config.beta2)
            after |= {f"momentum.{name}": first, f"second_moment.{name}": second}
            step[name] = first.mul(config.lr).div_(second.sqrt().add_(config.tau))
        return step, after


def build_optimiser(config: ServerOptimiserConfig) -> ServerOptimiser:
    """The server optimiser that a study means."""
    if isinstance(config, NoServerOptimiserConfig):
        return Plain()
    return FedAvgM(config) if isinstance(config, FedAvgMConfig) else FedAdam(config)


def _before(state: State, prefix: str, name: str, like: Tensor, *, start: float = 0.0) -> Tensor:
    """The state of a parameter, or what it begins from."""
    found = state.get(f"{prefix}.{name}")
    return torch.full_like(like, start) if found is None else found
