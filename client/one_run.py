"""A lower bound on epsilon from one run of the private engine, after Steinke, Nasr and Jagielski 2023
(arXiv:2305.08846).

Each of m canaries joins the site by the toss of a fair coin; then the engine trains, drawing patients as ever. Whoever
sees every release guesses of some canaries whether they joined and leaves the rest. No (epsilon, delta)-private
engine lets many guesses be right, so many right guesses tell of a larger epsilon. The bound is from below: that it is
far under the claim proves nothing, and it finds fewer faults than `client.privacy_audit` does; above the claim, the
claim is false.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.audited_engine import Engine, Watched
from client.cache import Library
from client.canaries import BROKEN, CanaryObjective, CanarySite, canary_scans, canary_site, largest_of_groups
from client.findings import Finding, at_most
from unimiss_core.errors import ConfigError
from unimiss_core.noise import secret_generator
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.team import Alone

SIGNIFICANCE = 0.05
"""Chance with which the bound exceeds the true epsilon."""

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Of the canaries, on how many is guessed; the best counts, and SIGNIFICANCE is shared among them."""

SCANS = 2
"""Of each canary."""

CANARIES = 500
"""Where the model has room for as many."""


@dataclass(frozen=True)
class OneRun:
    """guesses, correct: of the share of canaries that tells most. claimed: epsilon of this run's own steps, infinite
    where there is no telling it."""

    steps: int
    canaries: int
    guesses: int
    correct: int
    lower_bound: float
    claimed: float

    def finding(self) -> Finding:
        return at_most(f"epsilon of {self.steps} steps, from below, at 95%", self.claimed, self.lower_bound)


def canaries_for(engine: Engine, asked: int | None) -> int:
    """How many an audit of the engine takes: as many as are asked for; of None CANARIES, or all that have room, which
    is one value of the largest tensor of each group for each.

    Raises ConfigError: more are asked for.
    """
    learner = engine.learner()
    room = min(BROKEN, *(learner.student.get_parameter(name).numel() for name in _tensors(engine, learner)))
    if asked is not None and asked > room:
        raise ConfigError(
            f"--canaries {asked}: the model has no room for so many; give {room} at most, or leave it out"
        )
    return asked or min(CANARIES, room)


def one_run(engine: Engine, *, canaries: int, steps: int) -> OneRun:
    """Audit `steps` steps of the engine at the study's own sampling rate. canaries: by `canaries_for`."""
    joined = torch.from_numpy(secret_generator().random(canaries) < 0.5)
    scores = _scores(engine, joined, steps)
    guesses, correct, bound = best_guess(scores, joined, engine.privacy.delta)
    return OneRun(steps, canaries, guesses, correct, bound, _claimed(engine, steps))


def best_guess(scores: Tensor, joined: Tensor, delta: float) -> tuple[int, int, float]:
    """(guesses, of them correct, lower bound on epsilon) of whoever guesses that those of the highest scores joined,
    and those of the lowest did not; scores and joined (m,). Of the numbers of guesses by SHARES the one that gives the
    highest bound: significance is shared among them, so that it may be chosen by what it gives."""
    m, order = len(scores), scores.argsort()
    found = []
    for share in SHARES:
        half = max(1, int(share * m / 2))
        correct = int(joined[order[-half:]].sum() + (~joined[order[:half]]).sum())
        bound = epsilon_from_below(m, 2 * half, correct, delta, SIGNIFICANCE / len(SHARES))
        found.append((2 * half, correct, bound))
    return max(found, key=lambda each: each[2])


def epsilon_from_below(m: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest epsilon at which so many correct guesses come by a chance of at most `significance`; 0 if none."""
    if chance_of_guesses(m, guesses, correct, 0.0, delta) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while high < 100 and chance_of_guesses(m, guesses, correct, high, delta) <= significance:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        fits = chance_of_guesses(m, guesses, correct, middle, delta) <= significance
        low, high = (middle, high) if fits else (low, middle)
    return low


def chance_of_guesses(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """At most this is the chance that an (epsilon, delta)-private engine lets `correct` or more of `guesses` be right
    on m canaries: theorem 5.2 of arXiv:2305.08846.

    With W binomial of `guesses` tosses that fall right with chance e^epsilon / (1 + e^epsilon) it is
    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, v being `correct`; the second term is what delta lets through.
    """
    k = torch.arange(guesses + 1, dtype=torch.float64)
    n = torch.tensor(float(guesses), dtype=torch.float64)
    rest = math.log1p(math.exp(-epsilon))
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    exactly = (ways - k * rest - (n - k) * (epsilon + rest)).exp()
    beyond = exactly[correct:].sum().item()
    below = exactly[:correct].flip(0).cumsum(0) / k[1 : correct + 1]
    largest = below.max().item() if correct else 0.0
    return min(1.0, beyond + 2 * m * delta * largest)


def _scores(engine: Engine, joined: Tensor, steps: int) -> Tensor:
    """(m,): of each canary, the sum over releases of the inner product with its own clipped gradient."""
    learner = engine.learner()
    tensors = _tensors(engine, learner)
    learner.objective = CanaryObjective(learner.objective, tensors, engine.privacy.clip_norm)
    watched = Watched(learner, engine.rank, engine.step)
    draws = engine.make_draws(_site(engine, joined), Alone(), learner.device)
    scores = torch.zeros(len(joined))
    for _ in range(steps):
        release = watched.release(list(draws.draw(engine.step).views()))
        scores += sum(release.gradients[name].flatten()[: len(joined)] for name in tensors) / math.sqrt(len(tensors))
    return scores


def _tensors(engine: Engine, learner: PrivateLearner) -> list[str]:
    """In which canaries' gradients are."""
    return largest_of_groups(learner.trained_names(engine.rank, engine.step), dict(learner.student.named_parameters()))


def _site(engine: Engine, joined: Tensor) -> CanarySite:
    numbers: Sequence[int] = joined.nonzero().flatten().tolist()
    scans = [scan for number in numbers for scan in canary_scans(engine.study, number, SCANS, engine.rank)]
    return canary_site(engine.study, Library(tuple(scans), {}))


def _claimed(engine: Engine, steps: int) -> float:
    from client.accounting import epsilon  # here, for it takes seconds

    (charged,) = mechanisms(engine.study, {engine.rank}, [1])
    try:
        return epsilon([Mechanism(charged.noise_multiplier, charged.sampling_rate, steps)], engine.privacy.delta)
    except ConfigError:
        return math.inf
