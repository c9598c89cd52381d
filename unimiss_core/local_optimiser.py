"""What a site makes of a step's gradient: AdamW, AdamW that knows the noise on the gradient, or momentum alone.

All keep the same running means under the same names, so that a site's state and the audit of private steps read them
alike: of gradients with 0.9 (`exp_avg`), of their squares with 0.999 (`exp_avg_sq`, momentum keeps none), and each
tensor's count of steps. Matrices, tables and kernels decay apart from the gradient (Loshchilov and Hutter 2019,
arXiv:1711.05101), biases and other 1-D tensors do not.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from unimiss_core.optimiser_config import MomentumSGDConfig, NoiseAwareAdamWConfig, OptimiserConfig
from unimiss_core.scan import Rank
from unimiss_core.schedule import learning_rate, weight_decay
from unimiss_core.study import StudyConfig

BETAS = (0.9, 0.999)
"""What the means of gradients and of their squares keep of themselves in a step."""

EPS = 1e-8
"""What AdamW adds to the root of the mean of squares."""

_KEPT = ("step", "exp_avg", "exp_avg_sq")


class LocalOptimiser(ABC):
    """Steps over the parameters of `groups`, with each group's own settings.

    groups: each its "params", and what `set_rates_` sets. state: what `kept_by` names, of each parameter once moved.
    counts_on_device: whether counts of steps lie where the parameters do, for the kernel that reads them.
    No subclass of torch's Optimizer: making one loads torch's compiler, a second and 34 MB of each process that trains
    (docs/performance.md), and over Flower's deployment engine each round of a site is a process.
    """

    counts_on_device: ClassVar = False

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.groups:
            self._move([p for p in group["params"] if p.grad is not None], group)

    @abstractmethod
    def _move(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None: ...

    def take_up(self, parameter: Tensor, kept: Mapping[str, Tensor]) -> None:
        """A copy of what was kept of a parameter. A count that nobody looks for on a GPU would be waited for there."""
        counts_on = parameter.device if self.counts_on_device else torch.device("cpu")
        self.state[parameter] = {
            key: tensor.to(counts_on if key == "step" else parameter.device, copy=True) for key, tensor in kept.items()
        }

    def drop_gradients(self) -> None:
        """Free the gradients of all parameters."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None


def build_local_optimiser(config: OptimiserConfig, student: nn.Module) -> LocalOptimiser:
    """Two groups, of which one decays. Rates are set per step (`set_rates_`)."""
    decaying = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "decays": True}, {"params": others, "decays": False}]
    if isinstance(config, NoiseAwareAdamWConfig):
        return NoiseAwareAdamW(groups, noise_floor=config.noise_floor)
    if isinstance(config, MomentumSGDConfig):
        return MomentumSGD(groups)
    return BlockwiseAdamW(groups)


def kept_by(config: OptimiserConfig) -> tuple[str, ...]:
    """What the optimiser keeps of each tensor that it has moved."""
    return _KEPT[:2] if isinstance(config, MomentumSGDConfig) else _KEPT


def set_rates_(optimiser: LocalOptimiser, study: StudyConfig, step: int, rank: Rank) -> None:
    """What a step of the study uses, which trains scans of `rank`."""
    for group in optimiser.groups:
        group["lr"] = learning_rate(study, step)
        group["weight_decay"] = weight_decay(study, step) if group["decays"] else 0.0
        group["noise_variance"] = noise_variance(study, rank)


def clip_each_(grads: Sequence[Tensor], norms: Sequence[float], limit: float | None) -> None:
    """Scale each gradient whose norm is above `limit` down to it; the published clipping is per tensor."""
    scales = [clip_scale(norm, limit) for norm in norms]
    clipped = [(grad, scale) for grad, scale in zip(grads, scales, strict=True) if scale < 1.0]
    if clipped:
        torch._foreach_mul_([grad for grad, _ in clipped], [scale for _, scale in clipped])


