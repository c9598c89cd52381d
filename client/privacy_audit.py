"""An audit of the private engine: what it really releases, measured against what its study claims.

Statistical: the noise of every tensor and of the centre - its size, its shape, that no two draws of it are alike - and
how often patients are drawn.

Exact: each patient alone moves a release by one clip norm at most, and a release of several patients is the sum of
those of each, so that leaving one out moves it no further, whatever the others do; and where noise is replaced by
known values, a learner ends in the same state bit for bit whoever was drawn: nothing that is not noised is kept.

Together they bear on an engine's promise, not on a list of faults. They are of this engine on the CPU; what a round
sends besides is held by the tests of its message.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from client.audited_engine import Engine, OneOf, Overwriting, Release, Silence
from client.cache import Library
from client.canaries import BROKEN, audited, canary_scans, canary_site, canary_views
from client.findings import (
    Finding,
    at_most,
    deviation,
    dispersion,
    echo,
    equals,
    furthest,
    likeness,
    normality,
    repetition,
    share,
)
from client.patient_draws import PatientDraw
from unimiss_core import progress
from unimiss_core.groups import group_of
from unimiss_core.privacy import mechanisms
from unimiss_core.scan import Rank
from unimiss_core.students import shape_of_views
from unimiss_core.team import Alone

ROUNDING = 2e-5
"""Share of the clip norm by which sums in float32 may differ; in bfloat16 and float16 they err by 100 times as much."""

MARGIN = 2e-4
"""Share by which a gradient may be shorter than the clip norm that it was shortened to, for its length is a bound
(`unimiss_core.prototypes_gradient`)."""

LOUD = 1e6
"""Clip norms by which an objective is made so loud that all gradients are clipped."""

LENGTHS = (0.5, 1.2, 5.0)
"""Of canaries' gradients, in clip norms: what is longer than one is shortened, however little, and no other is."""

CALLS, VALUES = 500, 40
"""Draws of noise by each of two learners, of so many values each, in which none may come again."""

RELEASES = 4
"""Steps of each of two learners that noise is measured over."""

DRAWS, PATIENTS = 200, 100
"""Draws in each of two attempts that sampling is measured over, of a site with so many patients."""

KINDS: Mapping[Rank, str] = {2: "images", 3: "volumes"}

LEAST_VARIANCE = 0.1
"""Of the number drawn, below which too few are drawn to measure it by."""


def check_engine(engine: Engine, *, releases: int = RELEASES) -> list[Finding]:
    """Every measure of the engine; what does not agree contradicts its study. Says what it measures, as it goes on.

    Raises ValueError: the study is not in this mode.
    """
    checks: Mapping[str, Callable[[Engine], Iterator[Finding]]] = {
        "size and shape of the noise": partial(noise_is_as_claimed, releases=releases),
        "which process adds it": one_process_adds_the_noise,
        "how far one patient moves a release": a_patient_moves_a_release_by_its_bound,
        "what patients make of each other's releases": patients_do_not_touch_each_other,
        "what is kept beside the releases": nothing_is_kept_that_is_not_noised,
        "how patients are drawn": patients_are_drawn_by_chance,
    }
    found: list[Finding] = []
    for number, (what, check) in enumerate(checks.items(), start=1):
        progress.report(progress.Note(f"{KINDS[engine.rank]}, {number} of {len(checks)} measures: {what}"))
        found += check(engine)
    return found


