"""Every rule: what holds for whatever sites send, and the formula of each against brute force."""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from server import robust
from server.aggregation import group_norm, group_weights, norm
from server.robust import median_cut, trimmed_cut
from server.rules import opened_aggregate
from unimiss_core.codec import Layout, TensorSpec, layout_of
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.groups import GROUPS, Group, group_of
from unimiss_core.scan import Rank
from unimiss_core.study import AggregationConfig, StudyConfig

LAYOUT: Layout = {
    "shared": (TensorSpec("backbone.a", (3, 1)), TensorSpec("backbone.b", (2,))),
    "2d": (TensorSpec("backbone.e.2d.w", (3,)),),
    "3d": (TensorSpec("backbone.e.3d.w", (1, 2)),),
    "head": (TensorSpec("head.w", (1,)),),
}
TWO_D: tuple[Group, ...] = ("shared", "2d", "head")
RULES: dict[str, object] = {
    "mean": "mean",
    "median": "median",
    "trimmed_mean": {"name": "trimmed_mean", "share": 0.3},
    "norm_bounded_mean": {"name": "norm_bounded_mean", "max_norm": 2.0},
    "median_bounded": {"name": "norm_bounded_mean", "times_median": 1.5},
}
every_rule = pytest.mark.parametrize("rule", RULES)
quick = settings(max_examples=40, deadline=None)

Site = tuple[dict[str, Tensor], dict[Group, float]]


@st.composite
def sites(draw: st.DrawFn, *, least: int = 1, most: int = 6, weights: tuple[float, float] = (0.5, 50.0)) -> list[Site]:
    """Updates with values that binary floats find hard, of sites with and without volumes."""
    values = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.1]))
    found = []
    for _ in range(draw(st.integers(least, most))):
        groups = draw(st.sampled_from([TWO_D, GROUPS]))
        update = {
            spec.name: torch.tensor(
                draw(st.lists(values, min_size=spec.size, max_size=spec.size)), dtype=torch.float32
            ).reshape(spec.shape)
            for group in groups
            for spec in LAYOUT[group]
        }
        found.append((update, dict.fromkeys(groups, draw(st.floats(*weights)))))
    return found


def joined(rule: object, given_sites: Sequence[Site], layout: Layout = LAYOUT) -> dict[str, Tensor]:
    study = parse(StudyConfig, {"name": "a", "aggregation": {"rule": RULES.get(str(rule), rule)}}, where="test")
    with tempfile.TemporaryDirectory() as folder:
        with opened_aggregate(study, layout, Path(folder) / "scratch") as aggregate:
            for update, weights in given_sites:
                aggregate.fold(update, weights)
            result = aggregate.result()
        assert not list(Path(folder).iterdir()), "what a round kept on disk ends with it"
    return result


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def values_of(given_sites: Sequence[Site], name: str) -> np.ndarray:  # type: ignore[type-arg]
    """(sites that trained it, *shape) of one tensor, float64."""
    return np.stack([update[name].double().numpy() for update, _ in given_sites if name in update])


# ---------------------------------------------------------------------------------------------------- of every rule


@every_rule
@given(some=sites(), shuffler=st.randoms(use_true_random=False))
@quick
def test_order_of_sites_does_not_matter(rule: str, some: list[Site], shuffler: random.Random) -> None:
    """Bit for bit, whatever the values and weights."""
    assert equal(joined(rule, some), joined(rule, shuffler.sample(some, len(some))))


@every_rule
@given(some=sites(), factor=st.floats(1e-2, 1e2))
@quick
def test_scaling_all_weights_does_not_matter(rule: str, some: list[Site], factor: float) -> None:
    scaled = [(update, {group: weight * factor for group, weight in weights.items()}) for update, weights in some]
    ours, theirs = joined(rule, some), joined(rule, scaled)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)


