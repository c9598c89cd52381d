"""Site-level rounds: how far one site can move what is released, how much noise is on it, and what hangs on nobody."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.accounting import check_study, epsilon
from server.aggregation import norm
from server.coordinator_config import CoordinatorConfig
from server.global_state import GlobalState
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.site_level import SiteLevelMean, check_site_level, public_retention, what_it_is_worth
from tests.federation import (
    StubSite,
    good_answer,
    metric_rows,
    random_tensors,
    reply_with,
    small_study,
    stub_app,
    whole_layout,
)
from unimiss_core import checkpoint, codec, progress
from unimiss_core.codec import Layout, TensorSpec
from unimiss_core.errors import ConfigError, RoundError, WireError
from unimiss_core.groups import GROUPS, Group
from unimiss_core.noise import GaussianNoise
from unimiss_core.privacy import Mechanism
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.schedule import teacher_momentum
from unimiss_core.study import StudyConfig
from unimiss_core.wire import TrainReply, TrainRequest

LAYOUT: Layout = {
    "shared": (TensorSpec("backbone.a", (30, 20)), TensorSpec("backbone.b", (7,))),
    "2d": (TensorSpec("backbone.e.2d.w", (500,)),),
    "3d": (TensorSpec("backbone.e.3d.w", (20, 30)),),
    "head": (TensorSpec("head.w", (400,)),),
}
TWO_D: tuple[Group, ...] = ("shared", "2d", "head")
C, Z, N = 0.7, 2.0, 3
PROMISE = SitePrivacyConfig(max_epsilon=50.0, clip_norm=C, noise_multiplier=Z, sites=N)

Site = tuple[Mapping[str, Tensor], tuple[Group, ...]]
"""An update and the groups that it was trained on."""


class Overheard:
    """No noise: keeps the sums that it was to be added to, in float64, and its deviation."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.deviations: set[float] = set()

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        self.sums += [total.clone() for total in sums]
        self.deviations.add(deviation)


Kind = type[SiteLevelMean]


def site(seed: int, groups: tuple[Group, ...] = GROUPS, length: float = 5.0) -> Site:
    tensors = random_tensors({group: LAYOUT[group] for group in groups}, seed)
    return {name: tensor * (length / norm(tensors)) for name, tensor in tensors.items()}, groups


def summed(sites: Sequence[Site], kind: Kind = SiteLevelMean) -> Tensor:
    """What noise is added to, all values end to end."""
    overheard = Overheard()
    mean = kind(LAYOUT, PROMISE, overheard)
    for update, groups in sites:
        mean.fold(update, dict.fromkeys(groups, 1.0))
    mean.result()
    return torch.cat(overheard.sums)


def released(sites: Sequence[Site], kind: Kind = SiteLevelMean) -> dict[str, Tensor]:
    mean = kind(LAYOUT, PROMISE, GaussianNoise(torch.device("cpu")))
    for update, groups in sites:
        mean.fold(update, dict.fromkeys(groups, 1.0))
    return mean.result()


# ------------------------------------------------------------------------------------ how far one site moves the sum


def reach(kind: Kind, groups: tuple[Group, ...] = GROUPS) -> float:
    """How far the longest update of one site moves the sum of a round, over that of a site with nothing to say."""
    others = [site(1), site(2, TWO_D, 0.3)]
    nothing = ({spec.name: torch.zeros(spec.shape) for group in groups for spec in LAYOUT[group]}, groups)
    return float((summed([*others, site(3, groups, 1e3)], kind) - summed([*others, nothing], kind)).norm())


@pytest.mark.parametrize("groups", [GROUPS, TWO_D, ("3d",), ("head",)], ids="-".join)
def test_no_site_moves_the_sum_by_more_than_the_clip_norm(groups: tuple[Group, ...]) -> None:
    assert 0.999 * C < reach(SiteLevelMean, groups) <= C