def noise_is_as_claimed(engine: Engine, releases: int = RELEASES) -> Iterator[Finding]:
    """Of empty draws and of draws of canaries, of two learners: size by group, in the tensor that is furthest off and
    in the centre, and what the ledger makes of them; shape; and that nothing is drawn twice."""
    draw = [canary_views(number, 1, engine.rank) for number in range(3)]
    signal = engine.watched(noise=Silence()).release(draw)
    found = []
    for _ in range(2):
        with _seeds_that_are_public():
            watched = engine.watched()
            for _ in range(releases // 2):
                found += [watched.release([]), watched.release(draw) - signal]
    yield from _sizes(engine, found)
    yield normality("noise: distance from a normal distribution", found[0].gradient())
    yield furthest("noise: furthest value, in standard deviations", [each.gradient() for each in found])
    yield repetition("noise: share of values that come again", found[0].gradient())
    yield echo("noise: correlation of values apart", found[0].gradient())
    yield repetition("noise: share of values that come again in many steps", _noise_of_many_steps(engine))
    yield likeness("noise: correlation of steps and attempts", torch.stack([each.gradient() for each in found]))
    if found[0].centres:
        centres = torch.stack([each.centre() for each in found])
        yield likeness("centre's noise: correlation of steps and attempts", centres)
    beginnings = _beginnings(found[0].gradients.values())
    if len(beginnings) > 1:  # of a linear probe there is the head's weight, and a few biases
        yield likeness("noise: correlation of tensors", beginnings)


def _noise_of_many_steps(engine: Engine) -> Tensor:
    """(2 * CALLS * VALUES,) as two learners' steps would draw it one after the other."""
    with _seeds_that_are_public():
        sources = [engine.learner().noise for _ in range(2)]
    found = torch.zeros(2, CALLS, VALUES)
    for source, rows in zip(sources, found, strict=True):
        for row in rows:
            source.add_([row], 1.0)
    return found.flatten()


def _beginnings(tensors: Collection[Tensor]) -> Tensor:
    """(R, n): the first n values of each tensor that has as many; 1000, or half the longest where few are trained."""
    n = min(1000, max(values.numel() for values in tensors) // 2)
    return torch.stack([values.flatten()[:n] for values in tensors if values.numel() >= n])


def one_process_adds_the_noise(engine: Engine) -> Iterator[Finding]:
    """Of a team of two, whose sums add up: the first adds all of it, and the second none."""
    first, second = (engine.watched(team=OneOf(place, 2)).release([]) for place in range(2))
    yield deviation("noise of a team's first process", engine.privacy.noise_multiplier, [first.gradient()])
    length, centres = second.lengths()
    yield at_most("noise of a team's second process", 0.0, length, *centres)


def a_patient_moves_a_release_by_its_bound(engine: Engine) -> Iterator[Finding]:
    """Canaries of one scan and of as many as there may be, far above the clip norm, and one whose loss is NaN; canaries
    about as long as the clip norm, whose bottlenecks are longer than any network's; and patients of noise, by the
    study's own objective, which brings the prototypes' gradient in the form that it has in training."""
    silent = engine.watched(noise=Silence())
    for scans in sorted({1, engine.privacy.scans_per_patient}):
        length, centres = silent.release([canary_views(scans, scans, engine.rank)]).lengths()
        yield equals(f"gradient of a canary with scans: {scans}, in clip norms", 1.0, length, ROUNDING)
        yield from _bottlenecks(f"a canary with scans: {scans}", centres)
    length, centres = silent.release([canary_views(BROKEN, 1, engine.rank)]).lengths()
    yield at_most("what a patient of NaN releases", ROUNDING, length, *centres)
    for claimed in LENGTHS:
        length, centres = engine.watched(noise=Silence(), length=claimed, reach=3.0).release(_one(engine)).lengths()
        yield equals(f"gradient of a canary {claimed:g} clip norms long", min(1.0, claimed), length, ROUNDING)
    yield from _bottlenecks("a canary that is 3 long", centres)
    loud = engine.watched_on_scans(noise=Silence(), gain=LOUD * engine.privacy.clip_norm)
    lengths = [loud.release([patient]).lengths()[0] for patient in _unlike(engine)]
    yield equals("gradient of a patient of noise, the shortest, in clip norms", 1.0, min(lengths), MARGIN)
    yield at_most("gradient of a patient of noise, the longest, in clip norms", 1 + ROUNDING, *lengths)


def patients_do_not_touch_each_other(engine: Engine) -> Iterator[Finding]:
    """A draw's release, less that of each patient alone, is nothing; all begin in one state, whose centre is full."""
    for name, running, patients in (
        ("canaries", engine.watched(noise=Silence()), _canaries(engine)),
        ("unlike patients", engine.watched_on_scans(noise=Silence()), _unlike(engine)),
    ):
        running.release(patients)
        begun, found = running.state(), []
        for draw in (patients, *([patient] for patient in patients), []):
            running.restore(begun)
            found.append(running.release(draw))
        rest, *alone, nobody = found
        for each in alone:
            rest = rest - each
        lengths, centres = zip(*(each.lengths() for each in alone), strict=True)
        yield at_most(f"gradient of any of {name}, in clip norms", 1 + ROUNDING, *lengths)
        yield from _bottlenecks(f"any of {name}", [length for one in centres for length in one])
        yield at_most(f"release of nobody, after {name}", ROUNDING, *_all(nobody))
        yield at_most(f"what {name} make of each other's releases", len(patients) * ROUNDING, *_all(rest))


def nothing_is_kept_that_is_not_noised(engine: Engine) -> Iterator[Finding]:
    """Where noise takes the place of the sums, three steps on patients and three on nobody end alike, bit for bit."""
    patients, ends = _canaries(engine), []
    for there in (1, 0):
        watched = engine.watched(noise=Overwriting())
        for number in (len(patients), 0, 1):
            watched.release(patients[: there * number])
        tensors = watched.state().tensors
        ends.append({name: tensor for name, tensor in tensors.items() if not name.startswith("watch.")})
    drawn, nobody = ends
    differing = set(drawn.keys() ^ nobody.keys())
    differing |= {name for name in drawn.keys() & nobody.keys() if not torch.equal(drawn[name], nobody[name])}
    yield at_most("tensors that tell who was drawn, beside the release", 0.0, len(differing))


def patients_are_drawn_by_chance(engine: Engine) -> Iterator[Finding]:
    """Of patients with one scan and with more than a step takes: how often they are drawn, each once and as one, and
    that neither the next step nor the next attempt repeats it."""
    most, q = engine.privacy.scans_per_patient, engine.privacy.sampling_rate.of(engine.rank)
    draws = _draws(engine, PATIENTS)
    yield at_most("scans of a patient in one step", most, 0, *(len(p.scans) for draw in draws for p in draw.patients))
    yield at_most("patients who stand in a draw twice, or two in one", 0, sum(map(_misplaced, draws)))
    taken = torch.stack([_taken(draw, PATIENTS) for draw in draws])
    yield share("chance of a patient with one scan", q, taken[:, 0::2])
    yield share("chance of a patient with many scans", q, taken[:, 1::2])
    if PATIENTS * q * (1 - q) > LEAST_VARIANCE:
        yield dispersion("variance of the number drawn, in a binomial's", taken.sum(1), PATIENTS, q)
    yield _worst([share("chance of a patient, of the one furthest off", q, t, among=PATIENTS) for t in taken.T])
    yield _of_pairs(taken, q)
    yield _worst(
        [
            share("chance of a patient to be in two steps, some steps apart", q * q, both, among=DRAWS - 1)
            for both in (_in_both(taken, apart) for apart in range(1, DRAWS))
        ]
    )
    yield share("chance of a patient to be in a step of both attempts", q * q, taken[:DRAWS] * taken[DRAWS:])


# ------------------------------------------------------------------------------------------------------------ pieces


def _sizes(engine: Engine, found: Sequence[Release]) -> Iterator[Finding]:
    s, s_f = engine.privacy.noise_multiplier, engine.privacy.centre_noise
    groups = [release.groups() for release in found]
    gradients = [deviation(f"noise of group {name}", s, [each[name] for each in groups]) for name in groups[0]]
    yield from gradients
    names = found[0].gradients.keys()
    tensors = [
        deviation(
            f"noise of one tensor, of group {group_of(name)}", s, [r.gradients[name] for r in found], among=len(names)
        )
        for name in names
    ]
    yield max(tensors, key=lambda each: each.off)
    centres = [
        deviation(f"noise of the centre of {name}", s_f, [each.centres[name] for each in found])
        for name in found[0].centres
    ]
    yield from centres
    (claimed,) = mechanisms(engine.study, {engine.rank}, [1])
    together = [min(gradients, key=lambda each: each.measured), *centres]
    measured, low, high = (
        sum(noise**-2 for noise in noises) ** -0.5 if min(noises) > 0 else 0.0
        for noises in zip(*((each.measured, each.low, each.high) for each in together), strict=True)
    )
    yield Finding("multiplier of all together, which the ledger charges", claimed.noise_multiplier, measured, low, high)


def _canaries(engine: Engine) -> list[Tensor]:
    """Three, with one scan to as many as there may be."""
    most = engine.privacy.scans_per_patient
    counts = (1, min(2, most), most)
    return [canary_views(number, count, engine.rank) for number, count in enumerate(counts)]


def _one(engine: Engine) -> list[Tensor]:
    return [canary_views(1, 1, engine.rank)]


def _unlike(engine: Engine) -> list[Tensor]:
    """Three patients of noise, one of them far from the others; where scans bring labels, of some class each."""
    generator = torch.Generator().manual_seed(0)
    shapes, one = ((1, 1.0), (2, 1.0), (1, 50.0)), shape_of_views(audited(engine.study), engine.rank)
    patients = [scale * torch.randn((scans, *one), generator=generator) for scans, scale in shapes]
    for views in patients if engine.study.finetune else ():
        views[:, :, -1] = (views[:, :, -1] > 0).float()
        views[:, 0, -1].view(len(views), -1)[:, 0] = 1.0  # or a whole scan might be of no class, and have no loss
    return patients


def _bottlenecks(whose: str, lengths: Sequence[float]) -> Iterator[Finding]:
    """None where there is no centre."""
    if lengths:
        yield at_most(f"bottleneck of {whose}", 1 + ROUNDING, *lengths)


def _all(release: Release) -> list[float]:
    length, centres = release.lengths()
    return [length, *centres]


def _draws(engine: Engine, patients: int) -> list[PatientDraw]:
    """Of two attempts, one after the other. Every second patient has more scans than a step takes, the others one."""
    more = 2 * engine.privacy.scans_per_patient + 1
    scans = [
        scan
        for number in range(patients)
        for scan in canary_scans(engine.study, number, more if number % 2 else 1, engine.rank)
    ]
    site = canary_site(engine.study, Library(tuple(scans), {}))
    found = []
    for _ in range(2):
        with _seeds_that_are_public():
            draws = engine.make_draws(site, Alone(), torch.device("cpu"))
            found += [draws.draw(engine.step) for _ in range(DRAWS)]
    return found


def _worst(found: Sequence[Finding]) -> Finding:
    return max(found, key=lambda each: (not each.agrees, each.off))


def _in_both(taken: Tensor, apart: int) -> Tensor:
    """Of two steps of one attempt: 1 for each patient who takes part in both."""
    first, second = taken.split(DRAWS)
    return torch.cat([attempt[:-apart] * attempt[apart:] for attempt in (first, second)])


def _of_pairs(taken: Tensor, q: float) -> Finding:
    """How often two patients take part together, of the pair furthest off."""
    i, j = torch.triu_indices(taken.shape[1], taken.shape[1], offset=1)
    together = taken.T @ taken / len(taken)
    of_pairs = together[i, j]
    ends = [int(place) for place in (of_pairs.argmin(), of_pairs.argmax())]
    both = [taken[:, i[place]] * taken[:, j[place]] for place in ends]
    return _worst(
        [share("chance of two patients together, of the pair furthest off", q * q, t, among=len(i)) for t in both]
    )


def _misplaced(draw: PatientDraw) -> int:
    """Patients who stand in a draw again, entries of two patients, and scans that stand in an entry twice."""
    entries = [(scan.key, scan.patient) for patient in draw.patients for scan in patient.scans]
    names = [{scan.patient for scan in patient.scans} for patient in draw.patients]
    again = sum(map(len, names)) - len(set().union(*names))
    return again + sum(len(each) != 1 for each in names) + len(entries) - len(set(entries))


def _taken(draw: PatientDraw, patients: int) -> Tensor:
    """(patients,): 1 for each who takes part."""
    numbers = sorted({int(scan.patient) for patient in draw.patients for scan in patient.scans})
    return torch.zeros(patients).index_fill_(0, torch.tensor(numbers, dtype=torch.long), 1.0)


@contextmanager
def _seeds_that_are_public() -> Iterator[None]:
    """Begin with the same global random state each time: noise and draws must not hang on it."""
    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)