@every_rule
@given(some=sites(most=1, weights=(1.0, 1.0)))
@quick
def test_one_site_alone_gives_its_own_update(rule: str, some: list[Site]) -> None:
    """Bit for bit, but where the rule shortens it."""
    ((update, _),) = some
    result = joined(rule, some)
    for group, specs in LAYOUT.items():
        if rule == "norm_bounded_mean" and (size := group_norm(update, specs)) > 2.0:
            update |= {spec.name: update[spec.name] * (2.0 / size) for spec in specs if spec.name in update}
        for spec in specs:
            if spec.name in update and rule != "norm_bounded_mean":
                found, sent = result[spec.name], update[spec.name]
                kept = sent.abs() >= max(
                    1e-14, sent.abs().max().item() * 2.0**-22
                )  # smaller ones lose bits: `ExactSum`
                assert torch.equal(found[kept], sent[kept]), group
                torch.testing.assert_close(found, sent, rtol=0, atol=sent.abs().max().item() * 2.0**-45 + 1e-25)
            elif spec.name in update:
                torch.testing.assert_close(result[spec.name], update[spec.name], rtol=1e-6, atol=1e-12)


@every_rule
def test_a_group_that_nobody_trained_is_not_in_the_result(rule: str) -> None:
    update = {spec.name: torch.ones(spec.shape) for specs in LAYOUT.values() for spec in specs}
    weights: dict[Group, float] = {"shared": 1.0, "2d": 1.0, "3d": 0.0, "head": 1.0}
    assert joined(rule, [(update, weights)] * 3).keys() == {"backbone.a", "backbone.b", "backbone.e.2d.w", "head.w"}


