"""The supervised objective against naive forms, and that nothing of one view stands in another's loss."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from torch import Tensor, nn

from unimiss_core.config import parse
from unimiss_core.labelled_views import parted, shares_in, with_mask, with_shares
from unimiss_core.supervised import Supervised, class_cross_entropy, dice_loss, voxel_cross_entropy
from unimiss_core.task_config import SupervisionConfig


def logits_and_mask(views: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(views, classes, 5, 6, generator=generator)
    return logits, torch.randint(classes, (views, 5, 6), generator=generator).float()


def test_a_view_brings_its_truth_back_exactly() -> None:
    view, mask = torch.randn(1, 8, 8), torch.randint(7, (8, 8))
    seen, truth = parted(torch.stack([with_mask(view, mask)])[:, None])
    assert torch.equal(seen[0], view)
    assert torch.equal(truth[0].long(), mask)
    _, truth = parted(torch.stack([with_shares(view, [0.0, 1.0, 1.0])])[:, None])
    assert shares_in(truth, 3).tolist() == [[0.0, 1.0, 1.0]]


def test_dice_is_monais_of_each_view_by_itself() -> None:
    logits, mask = logits_and_mask()
    theirs = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=False)
    expected = torch.stack([theirs(one[None], truth[None, None]) for one, truth in zip(logits, mask, strict=True)])
    assert torch.allclose(dice_loss(logits, mask), expected.mean(), atol=1e-5)


def test_a_class_that_a_mask_lacks_is_left_out_of_its_dice() -> None:
    logits, mask = logits_and_mask(views=1)
    mask[mask == 2] = 0
    share, there = logits.softmax(1)[0, 1], mask[0] == 1
    dice = 2 * share[there].sum() / (share.sum() + there.sum())
    assert torch.allclose(dice_loss(logits, mask), 1 - dice, atol=1e-5)
    assert dice_loss(logits, torch.zeros_like(mask)) == 0


def test_class_weights_weigh_each_scan_by_itself() -> None:
    """Not as torch's own mean, which divides by the batch's sum of weights."""
    logits, truth, weights = torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 5.0])
    expected = sum(weights[t] * F.cross_entropy(z[None], t[None]) for z, t in zip(logits, truth, strict=True)) / 4
    ours = class_cross_entropy(logits, F.one_hot(truth, 2).float(), weights, several=False)
    assert torch.allclose(ours, expected)
    logits, mask = logits_and_mask()
    expected = F.cross_entropy(logits, mask.long(), weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none").mean()
    assert torch.allclose(voxel_cross_entropy(logits, mask, torch.tensor([1.0, 2.0, 3.0])), expected)


class Flat(nn.Module):
    """Stands in for a model: the pixel itself, and twice it, as two answers."""

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self._dense = dense

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.cat([x, 2 * x], dim=1)
        return answers if self._dense else answers.flatten(2).mean(-1)


@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_a_batch_costs_the_mean_of_what_its_views_cost_alone(name: str) -> None:
    """So that parts of a batch weigh by their size, and a patient's gradient is the patient's own."""
    dense = name == "segmentation"
    classes = ["there"] if dense else ["no", "yes"]
    raw = {"task": {"name": name, "classes": classes, "rank": 2}, "class_weights": [1.0, 7.0]}
    objective = Supervised(parse(SupervisionConfig, raw, where="test"))
    generator = torch.Generator().manual_seed(1)
    views = []
    for number in range(4):
        view = torch.randn(1, 8, 8, generator=generator)
        mask = (torch.rand(8, 8, generator=generator) < 0.2 * number).long()
        views.append(with_mask(view, mask) if dense else with_shares(view, [1.0 - number % 2, float(number % 2)]))
    batch = torch.stack(views)[:, None]
    together = objective(Flat(dense=dense), None, batch, {})
    alone = [objective(Flat(dense=dense), None, one[None], {}) for one in batch]
    assert torch.allclose(together.total, torch.stack([one.total for one in alone]).mean())
    assert together.total == sum(together.terms.values())
    assert not together.observed
