import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.federation import small_study
from unimiss_core.collapse import RoundWatch, effective_rank, signs_in_round, signs_of_collapse
from unimiss_core.objective import observe

K = 32


def figures_of(batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    watch = RoundWatch()
    for h, targets in batches:
        watch.add({"image": observe(h, targets)})
    return watch.figures()


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def one_hot(indices: list[int]) -> Tensor:
    """(B,) -> sharp targets (B, 2, K), the same for both views."""
    return F.one_hot(torch.tensor(indices), K).float()[:, None].expand(-1, 2, -1)


def test_a_round_is_the_mean_of_its_steps() -> None:
    h, targets = (
        unit(12, 2, 8),
        torch.softmax(3 * torch.randn(12, 2, K, generator=torch.Generator().manual_seed(1)), -1),
    )
    whole = figures_of([(h, targets)])
    parts = figures_of([(h[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)])
    assert parts == pytest.approx(whole, rel=1e-4)
    rows = h.flatten(0, 1).double()
    assert whole["feature_std_image"] == pytest.approx(rows.var(0, correction=0).sum().sqrt().item(), rel=1e-5)
    entropy = -(targets * targets.log()).sum(-1).mean().item()
    assert whole["target_entropy_image"] == pytest.approx(entropy, rel=1e-5)


def test_sharp_targets_that_differ_are_well() -> None:
    figures = figures_of([(unit(16, 2, 8), one_hot(list(range(16))))])
    assert figures["target_entropy_image"] == pytest.approx(0, abs=1e-5)
    assert figures["mean_target_entropy_image"] == pytest.approx(math.log(16), rel=1e-4)
    assert signs_of_collapse(figures, K) == []


def test_the_uniform_answer_is_seen() -> None:
    figures = figures_of([(unit(16, 2, 8), torch.full((16, 2, K), 1 / K))])
    assert signs_of_collapse(figures, K) == [
        "image: all targets are alike, at the uniform answer (entropy 3.47 of at most 3.47, of their mean 3.47); "
        "nothing is learned while this lasts"
    ]


def test_signs_count_after_the_warm_up_and_a_figure_that_diverged_is_none() -> None:
    study = small_study(9, optimiser={"warmup_steps": 4})  # two rounds
    uniform = {"target_entropy_image": math.log(16), "mean_target_entropy_image": math.log(16)}
    assert [len(signs_in_round(study, number, uniform)) for number in (1, 2, 3)] == [0, 0, 1]
    assert signs_in_round(study, 3, {**uniform, "target_entropy_image": math.nan}) == []


def test_one_prototype_for_all_is_seen() -> None:
    point = unit(1, 1, 8).expand(16, 2, 8)
    figures = figures_of([(point, one_hot([7] * 16))])
    assert figures["feature_std_image"] == pytest.approx(0, abs=1e-3)
    (sign,) = signs_of_collapse(figures, K)
    assert "at few prototypes" in sign


def test_representations_are_judged_one_by_one() -> None:
    watch = RoundWatch()
    watch.add({"volume": observe(unit(4, 2, 8), one_hot([0, 1, 2, 3]))})
    watch.add({"slices": observe(unit(4, 2, 8), one_hot([5] * 4))})
    assert [sign.split(":")[0] for sign in signs_of_collapse(watch.figures(), K)] == ["slices"]


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3)
    assert effective_rank(torch.diag(torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0.0


@pytest.mark.parametrize("spread", [0.0, 1e-4, 3e-3, 1e-2])
@pytest.mark.parametrize("width", [128, 256])
def test_rounding_is_no_direction_of_features_that_are_nearly_one_point(spread: float, width: int) -> None:
    """Of 50 steps, in float32. Oracle: features that deviate along one direction have one, of no length none."""
    point, along = unit(2, width)
    batches = [
        F.normalize(
            point + spread * torch.randn((64, 1, 1), generator=torch.Generator().manual_seed(n)) * along, dim=-1
        )
        for n in range(50)
    ]
    figures = figures_of([(h, torch.full((64, 1, K), 1 / K)) for h in batches])
    assert figures["effective_rank_image"] == pytest.approx(1.0 if spread > 1e-3 else 0.0, abs=0.05)