@every_rule
def test_what_a_round_kept_is_gone_when_the_round_fails(rule: str, tmp_path: Path) -> None:
    study = parse(StudyConfig, {"name": "a", "aggregation": {"rule": RULES[rule]}}, where="test")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "left-by-a-crash").touch()

    def fail() -> None:
        with opened_aggregate(study, LAYOUT, scratch) as aggregate:
            assert not list(scratch.iterdir())
            aggregate.fold({spec.name: torch.ones(spec.shape) for spec in LAYOUT["head"]}, {"head": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not scratch.exists()


# ------------------------------------------------------------------------------------------- median and trimmed mean


@given(some=sites(least=2, most=9))
@quick
def test_median_is_the_median_of_each_coordinate(some: list[Site]) -> None:
    for name, result in joined("median", some).items():
        values = values_of(some, name)
        half = np.finfo(np.float32).smallest_subnormal  # below the smallest normal number, rounding is not relative
        np.testing.assert_allclose(result.double(), np.median(values, axis=0), rtol=1e-7, atol=half)
        assert (values.min(axis=0) <= result.numpy()).all()
        assert (result.numpy() <= values.max(axis=0)).all()


@given(some=sites(least=3, most=9), share=st.floats(0.05, 0.49), data=st.data())
@quick
def test_fewer_hostile_sites_than_the_share_cannot_leave_the_range_of_the_honest(
    some: list[Site], share: float, data: st.DataObject
) -> None:
    """In each group by itself: of the sites that trained it."""
    volumes = [site for site in some if "3d" in site[1]]
    images = [site for site in some if "3d" not in site[1]]
    kept = volumes or images  # of one kind, so that every group has the same sites
    hostile = max(0, int(np.ceil(share * len(kept))) - 1)
    for index in range(hostile):
        lie = data.draw(st.sampled_from([1e2, -1e2, 300.0, -3.0]))
        update = {name: torch.full_like(tensor, lie) for name, tensor in kept[index][0].items()}
        kept[index] = (update, dict.fromkeys(kept[index][1], 1e6))
    for name, result in joined({"name": "trimmed_mean", "share": share}, kept).items():
        honest = values_of(kept[hostile:], name)
        slack = 1e-6 * np.abs(honest).max()
        assert (honest.min(axis=0) - slack <= result.numpy()).all()
        assert (result.numpy() <= honest.max(axis=0) + slack).all()


@given(some=sites(least=4, most=9), share=st.floats(0.05, 0.49))
@quick
def test_trimmed_mean_is_that_of_the_sorted_rest(some: list[Site], share: float) -> None:
    for name, result in joined({"name": "trimmed_mean", "share": share}, some).items():
        ordered = np.sort(values_of(some, name), axis=0)
        cut = min(int(np.ceil(share * len(ordered) - 1e-9)), (len(ordered) - 1) // 2)
        expected = ordered[cut : len(ordered) - cut].mean(axis=0)
        np.testing.assert_allclose(result.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "share", "cut"), [(1, 0.4, 0), (2, 0.4, 0), (3, 0.1, 1), (4, 0.2, 1), (5, 0.2, 1), (10, 0.2, 2), (4, 0.49, 1)]
)
def test_what_is_left_out_is_rounded_up_and_never_everything(n: int, share: float, cut: int) -> None:
    assert trimmed_cut(n, share) == cut
    assert n - 2 * median_cut(n) in (1, 2)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_a_claim_of_many_scans_buys_no_influence(rule: str) -> None:
    update = {spec.name: torch.ones(spec.shape) for specs in LAYOUT.values() for spec in specs}
    others = [({n: k * t for n, t in update.items()}, dict.fromkeys(GROUPS, 1.0)) for k in (2.0, 3.0, 5.0)]
    modest, boastful = ((update, dict.fromkeys(GROUPS, weight)) for weight in (1.0, 1e6))
    assert equal(joined(rule, [modest, *others]), joined(rule, [boastful, *others]))


@pytest.mark.parametrize("stripe", [1, 6, 7, 100])
def test_stripes_of_any_width_give_the_same(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    some = [
        ({s.name: torch.randn(s.shape, generator=generator) for specs in LAYOUT.values() for s in specs},
         dict.fromkeys(GROUPS, 1.0))
        for _ in range(3)
    ]  # fmt: skip
    expected = joined("median", some)
    monkeypatch.setattr(robust, "_STRIPE", stripe)
    assert equal(joined("median", some), expected)


def test_weights_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(ConfigError, match="weighting=scans has no meaning under the rule median"):
        parse(StudyConfig, {"name": "a", "aggregation": {"rule": "median", "weighting": "scans"}}, where="test")


# ------------------------------------------------------------------------------------------------ norm-bounded means


@given(some=sites(least=2))
@quick
def test_norm_bounded_mean_is_the_mean_of_the_shortened_updates(some: list[Site]) -> None:
    result = joined("norm_bounded_mean", some)
    for group, specs in LAYOUT.items():
        trained = [(update, weights[group]) for update, weights in some if group in weights]
        flat = [np.concatenate([update[s.name].double().numpy().ravel() for s in specs]) for update, _ in trained]
        short = [weight * values * min(1, 2.0 / max(np.linalg.norm(values), 1e-30)) for values, (_, weight) in zip(flat, trained, strict=True)]  # fmt: skip  # noqa: E501
        if trained:
            expected = np.sum(short, axis=0) / sum(weight for _, weight in trained)
            found = np.concatenate([result[s.name].double().numpy().ravel() for s in specs])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(some=sites(least=2), lie=st.floats(-300, 300, width=32))
@quick
def test_one_site_moves_a_norm_bounded_mean_by_no_more_than_its_share_of_the_bound(
    some: list[Site], lie: float
) -> None:
    (update, weights), rest = some[0], some[1:]
    silent, loud = ({name: torch.full_like(t, value) for name, t in update.items()} for value in (0.0, lie))
    without, moved = (joined("norm_bounded_mean", [(said, weights), *rest]) for said in (silent, loud))
    for group, weight in weights.items():
        total = sum(other.get(group, 0.0) for _, other in some)
        names = [spec.name for spec in LAYOUT[group]]
        assert norm({name: moved[name] - without[name] for name in names}) <= 2.0 * weight / total + 1e-5


@given(some=sites(least=3, most=7), lie=st.sampled_from([300.0, -300.0, 0.0]))
@quick
def test_less_than_half_of_the_sites_cannot_lead_the_median_bound(some: list[Site], lie: float) -> None:
    kept = [site for site in some if "3d" in site[1]] or some
    hostile = (len(kept) - 1) // 2
    lies = [({n: torch.full_like(t, lie) for n, t in update.items()}, weights) for update, weights in kept[:hostile]]
    result = joined({"name": "norm_bounded_mean", "times_median": 1.0}, lies + kept[hostile:])
    for specs in LAYOUT.values():
        longest = max(group_norm(update, specs) for update, _ in kept[hostile:])
        assert group_norm(result, specs) <= longest * (1 + 1e-5) + 1e-9


def test_an_update_within_the_bound_is_taken_as_it_is() -> None:
    update = {spec.name: torch.full(spec.shape, 0.01) for specs in LAYOUT.values() for spec in specs}
    some: list[Site] = [(update, dict.fromkeys(GROUPS, 1.0)), (update, dict.fromkeys(GROUPS, 3.0))]
    for rule in ("norm_bounded_mean", "median_bounded"):
        assert equal(joined(rule, some), update)


# -------------------------------------------------------------------------------------- against centralised training


class Stems(nn.Module):
    """As in the network: a 3D scan passes the 2D stem too, by a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"2d": nn.Linear(5, 4), "3d": nn.Linear(15, 4)})
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 5) of images or (B, 3, 5) of volumes -> (B, 3)."""
        y = self.stem["2d"](x) if x.ndim == 2 else self.stem["3d"](x.flatten(1)) + self.stem["2d"](x[:, 1])
        found: Tensor = self.head(torch.tanh(self.shared(torch.tanh(y))))
        return found


def sgd_update(model: Stems, loss: Callable[[], Tensor], lr: float = 0.5) -> dict[str, Tensor]:
    """What one step of SGD adds to each parameter that the loss trains."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    optimiser.zero_grad()
    loss().backward()
    optimiser.step()
    update = {n: p.detach() - before[n] for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return update


@given(st.lists(st.tuples(st.sampled_from([2, 3]), st.integers(1, 9)), min_size=1, max_size=5))
@quick
def test_mean_by_scans_is_the_centralised_gradient_step(archives: list[tuple[Rank, int]]) -> None:
    """One local step of SGD on all of a site's scans: for each group, one step on the loss pooled over all scans that
    train it."""
    torch.manual_seed(len(archives))
    model, cross_entropy = Stems(), nn.CrossEntropyLoss()
    scans = [(torch.randn(count, 5) if rank == 2 else torch.randn(count, 3, 5), torch.randint(3, (count,)))
             for rank, count in archives]  # fmt: skip

    def pooled(chosen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return cross_entropy(torch.cat([model(x) for x, _ in chosen]), torch.cat([y for _, y in chosen]))  # type: ignore[no-any-return]

    some: list[Site] = []
    for (rank, count), site_scans in zip(archives, scans, strict=True):
        groups = GROUPS if rank == 3 else TWO_D
        weights = group_weights({2: 0, 3: 0, rank: count}, groups, "scans")
        some.append((sgd_update(model, lambda site_scans=site_scans: pooled([site_scans])), weights))
    layout = layout_of(model)
    study = StudyConfig(name="a", aggregation=AggregationConfig(weighting="scans"))
    with tempfile.TemporaryDirectory() as folder, opened_aggregate(study, layout, Path(folder) / "s") as aggregate:
        for update, weights in some:
            aggregate.fold(update, weights)
        result = aggregate.result()
    volumes = [chosen for chosen, (rank, _) in zip(scans, archives, strict=True) if rank == 3]
    central = sgd_update(model, lambda: pooled(scans))
    if volumes:
        central |= {n: t for n, t in sgd_update(model, lambda: pooled(volumes)).items() if group_of(n) == "3d"}
    assert result.keys() == central.keys()
    for name in central:
        torch.testing.assert_close(result[name], central[name], rtol=1e-4, atol=1e-6)
