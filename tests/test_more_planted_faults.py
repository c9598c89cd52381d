"""More faults planted in the engine's source, as in `tests.test_planted_faults`: those here keep the claimed size of
the noise, the claimed chance of the draws or the clip of long gradients, and break the promise all the same."""

import os
from collections.abc import Callable

import pytest
import torch

from client import patient_draws
from client.audited_engine import Engine
from client.patient_draws import PatientDraws
from client.privacy_audit import (
    a_patient_moves_a_release_by_its_bound,
    nothing_is_kept_that_is_not_noised,
    patients_are_drawn_by_chance,
    patients_do_not_touch_each_other,
)
from tests.test_patient_draws import CPU, Placed, site, with_rates
from tests.test_planted_faults import (
    CENTRE_ADDED,
    DRAWN,
    NORMAL,
    Check,
    noise_in_few_steps,
    planted,
    private_study,
    seen,
)
from unimiss_core import head, noise, private_learner, prototypes_gradient
from unimiss_core.noise import GaussianNoise

pytestmark = pytest.mark.usefixtures("shallow")

MOVED = "self._move(rank, step, grads, norms)"
TURN = "for group in grouped(patients, self._at_once):"

IN_LEARNER: list[tuple[str, str, str, Check]] = [
    (
        "clip from two clip norms on",
        "1.0 if length <= limit else",
        "1.0 if length <= 2 * limit else",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "long bottlenecks",
        CENTRE_ADDED,
        "centres[name].add_(mean)",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "length of the longest tensor",
        "torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)",
        "torch.stack([torch.linalg.vector_norm(norm) for norm in norms]).max()",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "a patient twice",
        TURN,
        f"patients = list(patients); patients += patients[:1]\n        {TURN}",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "length without the prototypes",
        "prototypes.norm_at_most() if prototypes",
        "0.0 if prototypes",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "prototypes not clipped",
        "prototypes.add_to_(sums[PROTOTYPES], scale)",
        "prototypes.add_to_(sums[PROTOTYPES], 1.0)",
        a_patient_moves_a_release_by_its_bound,
    ),
    (
        "moments by those drawn",
        MOVED,
        f"{MOVED}; [s['exp_avg_sq'].mul_(1 + 1e-3 * len(losses)) for s in self._optimiser.state.values()]",
        nothing_is_kept_that_is_not_noised,
    ),
]


IN_ROWS: list[tuple[str, str, str]] = [
    ("length of the longest row", "t = torch.linalg.vector_norm(s)", "s[1:] = 0; t = torch.linalg.vector_norm(s)"),
    ("rows not clipped", "self._products.scale_(scale)", "pass"),
    ("what is taken off not clipped", "self._along *= scale", "pass"),
    ("added twice", "total[rows] += block", "total[rows] += 2 * block"),
    ("others' replaced", "total[rows] += block", "total[rows] = block"),
]
"""Of the prototypes' gradient."""


def more(count: str) -> str:
    """As many normal values more."""
    return NORMAL.replace("len(piece)", f"len(piece) + {count}")


IN_NOISE: list[tuple[str, str, str]] = [
    ("tails cut at four", NORMAL, f"{NORMAL}.clip(-4, 4)"),
    ("half the others' opposite", NORMAL, f"(lambda x: np.r_[x[: len(x) // 2], -x][: len(x)])({NORMAL})"),
    ("neighbours alike", NORMAL, f"(lambda x: (0.5**0.5 * (x[1:] + x[:-1])).astype(dtype))({more('1')})"),
    ("values apart alike", NORMAL, f"(lambda x: (0.8 * x[37:] + 0.6 * x[:-37]).astype(dtype))({more('37')})"),
    (
        "begun again after forty draws",
        "for total in sums:",
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        "        if self.calls % 40 == 0:\n"
        "            self._generators = [secret_generator(1)]\n"
        "        for total in sums:",
    ),
]

IN_DRAWS: list[tuple[str, str, str]] = [
    (
        "two draws, again and again two steps later",
        DRAWN,
        f"(lambda new: self.__dict__.setdefault('old', []).append(new) or self.old[-1 - len(self.old) // 2 % 2 * 2 "
        f"if len(self.old) > 2 else -1])({DRAWN})",
    ),
    (
        "a period of fifty",
        DRAWN,
        f"(lambda new: self.__dict__.setdefault('old', []).append(new) or self.old[(len(self.old) - 1) % 50])({DRAWN})",
    ),
    ("one patient in every draw", DRAWN, f"({DRAWN}) | (np.arange(len(self._patients[rank])) == 8)"),
    ("one patient in no draw", DRAWN, f"({DRAWN}) & (np.arange(len(self._patients[rank])) != 8)"),
    (
        "as many pairs alike as unlike",
        DRAWN,
        "(lambda x, i: np.where(i == 1, np.roll(x, 1), np.where(i == 3, ~np.roll(x, 1), x)))"
        f"({DRAWN}, np.arange(len(self._patients[rank])) % 4)",
    ),
]

