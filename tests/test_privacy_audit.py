"""The auditor's own figures against others' formulas, its bound on epsilon, its attack, and the command."""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from client import audit_command, privacy_audit
from client.audited_engine import Engine, Silence
from client.findings import (
    _largest_of,
    at_most,
    chi_square_over_n,
    deviation,
    echo,
    furthest,
    likeness,
    normality,
    repetition,
    share,
)
from client.membership import auc_below
from client.one_run import best_guess, canaries_for, chance_of_guesses, epsilon_from_below, one_run
from client.pictures import write_png
from client.privacy_audit import noise_is_as_claimed
from client.research_command import main
from tests.federation import small_study
from unimiss_core import checkpoint
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError
from unimiss_core.network import build_network, tensors_of
from unimiss_core.noise import Noise
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.study import StudyConfig

CHECKS = (
    "noise_is_as_claimed",
    "one_process_adds_the_noise",
    "a_patient_moves_a_release_by_its_bound",
    "patients_do_not_touch_each_other",
    "nothing_is_kept_that_is_not_noised",
    "patients_are_drawn_by_chance",
)


def private_study(noise: float = 4.0) -> StudyConfig:
    privacy = {
        "mode": "patient",
        "max_epsilon": 50.0,
        "noise_multiplier": noise,
        "centre_noise": 10.0,
        "sampling_rate": {"images": 0.5, "volumes": 0.5},
    }
    fits = {"batch": {"images": 80, "volumes": 80}, "objective": {"centre_momentum": 0.99}}
    return small_study(50, **{"privacy": privacy, **fits})


def without_noise(study: StudyConfig, *, noise: Noise | None = None, **settings: object) -> PrivateLearner:
    return PrivateLearner(study, noise=noise or Silence(), **settings)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- findings


@pytest.mark.parametrize("n", [100, 1000, 10**6])
@pytest.mark.parametrize("z", [-4.9, 0.0, 4.9])
def test_quantiles_of_chi_square_are_scipys(n: int, z: float) -> None:
    expected = scipy.stats.chi2.ppf(scipy.stats.norm.cdf(z), n) / n
    assert chi_square_over_n(n, z) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("ones", [0, 1, 3, 150, 300])
def test_the_interval_of_a_share_holds_the_exact_one_and_is_little_wider(ones: int) -> None:
    taken = torch.tensor([1.0] * ones + [0.0] * (300 - ones))
    exact = scipy.stats.binomtest(ones, 300).proportion_ci(1 - 1e-6, method="exact")
    found = share("", 0.5, taken)
    assert found.low <= exact.low
    assert exact.high <= found.high
    assert found.high - found.low < 1.2 * (exact.high - exact.low)


def test_a_deviation_agrees_with_its_own_size_and_no_other() -> None:
    values = [2.0 * normal(10_000, seed=seed) for seed in range(4)]
    assert [deviation("", claimed, values).agrees for claimed in (1.9, 2.0, 2.1)] == [False, True, False]


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_what_is_not_a_number_agrees_with_nothing(nothing: float) -> None:
    assert not at_most("", 1.0, 0.0, nothing).agrees
    assert not deviation("", 1.0, [torch.full((10,), nothing)]).agrees
    assert not normality("", torch.full((10,), nothing)).agrees


