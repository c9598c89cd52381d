"""Supervision as an objective: what a model's answers cost where each view brings its label.

There is no teacher, hence no representation of one, no centre and nothing observed. The loss of a batch is the mean of
its views' own losses, and nothing of one view stands in another's: no class weight is counted from a batch, no Dice is
taken over several scans, no norm couples them. So a batch may be met in parts, and a patient's gradient is the
patient's own.

Legend of shapes: N views, C channels, S spatial axes - (H, W) or (D, H, W) -, K answers of the model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unimiss_core.labelled_views import parted, shares_in
from unimiss_core.loss_terms import CROSS_ENTROPY, DICE
from unimiss_core.objective import Centre, Loss
from unimiss_core.scan import Rank
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, SupervisionConfig
from unimiss_core.tasks import TaskModel

_SMOOTH = 1e-5
"""Voxels that keep a Dice of nothing from dividing by nothing."""


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of a class; of a mask the sum of cross-entropy and Dice loss (Isensee et al. 2021, nnU-Net)."""

    config: SupervisionConfig

    def representations(self, rank: Rank) -> tuple[str, ...]:  # noqa: ARG002 - there is no teacher of any
        return ()

    def __call__(self, student: TaskModel, teacher: None, views: Tensor, centre: Centre) -> Loss:  # noqa: ARG002
        """views: as `unimiss_core.labelled_views` has them."""
        x, truth = parted(views)
        logits, weights = student(x), self._weights(views.device)
        task = self.config.task
        if isinstance(task, ClassificationConfig):
            shares = shares_in(truth, task.outputs)
            terms = {CROSS_ENTROPY: class_cross_entropy(logits, shares, weights, several=task.kind == "multi_label")}
        else:
            terms = {CROSS_ENTROPY: voxel_cross_entropy(logits, truth, weights), DICE: dice_loss(logits, truth)}
        return Loss(terms, torch.stack(list(terms.values())).sum())

    def _weights(self, device: torch.device) -> Tensor:
        """(K,), filled in by the device: nothing is copied to it, which a recorded step could not do."""
        weights = self.config.class_weights or [1.0] * self.config.task.outputs
        return torch.stack([torch.full((), weight, device=device) for weight in weights])


def class_cross_entropy(logits: Tensor, shares: Tensor, weights: Tensor, *, several: bool) -> Tensor:
    """Mean over scans of -sum_k weights_k shares_k log p_k; logits and shares (N, K).

    The sum of weights does not divide it, as it would by default: it would be the batch's own. several: each class may
    be there, and counts by a logistic of its own, its weight where it is there; then the mean over classes, too, of
    those alone that are not UNKNOWN of the scan: how many these are is its own, as its loss is.
    """
    if several:
        known = (shares != UNKNOWN).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, shares.clamp(min=0), pos_weight=weights, reduction="none")
        return ((each * known).sum(-1) / known.sum(-1).clamp(min=1)).mean()
    return -(weights * shares * logits.log_softmax(-1)).sum(-1).mean()


def voxel_cross_entropy(logits: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """The same with a class for each voxel: logits (N, K, *S), classes (N, *S)."""
    return (_one_hot(truth, weights) * -logits.log_softmax(1)).sum(1).mean()


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over views of 1 - Dice, that being the mean over the classes that the view's mask holds, without background.

    A view without any costs 0 here: Dice says nothing of it, cross-entropy does. logits (N, K, *S), classes (N, *S).
    """
    shares, there = logits.softmax(1)[:, 1:].flatten(2), _one_hot(truth, logits.new_ones(logits.shape[1]))[:, 1:]
    mask = there.flatten(2)
    dice = (2 * (shares * mask).sum(-1) + _SMOOTH) / (shares.sum(-1) + mask.sum(-1) + _SMOOTH)  # (N, K - 1)
    counts = (mask.sum(-1) > 0).to(dice.dtype)
    return (((1 - dice) * counts).sum(-1) / counts.sum(-1).clamp(min=1)).mean()


def _one_hot(truth: Tensor, values: Tensor) -> Tensor:
    """classes (N, *S) -> (N, K, *S): values_k where the class is k, else 0."""
    numbers = torch.arange(len(values), device=truth.device).view(1, -1, *[1] * (truth.ndim - 1))
    return (truth[:, None] == numbers) * values.view_as(numbers)
