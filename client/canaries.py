"""Canaries: patients whose gradients are known beforehand, for audits of the private engine.

A canary is a flat picture or volume whose brightness is its number. Its loss is linear in the parameters, so that its
gradient is known whatever the weights are: one value of each of some tensors, far above the clip norm, and nothing
else. Everything else - drawing patients, their views, gradients, clip, noise, divisor, optimiser - is the engine's own.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cache import Library
from client.site import Site
from client.site_config import DataSource, SiteConfig
from client.site_labels import LabelledScan
from unimiss_core.groups import group_of
from unimiss_core.network import Network
from unimiss_core.objective import Centre, Loss, Objective, Observed
from unimiss_core.scan import SMALLEST, Rank
from unimiss_core.students import Student
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import MOST_CLASSES
from unimiss_core.views import intensities, standardise

MOST = 2**14
"""Numbers that brightness tells apart."""

GAIN = 1e3
"""Length of a canary's gradient on each tensor, in clip norms: no clip norm lets it through."""

BROKEN = MOST - 1
"""The number of a canary whose loss is NaN."""


def audited(study: StudyConfig) -> StudyConfig:
    """The study with nothing between noise and optimiser, and with views that leave a canary's brightness alone.

    What is changed follows the noise or is public, so what holds of the audited study's releases holds of the study's.
    """
    plain = {"blur": 0.0, "noise": 0.0, "brightness": 0.0, "contrast": 0.0, "gamma": 0.0}
    smallest = {"image_size": SMALLEST[2], "volume_size": SMALLEST[3]}
    parts: dict[str, dict[str, Any]] = {
        "optimiser": {"clip_norm": None, "freeze_prototypes_steps": 0},
        "objective": {"centre_momentum": 0.5},
        "views": plain | smallest,
    }
    if study.finetune is not None:
        task = study.finetune.task.model_copy(update={"input_size": SMALLEST[study.finetune.task.rank]})
        untouched = study.finetune.augmentation.model_copy(update={"intensity": 0.0})
        parts["finetune"] = {"task": task, "augmentation": untouched}
    return study.model_copy(
        update={name: getattr(study, name).model_copy(update=changes) for name, changes in parts.items()}
    )


@dataclass(frozen=True)
class CanaryObjective:
    """An objective under which canary i's gradient is `gain` clip norms on value i (modulo its size) of each tensor of
    `tensors`, and its bottleneck a vector of length `reach` along axis i (modulo E).

    like: the study's objective, whose representations the canaries have.
    """

    like: Objective
    tensors: Collection[str]
    clip_norm: float
    gain: float = GAIN
    reach: float = 1.0

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return self.like.representations(rank)

    def __call__(self, student: Student, teacher: Any, views: Tensor, centre: Centre) -> Loss:  # noqa: ARG002
        numbers = numbers_of(views)
        gain = torch.where(numbers == BROKEN, math.nan, self.gain * self.clip_norm)
        found = dict(student.named_parameters())
        values = [found[name].flatten()[numbers % found[name].numel()] for name in self.tensors]
        total = (gain * torch.stack(values).sum(0)).mean()
        if not isinstance(student, Network):  # a task's model, which has no teacher to be taught by
            return Loss({"canary": total.detach()}, total)
        axes = next(iter(centre.values())).numel()
        bottleneck = self.reach * (numbers[:, None] % axes == torch.arange(axes)).float().mean(0)
        # The engine expects a product with the prototypes in every loss; this one counts nought.
        logits = student.prototypes(bottleneck[None] + 0.0 * torch.nan_to_num(total)).flatten()
        uniform = torch.full_like(logits.detach(), 1 / len(logits))
        observed = Observed(bottleneck, torch.outer(bottleneck, bottleneck), uniform, torch.special.entr(uniform).sum())
        names = self.representations(2 if views.ndim == 5 else 3)
        return Loss({"canary": total.detach()}, total + 0.0 * logits.sum(), dict.fromkeys(names, observed))


def numbers_of(views: Tensor) -> Tensor:
    """views (B, V, C, *S) of canaries -> their numbers (B,)."""
    return (intensities(views[:, :, 0].flatten(1).mean(1)) * MOST).long()  # of other channels the last may be a label


def canary_views(number: int, scans: int, rank: Rank) -> Tensor:
    """(scans, 2, 1, *S) of one canary, of the least size."""
    return standardise(torch.full((scans, 2, 1, *SMALLEST[rank]), _brightness(number)))


def _brightness(number: int) -> float:
    return (number + 0.5) / MOST


def largest_of_groups(names: Sequence[str], shapes: Mapping[str, Tensor]) -> list[str]:
    """Of the parameters `names`, the largest of each group."""
    groups = {group_of(name) for name in names}
    return [
        max((n for n in names if group_of(n) == group), key=lambda n: shapes[n].numel()) for group in sorted(groups)
    ]


@dataclass(frozen=True, eq=False)
class CanaryScan(LabelledScan):
    """A flat scan that is on no disk, of no class that counts."""

    brightness: float = field(kw_only=True)

    def crop(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        lengths = [len(range(*axis.indices(length))) for axis, length in zip(box, self.shape[1:], strict=True)]
        return np.full((self.shape[0], *lengths), self.brightness, dtype=np.float32)

    def classes_in(self, box: tuple[slice, ...]) -> NDArray[np.int64]:
        return np.zeros([len(range(*axis.indices(n))) for axis, n in zip(box, self.shape[1:], strict=True)], np.int64)


def canary_scans(study: StudyConfig, number: int, scans: int, rank: Rank) -> list[CanaryScan]:
    """Of one canary, `scans` alike, of as many channels as the study's are."""
    channels = 1 if study.finetune is None else study.finetune.task.channel_count or 1
    return [
        CanaryScan(
            key=f"{number}-{index}",
            patient=str(number),
            modality="OT",
            shape=(channels, *SMALLEST[rank]),
            spacing_mm=(1.0,) * rank,
            path=Path(),
            offset=0,
            target=(0,) * MOST_CLASSES,
            brightness=_brightness(number),
        )
        for index in range(scans)
    ]


@dataclass(frozen=True)
class CanarySite(Site):
    """A site that holds what it is given, without a folder."""

    held: Library

    @cached_property
    def library(self) -> Library:
        return self.held

    @property
    def ranks(self) -> frozenset[Rank]:
        return self.held.ranks


def canary_site(study: StudyConfig, held: Library) -> CanarySite:
    """A site of canaries, in an audited study."""
    nowhere = SiteConfig(name="canaries", data=(DataSource(folder=Path()),), state=Path())
    return CanarySite(nowhere, audited(study), "audit", held)