def test_noise_is_told_from_what_only_has_its_size() -> None:
    values = normal(100_000)
    uniform = math.sqrt(12) * (torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert [normality("", each).agrees for each in (values, uniform)] == [True, False]
    assert [repetition("", each).agrees for each in (values, values.bfloat16().float())] == [True, False]
    assert [repetition("", torch.cat([values, sign * normal(100_000)])).agrees for sign in (1, -1)] == [False, False]
    assert repetition("", normal(799_999)).measured < 0.007  # of all of them 0.011 come again
    assert [furthest("", [each, each]).agrees for each in (values, values.clamp(-3.5, 3.5))] == [True, False]
    again = torch.stack([values, normal(100_000, seed=1), 0.05 * values + normal(100_000, seed=2)])
    assert [likeness("", rows).agrees for rows in (again[:2], again)] == [True, False]


@pytest.mark.parametrize("n", [10, 10**6, 10**11])
@pytest.mark.parametrize("chance", [5e-7, 0.5, 1 - 5e-7])
def test_the_furthest_of_normal_values_lies_where_their_distribution_says(n: int, chance: float) -> None:
    assert n * scipy.stats.halfnorm.logcdf(_largest_of(n, chance)) == pytest.approx(math.log(chance), rel=1e-6)


def test_an_echo_is_the_largest_of_the_plain_sums_of_products() -> None:
    values = normal(600)
    plain = np.correlate(values.double().numpy(), values.double().numpy(), "full")[599:]
    assert echo("", values).measured == pytest.approx(np.abs(plain[1:301]).max() / plain[0])
    wide = normal(100_000)
    for apart in (1, 777, 30_000):
        assert not echo("", wide[:-apart] + 0.1 * wide[apart:]).agrees
    assert echo("", wide).agrees


# -------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(
    ("guesses", "correct", "epsilon"), [(10, 9, 0.0), (100, 80, 0.5), (500, 400, 1.3), (7, 0, 1.0)]
)
def test_without_delta_the_chance_is_a_binomials_tail(guesses: int, correct: int, epsilon: float) -> None:
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    expected = scipy.stats.binom.sf(correct - 1, guesses, right)
    assert chance_of_guesses(1000, guesses, correct, epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


def test_delta_adds_the_worst_share_of_what_falls_short() -> None:
    m, guesses, correct, epsilon, delta = 100, 30, 25, 1.0, 1e-3
    right = 1 / (1 + math.exp(-epsilon))
    short = [
        sum(scipy.stats.binom.pmf(k, guesses, right) for k in range(correct - i, correct)) / i
        for i in range(1, correct + 1)
    ]
    expected = scipy.stats.binom.sf(correct - 1, guesses, right) + 2 * m * delta * max(short)
    assert chance_of_guesses(m, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_the_bound_of_guesses_that_are_all_right_is_known() -> None:
    """P[W >= r] = (e^x / (1 + e^x))^r = 0.05."""
    right = 0.05 ** (1 / 100)
    assert epsilon_from_below(100, 100, 100, 0.0, 0.05) == pytest.approx(math.log(right / (1 - right)), rel=1e-6)
    assert epsilon_from_below(100, 100, 50, 0.0, 0.05) == 0.0
    assert epsilon_from_below(100, 100, 100, 1e-3, 0.05) < epsilon_from_below(100, 100, 100, 0.0, 0.05)


def test_the_bound_is_above_the_true_epsilon_in_one_run_of_twenty_at_most() -> None:
    """Of randomised response, which lets as many guesses be right as any engine may."""
    epsilon, above, runs = 1.0, 0, 100
    generator = torch.Generator().manual_seed(0)
    for _ in range(runs):
        joined = torch.rand(200, generator=generator) < 0.5
        told = torch.where(torch.rand(200, generator=generator) < 1 / (1 + math.exp(-epsilon)), joined, ~joined)
        scores = told + 1e-3 * torch.rand(200, generator=generator)
        above += best_guess(scores, joined, 0.0)[2] > epsilon
    assert above <= scipy.stats.binom.ppf(0.999, runs, 0.05)


@pytest.mark.usefixtures("shallow")
def test_one_run_stays_below_the_claim_and_without_noise_above() -> None:
    study, audit = private_study(8.0), partial(one_run, canaries=80, steps=4)
    good, bad = audit(Engine(study, 2)), audit(Engine(study, 2, without_noise))
    assert good.claimed == bad.claimed < 1
    assert good.finding().agrees
    assert not bad.finding().agrees


def test_more_canaries_than_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--canaries 1000000: .* give [0-9]+ at most"):
        canaries_for(Engine(private_study(), 2), 10**6)


# -------------------------------------------------------------------------------------------------------- membership


def test_the_auc_is_mann_whitneys_with_ties_counted_half() -> None:
    members, others = normal(40).round(decimals=1), normal(30, seed=1).round(decimals=1) + 0.3
    expected = scipy.stats.mannwhitneyu(others, members).statistic / (40 * 30)
    assert auc_below(members, others)[0] == pytest.approx(expected)


def test_the_interval_of_the_auc_holds_it_in_19_of_20_cases() -> None:
    """Of normal losses that are half a deviation apart: the true chance is Phi(0.5 / sqrt(2))."""
    true, held = scipy.stats.norm.cdf(0.5 / math.sqrt(2)), 0
    for seed in range(400):
        _, (low, high) = auc_below(normal(40, seed=2 * seed), 0.5 + normal(60, seed=2 * seed + 1))
        held += low <= true <= high
    assert 0.91 <= held / 400 <= 0.98


def site_file(folder: Path, name: str, pictures: Sequence[np.ndarray], *, owned: bool = False) -> str:
    """owned: whether the file vouches that each picture is of another patient."""
    (folder / name).mkdir()
    for number, pixels in enumerate(pictures):
        write_png(folder / name / f"{number}.png", pixels)
    path = folder / f"{name}.yaml"
    source = f"{{folder: {name}, file_is_patient: {str(owned).lower()}}}"
    path.write_text(f"name: {name}\ndata: [{source}]\nstate: state-{name}\ndevices: cpu\nworkers: 1\n")
    return str(path)


def finished_run(folder: Path, study: StudyConfig) -> str:
    student, teacher = (tensors_of(build_network(study.model, seed=seed)) for seed in (1, 2))
    checkpoint.save(
        folder / "run" / "checkpoints" / checkpoint.folder_name(1),
        origin="federation",
        round=1,
        study_digest=study.digest(),
        model=study.model,
        plan=study.plan,
        student=student,
        teacher=teacher,
    )
    (folder / "run" / "study.yaml").write_text(dump_yaml(study))
    return str(folder / "run")


def some_pictures(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (41, 35)).astype(np.uint8) for _ in range(count)]


@pytest.mark.usefixtures("shallow")
def test_a_private_run_is_attacked_over_patients_who_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its study had scans read; a guess would make a patient of every file."""
    run, pictures = finished_run(tmp_path, private_study()), some_pictures(12)
    owned = [site_file(tmp_path, name, pictures[n::2], owned=True) for n, name in enumerate(("members", "others"))]
    guessed = site_file(tmp_path, "guessed", pictures)
    assert main(["audit-privacy", "--run", run, "--members", owned[0], "--others", owned[1], "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "6 members, 6 others" in said.out
    assert [line for line in said.err.splitlines() if line] == [
        "reading the scans of the members",
        "reading the scans of the others",
        "losses of 12 scans",
    ]
    assert main(["audit-privacy", "--run", run, "--members", owned[0], "--others", guessed]) == 2
    assert "nothing says whose these files are: 12 of 'data.0'" in capsys.readouterr().err


@pytest.mark.usefixtures("shallow")
def test_a_run_is_attacked_by_patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pictures = finished_run(tmp_path, small_study()), some_pictures(17)
    members, others, few = (
        site_file(tmp_path, name, part)
        for name, part in (("members", pictures[:8]), ("others", pictures[8:14]), ("few", pictures[14:]))
    )
    assert main(["audit-privacy", "--run", run, "--members", members, "--others", others, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "8 members, 6 others" in said
    found = re.search(r"chance ([0-9.]+) \(95%: ([0-9.]+) to ([0-9.]+)", said)
    assert found is not None
    auc, low, high = map(float, found.groups())
    assert low <= auc <= high
    assert main(["audit-privacy", "--run", run, "--members", members, "--others", few]) == 2
    assert "3 patients on one side; give 5 or more" in capsys.readouterr().err
    assert main(["audit-privacy", "--run", str(tmp_path), "--members", members, "--others", few]) == 2


# -------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("optimiser", ["adamw", "noise_aware_adamw", "momentum_sgd"])
def test_noise_is_measured_where_few_parameters_are_trained_by_any_optimiser(optimiser: str) -> None:
    """No tensor of theirs has a thousand values."""
    raw = private_study().model_dump(mode="json")
    raw["privacy"]["trained"], raw["optimiser"] = "norms_and_biases", {"name": optimiser, "warmup_steps": 1}
    study = parse(StudyConfig, raw, where="test")
    found = list(noise_is_as_claimed(Engine(study, 2), releases=2))
    assert [each.what for each in found if not each.agrees] == []
    broken = Engine(study, 2, make_learner=without_noise)
    assert not all(each.agrees for each in noise_is_as_claimed(broken, releases=2))


def test_a_study_is_audited_and_a_broken_engine_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyConfig, "ranks", (2,))
    monkeypatch.setattr(audit_command, "check_engine", lambda engine: list(noise_is_as_claimed(engine, releases=2)))
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(private_study()))
    arguments = ["audit-privacy", "--study", str(path), "--canaries", "20", "--steps", "2"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "no measure contradicts the claim" in said
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    noise = {row[0]: row for row in rows if row[0].startswith("noise of group")}
    assert noise.keys() == {"noise of group 2d", "noise of group head", "noise of group shared"}
    assert all(float(row[2]) == pytest.approx(4.0, rel=0.01) for row in noise.values())
    monkeypatch.setattr(audit_command, "Engine", partial(Engine, make_learner=without_noise))
    assert main(arguments) == 7
    said = capsys.readouterr()
    assert "CONTRADICTS" in said.out
    assert "measures that contradict what the study claims" in said.err


def test_each_stage_is_told_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first table comes after half of all the time that an audit takes."""
    monkeypatch.setattr(StudyConfig, "ranks", (2,))
    for check in CHECKS:
        monkeypatch.setattr(privacy_audit, check, lambda *_, **__: iter(()))
    (tmp_path / "study.yaml").write_text(dump_yaml(private_study()))
    assert main(["audit-privacy", "--study", str(tmp_path / "study.yaml"), "--canaries", "20", "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert [line.split(" measures:")[0] for line in said.err.splitlines()] == [
        *(f"images, {number} of 6" for number in range(1, 7)),
        "images: what 2 steps tell of 20 canaries",
    ]
    assert "measures:" not in said.out  # figures alone, for whoever keeps them


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "give either --study, or --run, --members and --others"),
        ("--study x.yaml --run out", "give either --study"),
        ("--run out --members a.yaml", "give either --study"),
    ],
)
def test_what_makes_no_sense_is_told(options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit-privacy", *options.split()]) == 2
    assert told in capsys.readouterr().err


def test_a_study_without_an_engine_to_audit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: toy\n")
    assert main(["audit-privacy", "--study", str(path)]) == 2
    assert "privacy mode is none" in capsys.readouterr().err
    path.write_text(dump_yaml(private_study()))
