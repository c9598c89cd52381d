"""What a step tells of itself, in one transfer from its device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unimiss_core.objective import Loss
from unimiss_core.scan import Rank


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step cost and showed.

    terms: the loss terms by name; total: their sum by weight, without FedProx's term; diagnostics: `grad_norm` before
    clipping, where that term is on `global_distance` (`unimiss_core.proximal`), and by representation the entropy of
    the teacher's targets and of their mean over the batch, in nats (log K says: no information).
    """

    rank: Rank
    terms: dict[str, float]
    total: float
    diagnostics: dict[str, float]


def report_of(rank: Rank, loss: Loss, norms: Tensor, distance: Mapping[str, Tensor]) -> tuple[StepReport, list[float]]:
    """The report, and the norm of each gradient: all scalars in one transfer, the step's one wait for the device."""
    diagnostics = {"grad_norm": torch.linalg.vector_norm(norms), **distance}
    for name, observed in loss.observed.items():
        diagnostics[f"target_entropy_{name}"] = observed.target_entropy
        diagnostics[f"mean_target_entropy_{name}"] = torch.special.entr(observed.target).sum()
    scalars = torch.stack([loss.total, *loss.terms.values(), *diagnostics.values()])
    total, *values = torch.cat([scalars, norms]).tolist()
    terms = {name: values.pop(0) for name in loss.terms}
    return StepReport(rank, terms, total, {name: values.pop(0) for name in diagnostics}), values
