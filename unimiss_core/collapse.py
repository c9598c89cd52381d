"""Seeing collapse: whether the teacher still tells one scan from another.

Self-distillation has two dead ends with a low or a constant loss: every target uniform (loss log K), or all scans on
one prototype. In both the targets of different scans are alike, so what a target tells of its scan - the entropy of
the mean target less the mean entropy of targets, their mutual information - goes to nought.

Legend of shapes: E features of the bottleneck, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from unimiss_core.errors import CheckpointError
from unimiss_core.objective import Observed, weighted_mean
from unimiss_core.study import StudyConfig

ALIKE = 0.02
"""Targets that tell less than this share of log K of their scan are alike."""
_ROUNDING = 8
"""Of float32: what a difference of two means may be off by in one direction, as a share of either. Bottlenecks are of
norm 1, so a direction in which they deviate by less than 0.001 is not counted as one."""


@dataclass
class RoundWatch:
    """What the teacher did over the steps of a round, by representation; every step weighs the same."""

    _means: dict[str, Observed] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)

    def add(self, observed: Mapping[str, Observed]) -> None:
        for name, new in observed.items():
            steps = self._steps.get(name, 0)
            old = self._means.get(name, new)
            self._means[name] = weighted_mean([(steps / (steps + 1), old), (1 / (steps + 1), new)])
            self._steps[name] = steps + 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(means as `representation.field`, steps by representation): what `restored` takes."""
        tensors = {
            f"{name}.{part.name}": getattr(mean, part.name)
            for name, mean in self._means.items()
            for part in fields(Observed)
        }
        return tensors, dict(self._steps)

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> "RoundWatch":
        """The watch as it was at `state`. Raises CheckpointError: a tensor of a watched representation is missing."""
        if missing := {f"{name}.{part.name}" for name in steps for part in fields(Observed)} - tensors.keys():
            raise CheckpointError(f"local state is damaged: {min(missing)} is missing of what the round showed so far")
        means = {
            name: Observed(**{part.name: tensors[f"{name}.{part.name}"] for part in fields(Observed)}) for name in steps
        }
        return cls(means, dict(steps))

    def figures(self) -> dict[str, float]:
        """For each representation seen, e.g. `target_entropy_image`; entropies in nats.

        target_entropy: mean entropy of the targets, log K where they are uniform. mean_target_entropy: entropy of
        the mean target, 0 where all scans share one prototype. feature_std: deviation of the bottleneck from its
        mean, 1 where it covers the sphere, 0 where it is one point. effective_rank: directions that it varies in.
        """
        return {
            f"{figure}_{name}": value
            for name, observed in self._means.items()
            for figure, value in _figures(observed).items()
        }


def signs_in_round(study: StudyConfig, round: int, figures: Mapping[str, float]) -> list[str]:
    """`signs_of_collapse` of a round of `study`; [] until its warm-up is over, for a young network shows the same."""
    if round * study.schedule.local_steps <= study.optimiser.warmup_steps:
        return []
    return signs_of_collapse(figures, study.model.prototypes)


def signs_of_collapse(figures: Mapping[str, float], prototypes: int) -> list[str]:
    """One sentence for each representation whose figures say that its targets are alike; [] where all is well."""
    most = math.log(prototypes)
    signs = []
    for key, entropy in figures.items():
        name = key.removeprefix("target_entropy_")
        mean_entropy = figures.get(f"mean_target_entropy_{name}")
        if name == key or mean_entropy is None or not mean_entropy - entropy < ALIKE * most:  # not: one may be NaN
            continue
        state = "the uniform answer" if mean_entropy > most / 2 else "few prototypes"
        signs.append(
            f"{name}: all targets are alike, at {state} (entropy {entropy:.2f} of at most {most:.2f}, "
            f"of their mean {mean_entropy:.2f}); nothing is learned while this lasts"
        )
    return signs


def effective_rank(covariance: Tensor, *, least: float = 0.0) -> float:
    """exp of the entropy of the eigenvalues' shares (Roy and Vetterli 2007): covariance (E, E) -> 1 to E; 0 of none.

    least: eigenvalues below it are none, for rounding has as much in every direction."""
    values = torch.linalg.eigvalsh(covariance.double().cpu())
    values = values.where(values > least, 0.0)
    if not values.sum() > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _figures(observed: Observed) -> dict[str, float]:
    covariance = observed.second_moment - torch.outer(observed.bottleneck, observed.bottleneck)
    rounding = _ROUNDING * torch.finfo(torch.float32).eps * observed.second_moment.trace().item()
    return {
        "target_entropy": observed.target_entropy.item(),
        "mean_target_entropy": torch.special.entr(observed.target).sum().item(),
        "feature_std": math.sqrt(max(0.0, covariance.trace().item())),
        "effective_rank": effective_rank(covariance, least=rounding),
    }