@given(
    st.lists(st.tuples(st.sampled_from([TWO_D, GROUPS]), st.floats(-12, 12)), min_size=1, max_size=5),
    st.tuples(st.sampled_from([TWO_D, GROUPS, ("3d",)]), st.floats(-12, 12)),
)
@settings(max_examples=40, deadline=None)
def test_whatever_lengths_and_groups_there_are(
    others: list[tuple[tuple[Group, ...], float]], one: tuple[tuple[Group, ...], float]
) -> None:
    before = [site(seed, groups, 10.0**exponent) for seed, (groups, exponent) in enumerate(others)]
    after = [*before, site(99, one[0], 10.0 ** one[1])]
    assert float((summed(after) - summed(before)).norm()) <= C


def test_what_decoding_lengthened_is_shortened() -> None:
    """C long when it was sent; every value lies just above the middle of two that bf16 has."""
    between = 1 + 2**-8 + 2**-12
    sent = {spec.name: torch.full(spec.shape, between) for specs in LAYOUT.values() for spec in specs}
    values = sum(tensor.numel() for tensor in sent.values())
    privacy = PROMISE.model_copy(update={"clip_norm": between * math.sqrt(values)})
    assert norm(sent) <= privacy.clip_norm * (1 + 1e-12)
    decoded: dict[str, Tensor] = {}
    for specs in LAYOUT.values():
        decoded |= codec.view(codec.pack(sent, specs, "bf16"), specs, "bf16")
    assert norm(decoded) > 1.003 * privacy.clip_norm
    overheard = Overheard()
    mean = SiteLevelMean(LAYOUT, privacy, overheard)
    mean.fold(decoded, dict.fromkeys(GROUPS, 1.0))
    mean.result()
    assert 0.999 * privacy.clip_norm < float(torch.cat(overheard.sums).norm()) <= privacy.clip_norm


def test_what_is_short_enough_counts_as_it_is() -> None:
    update, groups = site(5, length=0.5 * C)
    flat = torch.cat([update[spec.name].flatten() for specs in LAYOUT.values() for spec in specs])
    torch.testing.assert_close(summed([(update, groups)]), flat.double(), rtol=0, atol=1e-12)


