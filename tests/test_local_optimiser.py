"""What sites step with: against the papers' algorithms written out, and against noise as it is really added."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.federation import small_study
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError
from unimiss_core.learner import Learner
from unimiss_core.local_optimiser import (
    BlockwiseAdamW,
    LocalOptimiser,
    MomentumSGD,
    NoiseAwareAdamW,
    noise_variance,
)
from unimiss_core.network import tensors_of
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

RATE, DECAY, FLOOR = 0.02, 0.3, 0.1
NAMES = ("adamw", "noise_aware_adamw", "momentum_sgd")


def private_study(optimiser: str = "noise_aware_adamw") -> StudyConfig:
    privacy = {"mode": "patient", "max_epsilon": 1e6, "clip_norm": 0.7, "noise_multiplier": 1.5, "centre_noise": 0.1}
    steps = {"name": optimiser, "warmup_steps": 1}
    return small_study(50, privacy=privacy, batch={"images": 3, "volumes": 5}, optimiser=steps)


def gradients(count: int, values: int = 6) -> list[Tensor]:
    """Of which the first value is far above the noise, the last nothing but noise."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.logspace(1, -3, values, dtype=torch.float64)
    return [signal + 0.1 * torch.randn(values, generator=generator, dtype=torch.float64) for _ in range(count)]


def path_of(
    optimiser: LocalOptimiser | torch.optim.Optimizer, steps: Sequence[Tensor], noises: Sequence[float]
) -> list[Tensor]:
    """The parameter after each step on the gradients `steps`."""
    (group,) = optimiser.groups if isinstance(optimiser, LocalOptimiser) else optimiser.param_groups
    group |= {"lr": RATE, "weight_decay": DECAY}
    (parameter,) = group["params"]
    path = []
    for gradient, noise in zip(steps, noises, strict=True):
        group["noise_variance"] = noise
        parameter.grad = gradient.clone()
        optimiser.step()
        path.append(parameter.detach().clone())
    return path


def start(values: int = 6) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, values, dtype=torch.float64))


def test_noise_aware_adamw_is_the_papers_algorithm_written_out() -> None:
    """DP-AdamBC, algorithm 1: v^ less the noise's variance; where that changes, its mean by the weights of v^."""
    w, m, v, phi = start().detach().numpy().copy(), np.zeros(6), np.zeros(6), 0.0
    steps, noises = gradients(8), [0.01, 0.01, 0.002, 0.01, 0.002, 0.002, 0.01, 0.01]
    expected = []
    for t, (g, noise) in enumerate(zip(steps, noises, strict=True), start=1):
        m, v, phi = (
            0.9 * m + 0.1 * g.numpy(),
            0.999 * v + 0.001 * g.numpy() ** 2,
            0.999 * phi + 0.001 * noise,
        )
        spread = np.maximum(v / (1 - 0.999**t) - phi / (1 - 0.999**t), FLOOR * noise)
        w = (1 - RATE * DECAY) * w - RATE * (m / (1 - 0.9**t)) / np.sqrt(spread)
        expected.append(w)
    found = path_of(NoiseAwareAdamW([{"params": [start()]}], noise_floor=FLOOR), steps, noises)
    np.testing.assert_allclose(np.stack([each.numpy() for each in found]), np.stack(expected), rtol=1e-9)


def test_without_noise_it_is_adamw() -> None:
    steps = gradients(8)
    plain = torch.optim.AdamW([{"params": [start()]}], eps=0.0)
    ours = NoiseAwareAdamW([{"params": [start()]}], noise_floor=FLOOR)
    torch.testing.assert_close(path_of(ours, steps, [0.0] * 8), path_of(plain, steps, [0.0] * 8))