def clip_scale(norm: float, limit: float | None) -> float:
    """What shortens a gradient of this norm to the limit, or 1."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


def noise_variance(study: StudyConfig, rank: Rank) -> float:
    """Of the noise on each value of a step's gradient: (s C / B)^2, in the mode `patient`; otherwise there is none."""
    if study.privacy.mode != "patient":
        return 0.0
    return (study.privacy.noise_multiplier * study.privacy.clip_norm / study.batch.of(rank)) ** 2


class BlockwiseAdamW(LocalOptimiser):
    """AdamW that can also move a parameter some rows at a time, so that its gradient is never there as a whole."""

    counts_on_device = True

    def _move(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        states = [self._begun(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        _adamw(parameters, gradients, *([state[key] for state in states] for key in _KEPT), group=group)

    @torch.no_grad()
    def step_blocks(self, parameter: Tensor, blocks: Iterable[tuple[slice, Tensor]]) -> None:
        """One step of one parameter; blocks: (rows, their gradient), which must be all rows, each once.

        Rows of AdamW do not meet, so this is what `step` does with the whole gradient.
        """
        (group,) = (group for group in self.groups if any(own is parameter for own in group["params"]))
        count, mean, squares = (self._begun(parameter)[key] for key in _KEPT)
        before = count.clone()
        for rows, gradient in blocks:
            count.copy_(before)  # the kernel counts each block as a step
            _adamw([parameter[rows]], [gradient], [count], [mean[rows]], [squares[rows]], group=group)

    def _begun(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in _KEPT[1:]}
        return state


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    counts: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    group: Mapping[str, Any],
) -> None:
    """One step of torch's own AdamW, in its one kernel for all."""
    adamw(
        parameters,
        gradients,
        means,
        squares,
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=EPS,
        maximize=False,
    )


class _TensorByTensor(LocalOptimiser):
    def _move(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self._move_one(parameter, parameter.grad, group)

    @abstractmethod
    def _move_one(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None: ...


class NoiseAwareAdamW(_TensorByTensor):
    """AdamW whose second moment is the gradient's own, without that of the noise: DP-AdamBC (Tang, Shpilevskiy,
    Lecuyer 2024, arXiv:2312.14334, algorithm 1).

    Noise of variance phi adds phi to the mean of squares, which where it drowns the gradient is then the same for all
    values: AdamW becomes momentum with a rate of its own making. Here a step is

        lr m^ / sqrt(max(v^ - phi, gamma phi)),

    m^ and v^ being the means over the steps so far. phi is taken off each square before it is averaged: the same by
    linearity where phi stays, and right where batches of images and of volumes bring noise of two sizes. The paper's
    floor is a constant; as a share gamma of phi it needs no other value for another batch or clip norm.
    """

    def __init__(self, groups: list[dict[str, Any]], *, noise_floor: float) -> None:
        super().__init__(groups)
        self._noise_floor = noise_floor

    def _move_one(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state, noise = self.state[parameter], group["noise_variance"]
        ahead = _ahead(state, parameter, gradient)
        squares = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        squares.lerp_(gradient.square().sub_(noise), 1 - BETAS[1])
        spread = (squares / (1 - BETAS[1] ** state["step"].item())).clamp_(min=self._noise_floor * noise).sqrt_()
        _step(parameter, ahead / spread, group)


class MomentumSGD(_TensorByTensor):
    """SGD along the running mean of gradients: a step is lr m^, in the length of a gradient and not of the rate.

    The mean is normalised, so that a steady gradient g moves by lr g, not by lr g / (1 - 0.9).
    """

    def _move_one(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        _step(parameter, _ahead(self.state[parameter], parameter, gradient), group)


def _ahead(state: dict[str, Tensor], parameter: Tensor, gradient: Tensor) -> Tensor:
    """Count the step; the mean of the gradients so far, later ones weighing more."""
    count = state.setdefault("step", torch.tensor(0.0))
    count += 1
    mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
    mean.lerp_(gradient, 1 - BETAS[0])
    return mean / (1 - BETAS[0] ** count.item())


def _step(parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