@given(st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_sites_does_not_matter(order: list[int]) -> None:
    sites = [site(0, TWO_D), site(1, TWO_D, 1e-6), site(2, GROUPS, 0.4), site(3, GROUPS, 80.0)]
    assert torch.equal(summed([sites[i] for i in order]), summed(sites))


# -------------------------------------------------------------------------------------------------- how much noise


def deviations(kind: Kind) -> dict[Group, float]:
    """Of what is released in each group, where two sites without volumes reply, over what it is to be; 1 where right.

    From 500 values or more, 20 times: within 1% at one standard deviation.
    """
    sites = [site(1, TWO_D), site(2, TWO_D, 0.3)]
    clean = dict(zip(specs_by_name(), summed(sites).split([s.size for s in specs_by_name().values()]), strict=True))
    found: dict[Group, list[Tensor]] = {group: [] for group in GROUPS}
    for _ in range(20):
        seen = released(sites, kind)
        for group, specs in LAYOUT.items():
            found[group] += [seen[spec.name].flatten() - clean[spec.name] / N for spec in specs]
    return {group: float(torch.cat(parts).square().mean().sqrt()) / (Z * C / N) for group, parts in found.items()}


def specs_by_name() -> dict[str, TensorSpec]:
    return {spec.name: spec for specs in LAYOUT.values() for spec in specs}


def test_noise_of_the_claimed_size_is_on_every_group() -> None:
    """Also on that of volumes, which no site has."""
    assert deviations(SiteLevelMean) == pytest.approx(dict.fromkeys(GROUPS, 1.0), rel=0.05)


def test_every_draw_is_new() -> None:
    first, second = released([]), released([])
    assert all((first[name] != second[name]).all() for name in first)
    values = torch.cat([tensor.flatten() for tensor in first.values()])
    assert len(values.unique()) > 0.99 * len(values)


# ----------------------------------------------------------------------------------------------------- planted faults


class ClippedPerGroup(SiteLevelMean):
    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        for group, weight in weights.items():
            super().fold(update, {group: weight})


class NoiseForTheMean(SiteLevelMean):
    """Scaled as if it were added after the sum was divided."""

    def __init__(self, layout: Layout, privacy: SitePrivacyConfig, noise: GaussianNoise | Overheard) -> None:
        too_little = privacy.noise_multiplier / privacy.sites
        super().__init__(layout, privacy.model_copy(update={"noise_multiplier": too_little}), noise)


class NoiseWhereTrained(SiteLevelMean):
    def result(self) -> dict[str, Tensor]:
        return {name: t if name in self._came else torch.zeros_like(t) for name, t in super().result().items()}


class DividedByReplies(SiteLevelMean):
    replies = 0

    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        self.replies += 1
        super().fold(update, weights)

    def result(self) -> dict[str, Tensor]:
        return {name: t * (N / self.replies) for name, t in super().result().items()}


def test_planted_faults_are_seen() -> None:
    """Each by the figure that the tests above hold to."""
    assert reach(ClippedPerGroup) > 1.9 * C
    assert deviations(NoiseForTheMean)["shared"] == pytest.approx(1 / N, rel=0.05)
    assert deviations(NoiseWhereTrained)["3d"] == 0.0
    assert deviations(DividedByReplies)["head"] == pytest.approx(N / 2, rel=0.05)


# ------------------------------------------------------------------------------------------------- over a federation


def site_study(rounds: int = 1, *, sites: int = 2, **changes: object) -> StudyConfig:
    promise = {"mode": "site", "max_epsilon": 50.0, "noise_multiplier": Z, "clip_norm": C, "sites": sites}
    fits = {"aggregation": {"max_size_ratio": None}, "wire": {"dtype": "fp32"}}
    return small_study(rounds, **{"privacy": promise, **fits, **changes})


def config_for(out: Path, least: int, **changes: object) -> CoordinatorConfig:
    settings = {"study": Path("unused"), "out": out, "min_sites": least, "min_replies": least, "wait_s": 0.1}
    return CoordinatorConfig.model_validate(
        {**settings, "retry_s": 0.0, "round_tries": 2, "identity": "simulated", **changes}
    )


def federate(out: Path, study: StudyConfig, sites: Sequence[StubSite], *, resume: bool = False) -> GlobalState:
    assert isinstance(study.privacy, SitePrivacyConfig)
    nodes = {site.name: {"name": site.name} for site in sites}
    with LocalGrid(stub_app({site.name: site for site in sites}), nodes, run_config={}) as grid:
        return Federation(grid, study, config_for(out, study.privacy.sites)).run(resume=resume)


def xray(name: str, answer: Callable[[TrainRequest, StubSite], TrainReply] | None = None) -> StubSite:
    return StubSite(name, {2: 10}, answer)


def step_of(out: Path, state: GlobalState) -> dict[str, Tensor]:
    """What the first round added."""
    start = checkpoint.load(out / "checkpoints" / "round-0000").student
    return {name: state.student[name].double() - start[name].double() for name in start}


def test_a_round_is_the_formula_with_more_sites_than_it_is_divided_by(tmp_path: Path) -> None:
    """Three count in a sum that is divided by two; noise is on the whole model, 3D tensors included."""
    sites, study = [xray("a"), xray("b"), xray("c")], site_study(sites=2)
    seen = step_of(tmp_path, federate(tmp_path, study, sites))
    expected = {name: torch.zeros_like(tensor) for name, tensor in seen.items()}
    for stub in sites:
        update = good_answer(stub.requests[0], stub).update
        for name, tensor in update.items():
            expected[name] += tensor.double() * min(1.0, C / norm(update)) / 2
    for group, specs in whole_layout().items():
        noise = torch.cat([(seen[spec.name] - expected[spec.name]).flatten() for spec in specs])
        assert float(noise.std()) == pytest.approx(Z * C / 2, rel=0.05), group
        assert abs(float(noise.mean())) < 5 * Z * C / 2 / math.sqrt(len(noise)), group


def test_with_fewer_replies_nothing_is_released(
    tmp_path: Path,
) -> None:
    """All tries, before and after the coordinator was started again, asked with what was released before."""
    silent = True

    def fails_at_first(request: TrainRequest, stub: StubSite) -> TrainReply:
        if silent:
            raise WireError("failed", "")
        return good_answer(request, stub)

    study, sites = site_study(2, sites=2), [xray("a"), xray("b", fails_at_first)]
    with pytest.raises(RoundError, match=r"round 1 could not be completed: 1 of at least 2 updates count \(.*b: "):
        federate(tmp_path, study, sites)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["round-0000"]
    assert metric_rows(tmp_path) == []
    silent = False
    assert federate(tmp_path, study, sites, resume=True).round == 2
    first, *again = [request.student for stub in sites for request in stub.requests if request.round == 1]
    assert len(again) > 1
    assert all(torch.equal(student[name], first[name]) for student in again for name in first)


def test_a_sum_that_was_taken_before_a_crash_reached_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator dies with the noised step in hand; the round is then done again with other noise, and sites were
    asked for it with the same student both times."""
    study, sites = site_study(sites=2), [xray("a"), xray("b")]
    lost: list[Mapping[str, Tensor]] = []

    class Killed(BaseException):
        pass

    save = GlobalState.save

    def die_in_round_1(self: GlobalState, *rest: object, **named: object) -> None:
        if self.round == 1:
            lost.append(self.student)
            raise Killed
        save(self, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(GlobalState, "save", die_in_round_1)
    with pytest.raises(Killed):
        federate(tmp_path, study, sites)
    monkeypatch.undo()
    state = federate(tmp_path, study, sites, resume=True)
    assert all((state.student[name] != lost[0][name]).float().mean() > 0.99 for name in lost[0])
    for stub in sites:
        before, again = stub.requests
        assert all(torch.equal(before.student[name], again.student[name]) for name in before.student)


def test_what_sites_and_checkpoints_are_told_hangs_on_no_site(tmp_path: Path) -> None:
    """The teacher's retention is that of all of the round's steps whoever has volumes, and no size of an update stands
    in a checkpoint."""
    study = site_study(sites=2)
    states = [
        federate(tmp_path / "images", study, [xray("a"), xray("b")]),
        federate(tmp_path / "volumes", study, [xray("a"), StubSite("b", {2: 3, 3: 6})]),
    ]
    kept = math.prod(teacher_momentum(study, step) for step in range(study.schedule.local_steps))
    assert states[0].retention == states[1].retention == dict.fromkeys(GROUPS, kept)
    book = json.loads((tmp_path / "volumes" / "checkpoints" / "round-0001" / "server.json").read_text())
    assert book["attendance"]["sizes"] == {}
    assert book["retention"] == dict.fromkeys(GROUPS, kept)


def test_the_schedule_alone_says_what_is_left_of_the_teacher() -> None:
    study = site_study(3, sites=2, schedule={"rounds": 3, "local_steps": 4, "alternate": [3, 1]})
    kept = math.prod(teacher_momentum(study, step) for step in range(4, 8))
    assert public_retention(study, 2) == pytest.approx(dict.fromkeys(GROUPS, kept))


def test_a_huge_update_is_shortened_and_not_refused(tmp_path: Path) -> None:
    """All that is seen of a round of 155 long updates is noise."""

    def huge(request: TrainRequest, stub: StubSite) -> TrainReply:
        return reply_with({n: 0.1 * t for n, t in random_tensors(stub.layout, 1).items()}, request, stub)

    federate(tmp_path, site_study(sites=2), [xray("a", huge), xray("b")])
    (row,) = metric_rows(tmp_path)
    assert {name: line["status"] for name, line in row["sites"].items()} == {"a": "ok", "b": "ok"}
    values = sum(spec.size for specs in whole_layout().values() for spec in specs)
    moved = math.sqrt(sum(norm**2 for norm in row["global"]["update_norm"].values()))
    assert moved == pytest.approx(Z * C / 2 * math.sqrt(values), rel=0.01)


# ------------------------------------------------------------------------------------------------ before it is begun


def test_a_quorum_below_the_divisor_is_refused_and_the_way_out_leads_out(tmp_path: Path) -> None:
    study = site_study(sites=5)
    told = r"simulation file says quorum\.min_replies=4; write quorum\.min_sites: 6 and quorum\.min_replies: 5"
    with pytest.raises(ConfigError, match=told):
        check_site_level(study, config_for(tmp_path, 4, min_sites=6, written_by="unimiss-simulate"))
    check_site_level(study, config_for(tmp_path, 5, min_sites=6))
    check_site_level(small_study(), config_for(tmp_path, 1))


def test_a_promise_that_the_noise_does_not_keep_is_refused_and_the_way_out_leads_out(tmp_path: Path) -> None:
    promise = {"mode": "site", "max_epsilon": 8.0, "noise_multiplier": 4.0, "clip_norm": 1.0, "sites": 5}
    study = site_study(100, privacy=promise)
    told = r"epsilon 13\.2 at delta 1e-05 after 100 rounds, above privacy\.max_epsilon=8\. .*noise_multiplier: 6\.07 w"
    with pytest.raises(ConfigError, match=told):
        check_site_level(study, config_for(tmp_path, 5))
    enough = site_study(100, privacy={**promise, "noise_multiplier": 6.07})
    check_site_level(enough, config_for(tmp_path, 5))
    check_study(enough)  # as sites do, by another accountant
    with pytest.raises(ConfigError, match="an epsilon above 100, which promises nothing, at delta"):
        check_site_level(site_study(100, privacy={**promise, "noise_multiplier": 0.1}), config_for(tmp_path, 5))


def test_a_federation_is_refused_before_it_writes(tmp_path: Path) -> None:
    with LocalGrid(stub_app({}), {}, run_config={}) as grid, pytest.raises(ConfigError, match=r"privacy\.sites=2"):
        Federation(grid, site_study(sites=2), config_for(tmp_path / "out", 1))
    assert not (tmp_path / "out").exists()


def test_fewer_than_a_thousand_sites_are_warned_of_once_with_what_it_is_worth(tmp_path: Path) -> None:
    heard: list[progress.Event] = []
    with progress.listen(heard.append):
        federate(tmp_path, site_study(2, sites=2), [xray("a"), xray("b")])
    values = sum(spec.size for specs in whole_layout().values() for spec in specs)
    (told, whose) = [event.text for event in heard if isinstance(event, progress.Note)]
    assert whose.startswith("identity: simulated: all sites are taken to be the operator's own")
    assert f"{2.0 * math.sqrt(values) / 2:,.1f} times as long as the longest mean update" in told
    assert f"= 2 x sqrt({values:,}) / 2" in told
    spent = [row["global"]["site_epsilon"] for row in metric_rows(tmp_path)]
    assert spent == pytest.approx([epsilon([Mechanism(Z, 1.0, rounds)], 1e-5) for rounds in (1, 2)], rel=0.005)


@pytest.mark.parametrize(("sites", "warned"), [(999, True), (1000, False)])
def test_from_a_thousand_sites_on_nobody_is_warned(sites: int, warned: bool) -> None:
    assert (what_it_is_worth(site_study(sites=sites), whole_layout()) is not None) == warned
    assert what_it_is_worth(small_study(), whole_layout()) is None