KEYS: list[tuple[str, str]] = [
    ("of 32 bits", "_entropy(4)"),
    ("of 64 bits", "_entropy(16) % 2**64"),
    ("by the clock", "__import__('time').time_ns()"),
    ("by the process", "__import__('os').getpid()"),
]
"""Of the noise."""


def hangs_on_every_bit(drawn: Callable[[], list[float]], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what is drawn follows from 16 bytes of the operating system, from each of them and from nothing else."""
    given = bytearray(16)

    def of_ours(size: int) -> bytes:
        return bytes(given[:size])

    with monkeypatch.context() as patched:
        patched.setattr(os, "urandom", of_ours)
        first, again = drawn(), drawn()
        changed = []
        for place in range(16):
            given[place] ^= 1
            changed.append(drawn())
            given[place] ^= 1
    return first == again and all(other != first for other in changed)


def noise_by(source: Callable[[torch.device], GaussianNoise]) -> list[float]:
    source(CPU).add_([total := torch.zeros(4)], 1.0)
    return total.tolist()


def drawn_by(draws: Callable[..., PatientDraws]) -> list[float]:
    patients = (
        draws(site(with_rates(0.5), {f"p{number}": 1 for number in range(8)}), Placed(0, 1), CPU).draw(0).patients
    )
    return [patient.seed for patient in patients]


@pytest.mark.parametrize(("fault", "old", "new", "check"), IN_LEARNER, ids=[fault[0] for fault in IN_LEARNER])
def test_a_fault_of_the_step_is_seen(fault: str, old: str, new: str, check: Check) -> None:
    faulty = planted(private_learner, old, new)
    assert any(seen(check, Engine(private_study(), 2, faulty.PrivateLearner))), fault


@pytest.mark.parametrize(("fault", "old", "new"), IN_ROWS, ids=[fault[0] for fault in IN_ROWS])
def test_a_fault_of_the_prototypes_rows_is_seen(
    fault: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = planted(prototypes_gradient, old, new)
    monkeypatch.setattr(head, "PrototypesGradient", faulty.PrototypesGradient)
    engine = Engine(private_study(), 2)
    checks = (a_patient_moves_a_release_by_its_bound, patients_do_not_touch_each_other)
    assert any(what for check in checks for what in seen(check, engine)), fault


@pytest.mark.parametrize(("fault", "old", "new"), IN_NOISE, ids=[fault[0] for fault in IN_NOISE])
def test_a_fault_of_the_noise_is_seen(fault: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_learner, "GaussianNoise", planted(noise, old, new).GaussianNoise)
    assert any(seen(noise_in_few_steps, Engine(private_study(), 2))), fault


@pytest.mark.parametrize(("fault", "old", "new"), IN_DRAWS, ids=[fault[0] for fault in IN_DRAWS])
def test_a_fault_of_the_draws_is_seen(fault: str, old: str, new: str) -> None:
    faulty = planted(patient_draws, old, new)
    assert any(seen(patients_are_drawn_by_chance, Engine(private_study(), 2, make_draws=faulty.PatientDraws))), fault


@pytest.mark.parametrize("fault", ["stream.jumped(0)", "np.random.Philox(key=1)"])
def test_threads_that_draw_alike_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not list(seen(noise_in_few_steps, Engine(private_study(), 2)))
    faulty = planted(noise, "stream.jumped(place)", fault)
    monkeypatch.setattr(private_learner, "GaussianNoise", faulty.GaussianNoise)
    assert any(seen(noise_in_few_steps, Engine(private_study(), 2)))


def test_noise_and_draws_hang_on_all_128_bits_of_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hangs_on_every_bit(lambda: noise_by(GaussianNoise), monkeypatch)
    assert hangs_on_every_bit(lambda: drawn_by(PatientDraws), monkeypatch)


@pytest.mark.parametrize(("fault", "key"), KEYS, ids=[fault[0] for fault in KEYS])
def test_a_key_that_can_be_guessed_is_seen(fault: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = planted(noise, "np.random.Philox(key=_entropy(16))", f"np.random.Philox(key={key})")
    assert not hangs_on_every_bit(lambda: noise_by(faulty.GaussianNoise), monkeypatch), fault


def test_a_key_of_draws_that_can_be_guessed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = planted(patient_draws, "enumerate(words.tolist())", "enumerate(words.tolist()[:2])")
    assert not hangs_on_every_bit(lambda: drawn_by(faulty.PatientDraws), monkeypatch)
