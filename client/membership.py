"""Membership inference: whether a finished run's loss is lower for patients whose scans it saw.

The attack knows student and teacher, and the loss that was minimised: a patient's score is the mean loss over its
scans and VIEWS draws of views. The figure is the chance that a member's loss is below another patient's: 0.5 where
members cannot be told. It speaks of this attack alone, and is no bound on what a better one would find.

Members and others must be of the same kind, or it is the kind that is told: best two parts of one folder, by
`patient_range`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from client.cache import CachedScan
from unimiss_core.errors import ConfigError
from unimiss_core.network import Network, empty_network, load_tensors_
from unimiss_core.objective import Centre, Loss
from unimiss_core.objectives import build_objective
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import StudyConfig
from unimiss_core.views import draw_batch

VIEWS = 4
"""Draws of views of each scan."""

LEAST_PATIENTS = 5
"""Of each kind, below which there is no figure."""


@dataclass(frozen=True)
class Membership:
    """auc: chance that a member's loss is below another patient's; low, high: its 95% interval."""

    members: int
    others: int
    auc: float
    low: float
    high: float


def membership(
    study: StudyConfig,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    members: Sequence[CachedScan],
    others: Sequence[CachedScan],
    device: torch.device,
) -> Membership:
    """How well the loss of student and teacher tells patients of `members` from those of `others`.

    Losses of images and of volumes are compared within their rank. Raises ConfigError: too few patients of either.
    """
    networks = _network(study, student, device), _network(study, teacher, device)
    scores: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
    for rank in RANKS:
        held = [[scan for scan in scans if scan.rank == rank] for scans in (members, others)]
        if not all(held):
            continue
        losses = _losses(study, networks, [*held[0], *held[1]], rank)
        standard = (losses - losses.mean()) / losses.std().clamp(min=1e-12)
        for scans, part, into in zip(held, standard.split([len(h) for h in held]), scores, strict=True):
            for scan, loss in zip(scans, part.tolist(), strict=True):
                into[scan.patient].append(loss)
    means = [torch.tensor([sum(each) / len(each) for each in found.values()]) for found in scores]
    if (fewest := min(map(len, means))) < LEAST_PATIENTS:
        raise ConfigError(
            f"members and others have scans of one rank of {fewest} patients on one side; give {LEAST_PATIENTS} or more"
        )
    auc, (low, high) = auc_below(*means)
    return Membership(len(means[0]), len(means[1]), auc, low, high)


def auc_below(members: Tensor, others: Tensor) -> tuple[float, tuple[float, float]]:
    """members (m,), others (n,) -> chance that one of the first is below one of the second, and its 95% interval, by
    DeLong, DeLong and Clarke-Pearson 1988 (doi:10.2307/2531595). Where all are told apart the interval is a point."""
    wins = (members[:, None] < others).double() + 0.5 * (members[:, None] == others).double()
    auc = wins.mean().item()
    spread = math.sqrt(wins.mean(1).var().item() / len(members) + wins.mean(0).var().item() / len(others))
    half = NormalDist().inv_cdf(0.975) * spread
    return auc, (max(0.0, auc - half), min(1.0, auc + half))


def _network(study: StudyConfig, tensors: Mapping[str, Tensor], device: torch.device) -> Network:
    """Raises CheckpointError: the tensors do not fit the study's model."""
    network = empty_network(study.model).to_empty(device="cpu")
    load_tensors_(network, tensors)
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def _losses(study: StudyConfig, networks: tuple[Network, Network], scans: Sequence[CachedScan], rank: Rank) -> Tensor:
    """(N,): the mean loss of each scan. The centre, which no site sends, is taken as the mean over all of them."""
    objective, (student, teacher) = build_objective(study), networks
    device = next(student.parameters()).device
    width = student.backbone.architecture.bottleneck
    centre: Centre = {name: torch.zeros(width, device=device) for name in objective.representations(rank)}

    def met(scan: CachedScan) -> list[Loss]:
        return [objective(student, teacher, _views(study, scan, number, device), centre) for number in range(VIEWS)]

    seen = [loss.observed for scan in scans for loss in met(scan)]
    centre = {name: torch.stack([each[name].bottleneck for each in seen]).mean(0) for name in centre}
    return torch.stack([torch.stack([loss.total for loss in met(scan)]).mean() for scan in scans]).cpu()


def _views(study: StudyConfig, scan: CachedScan, number: int, device: torch.device) -> Tensor:
    """(1, V, C, *S): draw `number`, the same for every scan."""
    return draw_batch([scan], study.views, torch.Generator().manual_seed(number), device)
