"""Faults planted in the engine's source, each of which the auditor must see: what it does not see, nobody would.

A fault is a piece of source put in another's place. Where the engine is rewritten and the piece is gone, the test says
so, and the fault is to be planted anew.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from client import patient_draws, privacy_audit
from client.audited_engine import Engine
from client.findings import Finding
from client.privacy_audit import (
    a_patient_moves_a_release_by_its_bound,
    check_engine,
    noise_is_as_claimed,
    nothing_is_kept_that_is_not_noised,
    one_process_adds_the_noise,
    patients_are_drawn_by_chance,
    patients_do_not_touch_each_other,
)
from tests.test_private_learner import study
from unimiss_core import noise, patient_gradients, privacy, private_learner
from unimiss_core.privacy_config import SamplingRateConfig
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

pytestmark = pytest.mark.usefixtures("shallow")

Check = Callable[[Engine], Iterator[Finding]]

noise_in_few_steps = partial(noise_is_as_claimed, releases=2)

DEVIATION = "privacy.noise_multiplier * privacy.clip_norm"
NOISED = f"self.noise.add_(list(sums.values()), {DEVIATION})"
CENTRE_NOISED = "self.noise.add_(list(centres.values()), privacy.centre_noise)"
FED = "parameter.grad = sums[name].div_(expected)"
CLIPPED = "torch._foreach_add_(added, list(gradients.values()), alpha=scale)"
CENTRE_ADDED = "centres[name].add_(mean, alpha=_scale(lengths[name], 1.0))"
DRAWN = "self._generator.random(len(self._patients[rank])) < self._privacy.sampling_rate.of(rank)"
NORMAL = "generator.standard_normal(len(piece), dtype=dtype)"

IN_LEARNER: list[tuple[str, str, str, Check]] = [
    ("noise halved", DEVIATION, f"0.5 * {DEVIATION}", noise_in_few_steps),
    ("noise divided twice", DEVIATION, f"{DEVIATION} / expected", noise_in_few_steps),
    ("noise of another unit", DEVIATION, "privacy.noise_multiplier", noise_in_few_steps),
    ("no noise", NOISED, "pass", noise_in_few_steps),
    ("no noise on nobody", "if self.team.place == 0:", "if self.team.place == 0 and losses:", noise_in_few_steps),
    ("less noise for few", DEVIATION, f"{DEVIATION} * max(1, len(losses)) / expected", noise_in_few_steps),
    *(
        (
            f"group {group} without noise",
            "list(sums.values()), privacy",
            f"[total for name, total in sums.items() if group_of(name) != '{group}'], privacy",
            noise_in_few_steps,
        )
        for group in ("shared", "2d", "head")
    ),
    (
        "one tensor without noise",
        "list(sums.values()), privacy",
        "list(sums.values())[1:], privacy",
        noise_in_few_steps,
    ),
    ("centre without noise", CENTRE_NOISED, "pass", noise_in_few_steps),
    ("centre of another unit", CENTRE_NOISED, CENTRE_NOISED.replace("e)", "e * expected)"), noise_in_few_steps),
    ("noise for each process", "if self.team.place == 0:", "if True:", one_process_adds_the_noise),
    (
        "clip per image",
        "grouped(patients, self._at_once)",
        "grouped((scan for views in patients for scan in views.split(1)), self._at_once)",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "clip per tensor",
        CLIPPED,
        "[a.add_(g, alpha=_scale(_length([g]), self._privacy.clip_norm)) for a, g in zip(added, gradients.values())]",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "no clip",
        CLIPPED,
        CLIPPED.replace("alpha=scale", "alpha=1.0"),
        a_patient_moves_a_release_by_its_bound,
    ),
    ("clip a little wide", "limit / length", "1.001 * limit / length", a_patient_moves_a_release_by_its_bound),
    (
        "clip of the sum",
        NOISED,
        f"{NOISED}; torch._foreach_mul_(list(sums.values()), _scale(_length(sums.values()), privacy.clip_norm))",
        noise_in_few_steps,
    ),
    (
        "a patient of NaN is let in",
        "if not all(map(math.isfinite, (",
        "if not all(map(bool, (",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "bottlenecks summed over scans",
        CENTRE_ADDED,
        "centres[name].add_(mean, alpha=2)",
        a_patient_moves_a_release_by_its_bound,
    ),
    ("divisor of those drawn", FED, FED.replace("expected", "max(1, len(losses))"), patients_do_not_touch_each_other),
    (
        "sums in half precision",
        NOISED,
        f"[total.copy_(total.half()) for total in sums.values()]; {NOISED}",
        patients_do_not_touch_each_other,
    ),
    (
        "sums in bfloat16",
        CLIPPED,
        f"{CLIPPED}; [total.copy_(total.bfloat16()) for total in sums.values()]",
        patients_do_not_touch_each_other,
    ),
    (
        "centre of the same draw",
        CENTRE_ADDED,
        f"{CENTRE_ADDED}; self.centre[name] = move_centre(self.centre[name], mean, 0.99)",
        patients_do_not_touch_each_other,
    ),
    (
        "gradients scaled by the batch's mean length",
        NOISED,
        f"torch._foreach_div_(list(sums.values()), 1 + 1e-3 * len(losses)); {NOISED}",
        patients_do_not_touch_each_other,
    ),
    (
        "AdamW fed without noise",
        "list(sums.values()), privacy",
        "[total.clone() for total in sums.values()], privacy",
        noise_in_few_steps,
    ),
    (
        "weight decay by those drawn",
        "self._move(rank, step, grads, norms)",
        "parameters[0].data.mul_(1 - 1e-6 * len(losses)); self._move(rank, step, grads, norms)",
        nothing_is_kept_that_is_not_noised,
    ),
    (
        "clean centre kept for later",
        CENTRE_NOISED,
        "self.clean = {n: t.clone() for n, t in centres.items()} | getattr(self, 'clean', {}); "
        f"{CENTRE_NOISED}; [t.add_(self.clean[n], alpha=1e-3) for n, t in centres.items()]",
        nothing_is_kept_that_is_not_noised,
    ),
    (
        "a step only where somebody is drawn",
        "self._move(rank, step, grads, norms)",
        "self._move(rank, step, grads, norms) if losses else None",
        nothing_is_kept_that_is_not_noised,
    ),
    (
        "learning rate by the loss",
        "self._move(rank, step, grads, norms)",
        "self._move(rank, step + len(losses), grads, norms)",
        nothing_is_kept_that_is_not_noised,
    ),
]

IN_NOISE: list[tuple[str, str, str, Check]] = [
    ("one key for all", "np.random.Philox(key=_entropy(16))", "np.random.Philox(key=0)", noise_in_few_steps),
    (
        "numpy's global generator",
        f"torch.from_numpy({NORMAL})",
        "torch.from_numpy(np.random.standard_normal(len(piece)).astype(dtype))",
        noise_in_few_steps,
    ),
    (
        "begun again each step",
        "for total in sums:",
        "self._generators = [secret_generator(1)]\n        for total in sums:",
        noise_in_few_steps,
    ),
    (
        "begun again each piece",
        "piece.add_(",
        "generator = secret_generator(int(secret_generator().integers(2)))\n        piece.add_(",
        noise_in_few_steps,
    ),
    (
        "noise in bfloat16",
        "_normal_like(piece, generator), ",
        "_normal_like(piece, generator).bfloat16().to(piece.dtype), ",
        noise_in_few_steps,
    ),
    (
        "noise that is not normal",
        NORMAL,
        "(12**0.5 * (generator.random(len(piece), dtype=dtype) - 0.5)).astype(dtype)",
        noise_in_few_steps,
    ),
]

ROWS = '{name: gradients[f"student.{name}"][place] for name in names}'

TOGETHER: list[tuple[str, str, str, Check]] = [
    ("another's gradient", ROWS, ROWS.replace("[place]", "[0]"), patients_do_not_touch_each_other),
    ("the mean of all", ROWS, ROWS.replace("[place]", ".mean(0)"), patients_do_not_touch_each_other),
    ("another's bottleneck", "rows[place] for field", "rows[0] for field", patients_do_not_touch_each_other),
    (
        "a tensor that together alone is left out",
        ROWS,
        ROWS.replace("in names}", "in [*names][1:]}"),
        patients_do_not_touch_each_other,
    ),
]
"""Of patients that are worked out together."""

IN_DRAWS: list[tuple[str, str, str]] = [
    ("everybody", DRAWN, DRAWN.replace("self._privacy.sampling_rate.of(rank)", "1.0")),
    ("the other rank's rate", "sampling_rate.of(rank)", "sampling_rate.of(5 - rank)"),
    ("always as many", DRAWN, "self._generator.permutation(len(self._patients[rank])) < 50"),
    ("scans as patients", "found[scan.patient].append(scan)", "found[scan.key].append(scan)"),
    ("by the public seed", "secret_generator(_shared_key(team, device))", "secret_generator(site.study.seed)"),
    ("one draw for all steps", DRAWN, DRAWN.replace("self._generator", "secret_generator(9)")),
    ("all scans of a patient", "min(len(scans), self._privacy.scans_per_patient)", "len(scans)"),
    ("a scan twice", "replace=False", "replace=True"),
    (
        "a new draw shares half of the last",
        DRAWN,
        f"({DRAWN}) | getattr(self, 'last', False); self.last = taking_part & (np.arange(len(taking_part)) % 4 > 1)",
    ),
]


def planted(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """`module` with one piece of its source replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} no longer has exactly one {old!r}: plant the fault anew"
    made = types.ModuleType(module.__name__)
    made.__dict__["np"] = np
    exec(compile(source.replace(old, new), f"<{module.__name__} with a fault>", "exec"), made.__dict__)
    return made