def test_adamw_is_torchs_own_bit_for_bit() -> None:
    """Also of a parameter that some steps leave without a gradient."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)), start()] for _ in range(2))
    one = BlockwiseAdamW([{"params": ours, "lr": RATE, "weight_decay": DECAY}])
    other = torch.optim.AdamW(theirs, lr=RATE, weight_decay=DECAY, fused=True)
    for step in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            its.grad = mine.grad.clone()
        if step == 1:
            ours[0].grad = theirs[0].grad = None
        one.step()
        other.step()
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its)
            assert {key: value.tolist() for key, value in one.state[mine].items()} == {
                key: value.tolist() for key, value in other.state[its].items()
            }


def test_blocks_of_rows_are_one_step_bit_for_bit() -> None:
    """Also of the first, which begins the means, and after steps of another kind."""
    generator = torch.Generator().manual_seed(0)
    whole, blocks = (nn.Parameter(torch.linspace(-1, 1, 60).view(20, 3)) for _ in range(2))
    one, other = (BlockwiseAdamW([{"params": [p], "lr": RATE, "weight_decay": DECAY}]) for p in (whole, blocks))
    for step in range(4):
        gradient = torch.randn(20, 3, generator=generator)
        whole.grad, blocks.grad = gradient.clone(), gradient.clone()
        one.step()
        if step == 2:
            other.step()
        else:
            other.step_blocks(blocks, ((rows, gradient[rows]) for rows in (slice(0, 8), slice(8, 16), slice(16, 24))))
        assert torch.equal(whole, blocks)
        for key, tensor in one.state[whole].items():
            assert torch.equal(tensor, other.state[blocks][key]), key


def test_the_mean_of_squares_is_the_gradients_own() -> None:
    """A steady gradient of 0.1 under noise of 1: AdamW would divide by 1, and step a tenth as far as without noise."""
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    optimiser = NoiseAwareAdamW([{"params": [parameter]}], noise_floor=1e-3)
    path_of(
        optimiser,
        [0.1 + torch.randn(4000, generator=generator, dtype=torch.float64) for _ in range(2000)],
        [1.0] * 2000,
    )
    squares = optimiser.state[parameter]["exp_avg_sq"].mean().item() / (1 - 0.999**2000)
    assert squares == pytest.approx(0.1**2, rel=0.15)


def test_momentum_moves_along_the_mean_of_gradients() -> None:
    """Each weighs 0.9^age; decay is apart from it."""
    steps = gradients(5)
    w, expected = start().detach(), []
    for t in range(1, 6):
        weights = [0.9 ** (t - 1 - i) for i in range(t)]
        mean = sum((weight * g for weight, g in zip(weights, steps, strict=False)), torch.zeros(6)) / sum(weights)
        w = (1 - RATE * DECAY) * w - RATE * mean
        expected.append(w)
    torch.testing.assert_close(path_of(MomentumSGD([{"params": [start()]}]), steps, [0.0] * 5), expected)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_variance_that_is_subtracted_is_that_of_the_noise_which_was_added(rank: Rank) -> None:
    """Read back from the first moment of steps of nothing but noise, tensor by tensor, of either batch."""
    running = PrivateLearner(private_study(), ranks={2, 3})
    running.private_step([], rank=rank, step=1)
    moments = running.state().tensors
    for name in running.trained_names(rank, 1):
        fed = 10 * moments[f"adam_moment1.{name}"].double()
        bound = 6 * math.sqrt(2 / fed.numel())
        assert fed.square().mean().item() == pytest.approx(noise_variance(running.study, rank), rel=bound), name


def test_private_noise_has_a_variance_for_each_rank_and_plain_steps_have_none() -> None:
    assert noise_variance(private_study(), 2) == pytest.approx((1.5 * 0.7 / 3) ** 2)
    assert noise_variance(private_study(), 3) == pytest.approx((1.5 * 0.7 / 5) ** 2)
    assert noise_variance(small_study(), 2) == 0.0


def everything(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state(weights=True).tensors.items()}


def of_3d(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not {"3d", "volume", "slices"}.isdisjoint(name.split("."))}


@pytest.mark.parametrize("name", NAMES)
def test_a_learner_goes_on_from_its_state_as_if_nothing_had_happened(name: str) -> None:
    study = private_study(name)
    views = torch.rand(1, 2, 1, 33, 40, generator=torch.Generator().manual_seed(0))
    first, second = Learner(study, ranks={2, 3}), Learner(study, ranks={2, 3})
    first.step(views, step=1)
    second.restore(first.state(weights=True))
    for learner in (first, second):
        learner.step(views, step=2)
    one, other = everything(first), everything(second)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert any(key.startswith("adam_moment2.") for key in one) == (name != "momentum_sgd")


@pytest.mark.parametrize("name", NAMES)
def test_images_move_nothing_of_3d(name: str) -> None:
    learner = Learner(private_study(name), ranks={2, 3})
    learner.step(torch.rand(1, 2, 1, 13, 33, 40, generator=torch.Generator().manual_seed(0)), step=1)
    before = everything(learner)
    learner.step(torch.rand(1, 2, 1, 33, 40, generator=torch.Generator().manual_seed(0)), step=2)
    after = everything(learner)
    assert all(torch.equal(after[key], tensor) for key, tensor in of_3d(before).items())
    assert any(not torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_optimisers_move_differently(one: str, other: str) -> None:
    """Else a study's choice would be of no account."""
    views = torch.rand(1, 2, 1, 33, 40, generator=torch.Generator().manual_seed(0))
    moved = []
    for name in (one, other):
        learner = Learner(private_study(name), ranks={2})
        learner.step(views, step=1)
        moved.append(tensors_of(learner.student)["head.prototypes.weight"])
    assert not torch.allclose(*moved)


PRIVATE = {"privacy": {"mode": "patient", "max_epsilon": 1.0, "noise_multiplier": 1.0}}
LARGE = {"batch": {"images": 500, "volumes": 500}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimiser": {"name": "noise_aware_adamw"}}, "and privacy.mode is none, not patient; write name: adamw"),
        (
            {**PRIVATE, **LARGE, "optimiser": {"name": "noise_aware_adamw", "clip_norm": 0.3}},
            r"'optimiser\.clip_norm': input should be null, got 0\.3",
        ),
        ({"optimiser": {"noise_floor": 0.1}}, "a setting of name: noise_aware_adamw"),
        ({"optimiser": {"name": "adam"}}, "did you mean 'adamw'"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(StudyConfig, {"name": "x", **changes}, where="x")


def test_studies_older_than_the_choice_keep_their_digests() -> None:
    plain = parse(StudyConfig, {"name": "x"}, where="x")
    assert plain.digest() == "322968360027eab2bcf427afb02e47182a6bca22a50af090611e77a53add67ea"
    spelt_out = {"name": "x", "optimiser": {"name": "adamw", "weight_decay": [0.04, 0.4]}}
    assert parse(StudyConfig, spelt_out, where="x") == plain
    other = parse(StudyConfig, {"name": "x", "optimiser": {"name": "momentum_sgd"}}, where="x")
    assert parse(StudyConfig, yaml.safe_load(dump_yaml(other)), where="x") == other != plain


def test_counts_are_where_they_are_looked_for() -> None:
    """A count on a GPU would make each tensor of each step wait for it."""
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    kept = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    for optimiser, place in ((MomentumSGD([]), "cpu"), (BlockwiseAdamW([]), "meta")):
        optimiser.take_up(parameter, kept)
        assert {name: tensor.device.type for name, tensor in optimiser.state[parameter].items()} == {
            "step": place,
            "exp_avg": "meta",
        }
