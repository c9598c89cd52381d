"""Measures of a private engine's noise and draws, each with an interval, against what is claimed.

Intervals are so wide that an engine that keeps its word falls outside once in a million audits' measures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

RARE = 1e-6
"""Chance with which a measure of an engine that keeps its word contradicts the claim."""

MOST_VALUES = 400_000
"""Values over which shape and correlation are looked at, evenly spaced among all."""

SAME = 0.02
"""Share of values that come again from which on they are not drawn in float32; of bfloat16 nearly all do."""


@dataclass(frozen=True)
class Finding:
    """One measure against its claim. low, high: its interval; an exact measure's is a point.

    bound: the claim is `at most`; otherwise the interval must hold it.
    """

    what: str
    claimed: float
    measured: float
    low: float
    high: float
    bound: bool = False

    @property
    def agrees(self) -> bool:
        """False of NaN, too."""
        return self.measured <= self.claimed if self.bound else self.low <= self.claimed <= self.high

    @property
    def off(self) -> float:
        """How far the measure is from the claim, in widths of its interval; infinite of NaN."""
        away, width = abs(self.measured - self.claimed), self.high - self.low
        return away / width if width > 0 and away < math.inf else math.inf


def at_most(what: str, claimed: float, *measured: float) -> Finding:
    """Of exact measures, of which the largest counts, or NaN where one is."""
    largest = math.nan if any(map(math.isnan, measured)) else max(measured)
    return Finding(what, float(claimed), largest, largest, largest, bound=True)


def equals(what: str, claimed: float, measured: float, rounding: float) -> Finding:
    """Of a measure that is exact but for rounding."""
    return Finding(what, claimed, measured, measured - rounding, measured + rounding)


def deviation(what: str, claimed: float, values: Sequence[Tensor], *, among: int = 1) -> Finding:
    """Root mean square of values whose mean is known to be nought, against the standard deviation `claimed`: n times
    its square is chi-square with n degrees of freedom. among: of how many such measures this may be the worst."""
    whole = torch.cat([value.flatten() for value in values]).double()
    n, z = whole.numel(), _normal(RARE / among)
    measured = whole.square().mean().sqrt().item()
    low, high = (measured / math.sqrt(chi_square_over_n(n, side)) for side in (z, -z))
    return Finding(what, claimed, measured, low, high)


def chi_square_over_n(n: int, z: float) -> float:
    """The quantile of chi-square with n degrees of freedom, over n, at which a normal value's is z.

    Wilson and Hilferty 1931, doi:10.1073/pnas.17.12.684; within 1% for n of 100 and more. Never below 0.01.
    """
    root = 1 - 2 / (9 * n) + z * math.sqrt(2 / (9 * n))
    return max(root * root * root, 0.01)


def share(what: str, claimed: float, taken: Tensor, *, among: int = 1) -> Finding:
    """Of ones among independent zeros and ones, against a chance. The interval is Chernoff's, which holds for however
    few: all chances p for which n KL(measured | p) is at most log(2 among / RARE). among: of how many such measures
    this may be the worst."""
    n, measured = taken.numel(), taken.double().mean().item()
    most = math.log(2 * among / RARE) / n
    low, high = (_furthest(measured, end, most) for end in (0.0, 1.0))
    return Finding(what, claimed, measured, low, high)


def _furthest(p: float, end: float, most: float) -> float:
    """The chance furthest from p, towards `end`, whose divergence from p is at most `most`."""
    near, far = p, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if _divergence(p, middle) <= most else (near, middle)
    return far


def _divergence(p: float, q: float) -> float:
    """KL(p | q) of two chances, q above 0 and below 1."""
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def dispersion(what: str, counts: Tensor, tosses: int, chance: float) -> Finding:
    """Variance of counts over that of a binomial distribution of so many tosses: 1 where those who are counted come
    independently. The interval is a chi-square's, wider by what binomial counts have in excess of a normal kurtosis,
    and by a quarter more."""
    variance = tosses * chance * (1 - chance)
    excess = max(0.0, 1 / variance - 6 / tosses)
    n, z = len(counts), 1.25 * math.sqrt(1 + excess / 2) * _normal(RARE)
    measured = counts.double().var().item() / variance
    low, high = (measured / chi_square_over_n(n - 1, side) for side in (z, -z))
    return Finding(what, 1.0, measured, low, high)


def normality(what: str, values: Tensor) -> Finding:
    """Kolmogorov's and Smirnov's largest distance between the distribution of values and a normal one of their own
    standard deviation; the bound is that of a distribution known beforehand, which is wider."""
    some = _spaced(values).double()
    n = some.numel()
    ranked = torch.special.ndtr(some.sort().values / some.square().mean().sqrt())
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return at_most(
        what,
        math.sqrt(-math.log(RARE / 2) / (2 * n)),
        (ranked - steps[:-1]).max().item(),
        (steps[1:] - ranked).max().item(),
    )


def furthest(what: str, values: Sequence[Tensor]) -> Finding:
    """The largest of independent normal values, in their own standard deviation, against the median of what it may be:
    noise that is cut off somewhere tells all of whoever moves a sum past that place."""
    n = sum(map(torch.numel, values))
    length = math.hypot(*(torch.linalg.vector_norm(row, dtype=torch.float64).item() for row in values))
    measured = max(row.abs().max().item() for row in values) / (length / math.sqrt(n)) if length > 0 else math.nan
    low, claimed, high = (_largest_of(n, chance) for chance in (RARE / 2, 0.5, 1 - RARE / 2))
    return Finding(what, claimed, measured, measured - (high - claimed), measured + (claimed - low))


def _largest_of(n: int, chance: float) -> float:
    """What n independent standard normal values all stay below, in absolute value, with this chance."""
    return _normal(-math.expm1(math.log(chance) / n))


def echo(what: str, values: Tensor) -> Finding:
    """The largest correlation of a row of independent values with itself, moved by any number of places up to half its
    length. Products of normal values have long tails, which matter only in rows of a few hundred."""
    some = values[:MOST_VALUES].double()
    n = len(some)
    spectrum = torch.fft.rfft(some, 2 * n)
    moved = torch.fft.irfft(spectrum * spectrum.conj(), 2 * n)[: n // 2 + 1]
    return at_most(what, _normal(RARE / (n // 2)) / math.sqrt(n), (moved[1:].abs().max() / moved[0]).item())


def repetition(what: str, values: Tensor) -> Finding:
    """Share of values that came before, with either sign."""
    some = _spaced(values).abs()
    return at_most(what, SAME, 1 - some.unique().numel() / some.numel())


def likeness(what: str, rows: Tensor) -> Finding:
    """rows (R, n), two at least: the largest correlation between any two."""
    some, pairs = _spaced(rows), len(rows) * (len(rows) - 1) / 2
    largest = (torch.corrcoef(some.double()) - torch.eye(len(rows))).abs().max().item()
    return at_most(what, _normal(RARE / pairs) / math.sqrt(some.shape[1]), largest)


def _spaced(values: Tensor) -> Tensor:
    """(..., n) -> (..., MOST_VALUES at most): of more, a share that grows with their number comes again by chance."""
    return values[..., :: -(-values.shape[-1] // MOST_VALUES) or 1]


def _normal(chance: float) -> float:
    """What the absolute value of a standard normal value exceeds with this chance."""
    return -NormalDist().inv_cdf(chance / 2)