def seen(check: Check, engine: Engine) -> Iterator[str]:
    """What contradicts the claim, as it is found."""
    return (finding.what for finding in check(engine) if not finding.agrees)


def private_study() -> StudyConfig:
    """With images and volumes drawn unlike often."""
    rates = SamplingRateConfig(images=0.5, volumes=0.25)
    return study().model_copy(update={"privacy": study().privacy.model_copy(update={"sampling_rate": rates})})


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_engine_as_it_is_agrees_with_its_study(rank: Rank, at_once: int) -> None:
    engine = Engine(private_study(), rank, patients_at_once=at_once)
    assert not list(seen(partial(check_engine, releases=2), engine))


@pytest.mark.parametrize(("fault", "old", "new", "check"), IN_LEARNER, ids=[fault[0] for fault in IN_LEARNER])
def test_a_fault_of_the_step_is_seen(fault: str, old: str, new: str, check: Check) -> None:
    faulty = planted(private_learner, old, new)
    assert any(seen(check, Engine(private_study(), 2, faulty.PrivateLearner))), fault


@pytest.mark.parametrize(("fault", "old", "new", "check"), TOGETHER, ids=[fault[0] for fault in TOGETHER])
def test_a_fault_of_patients_together_is_seen(
    fault: str, old: str, new: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = planted(patient_gradients, old, new)
    monkeypatch.setattr(private_learner, "gradients_of_each", faulty.gradients_of_each)
    assert any(seen(check, Engine(private_study(), 2, patients_at_once=3))), fault


@pytest.mark.parametrize(("fault", "old", "new", "check"), IN_NOISE, ids=[fault[0] for fault in IN_NOISE])
def test_a_fault_of_the_noise_is_seen(
    fault: str, old: str, new: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_learner, "GaussianNoise", planted(noise, old, new).GaussianNoise)
    assert any(seen(check, Engine(private_study(), 2))), fault


@pytest.mark.parametrize(("fault", "old", "new"), IN_DRAWS, ids=[fault[0] for fault in IN_DRAWS])
def test_a_fault_of_the_draws_is_seen(fault: str, old: str, new: str) -> None:
    faulty = planted(patient_draws, old, new)
    assert any(seen(patients_are_drawn_by_chance, Engine(private_study(), 2, make_draws=faulty.PatientDraws))), fault


def test_group_3d_without_noise_is_seen() -> None:
    spared = "[total for name, total in sums.items() if group_of(name) != '3d'], privacy"
    faulty = planted(private_learner, "list(sums.values()), privacy", spared)
    assert "noise of group 3d" in seen(noise_in_few_steps, Engine(private_study(), 3, faulty.PrivateLearner))


def test_a_ledger_that_charges_too_little_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = planted(privacy, "gradient**-2 + representations * centre**-2", "gradient**-2")
    monkeypatch.setattr(privacy_audit, "mechanisms", faulty.mechanisms)
    assert "multiplier of all together, which the ledger charges" in seen(
        noise_in_few_steps, Engine(private_study(), 3)
    )
