"""What a study promises of privacy. docs/privacy.md says what each number is worth.

Two guarantees that are never mixed up. Patient-level: whoever sees everything that a site ever sent can hardly tell
whether any one patient's scans were used (`unimiss_core.private_learner`). Site-level: the same for a whole site's
archive, from the coordinator's releases on (`server.site_level`); the coordinator itself sees what a site sent.

What else a study sets, in the two modes; `contradictions` refuses what is marked so:

| setting | patient | site |
|---|---|---|
| model, plan, views, seed | each scan alone, or public; noise never draws from the seed | within a site |
| objective | couples scans by the centre alone; **its noise must be small enough** (`_centre`) | within a site |
| finetune | each scan's loss is its own, class weights are the study's; no centre | within a site |
| optimiser, schedule | public, or applied to what is noised already | within a site |
| batch | the divisor of sums; sampling is not used, `sampling_rate` is | within a site |
| local | made of what was released before | within a site |
| aggregation.rule | any: made of released updates | **mean**: noise is for a sum of clipped updates |
| aggregation.weighting | **uniform**: counts of scans are not released | **uniform**: likewise |
| aggregation.max_scans | not used | not used |
| aggregation.max_update_norm | any | **at least clip_norm**, or what was clipped is refused |
| aggregation.max_size_ratio | any | **null**: whether one site counts would hang on the others |
| aggregation.late_weight | any | **0**: a site could be in one sum twice |
| aggregation.server_optimiser | made of what was released | made of what was released |
| wire.dtype | any: rounds what is noised already | **not int8**: what it carries over is added after the clip |

Rounding to bf16 lengthens, too: in mode `site` it is what has been decoded that is clipped.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Tag

from unimiss_core.config import Config, chosen_by_name
from unimiss_core.scan import RANKS, Rank

if TYPE_CHECKING:
    from unimiss_core.study import StudyConfig

CENTRE_SHAKE = 0.25
"""Standard deviation of a centre's logits by noise, in teacher temperatures, up to which networks learn as without: at
0.27 losses fell as before, at 0.9 they stayed at log K (batch 32, centre_noise 5)."""

_NEVER_MOVES = 1 - 1e-9
"""Centre momenta above it are no way out."""

Delta = Annotated[float, Field(gt=0, lt=1e-3)]
Rate = Annotated[float, Field(ge=1e-6, le=1)]
"""Chance of a draw; below it no site has so many patients."""
Multiplier = Annotated[float, Field(ge=1e-2, le=1e3)]
"""Of noise that a study or a site file asks for. Below it epsilon is above 5,000 in one step; above it there is nothing
left to hide, and sums that tell epsilon can take minutes (docs/privacy.md, 'Accounting')."""

ClipNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
"""L2 norm. Where it is next to nothing, noise of so many clip norms rounds to nothing in float32, and gradients do
not: an optimiser's rate would bring them back."""


class NoPrivacyConfig(Config):
    """Nothing is promised beyond what docs/federation.md says of what travels."""

    mode: Literal["none"] = "none"


class SamplingRateConfig(Config):
    """Chance with which each patient takes part in a step, by the rank of the step's scans."""

    images: Rate = 0.05
    volumes: Rate = 0.05

    def of(self, rank: Rank) -> float:
        return self.images if rank == 2 else self.volumes


class PatientPrivacyConfig(Config):
    """Local DP-SGD at each site, whose unit is the patient. `batch` is what its sums are divided by: patients that a
    step of each rank is expected to hold, the same constant at every site."""

    mode: Literal["patient"] = "patient"
    delta: Delta = 1e-5
    """Below one over ten times the patients of the largest site."""
    max_epsilon: Annotated[float, Field(gt=0)]
    """What a patient may cost over the whole study, at most, at any site."""
    sampling_rate: SamplingRateConfig = SamplingRateConfig()
    scans_per_patient: Annotated[int, Field(gt=0)] = 4
    """Scans of one patient that one step looks at, drawn at random; together they are one gradient."""
    clip_norm: ClipNorm = 1.0
    """L2 norm to which a patient's gradient, over all parameters together, is shortened where it is longer (C)."""
    noise_multiplier: Multiplier
    """Standard deviation of the noise on the sum of gradients, in clip norms (s)."""
    centre_noise: Multiplier = 10.0
    """Standard deviation of the noise on the sum of the patients' mean bottlenecks, each of norm 1 at most. Not used in
    fine-tuning, which has none."""
    trained: Literal["all", "norms_and_biases", "last_stages"] = "all"
    """What is trained; the rest stays as the run began. The noise on a step is as long as the square root of their
    number says, a patient's gradient is not: from a start that was trained on public scans, few are the way.
    norms_and_biases: every bias and norm of the backbone. last_stages: those, and all of the encoder's last stage and
    the decoder's first. A task's head, which begins at random, is trained in each case."""


class SitePrivacyConfig(Config):
    """DP-FedAvg: a site's whole update is clipped, and the coordinator adds noise to the sum of all."""

    mode: Literal["site"] = "site"
    delta: Delta = 1e-5
    max_epsilon: Annotated[float, Field(gt=0)]
    """What a site may cost over the whole study."""
    clip_norm: ClipNorm
    """L2 norm to which a site's update, over all groups together, is shortened where it is longer (C)."""
    noise_multiplier: Multiplier
    """Standard deviation of the noise on the sum of the updates, in clip norms (z)."""
    sites: Annotated[int, Field(gt=0)]
    """What each round's sum is divided by, a public number; a round with fewer updates is refused, and of more all
    count."""


PrivacyConfig = Annotated[
    Annotated[NoPrivacyConfig, Tag("none")]
    | Annotated[PatientPrivacyConfig, Tag("patient")]
    | Annotated[SitePrivacyConfig, Tag("site")],
    chosen_by_name(default="none", key="mode"),
]


def contradictions(study: "StudyConfig") -> list[str]:
    """What in the study breaks the promise of its privacy mode, or makes it worthless; each with the way out."""
    privacy = study.privacy
    if privacy.mode == "patient":
        centred = RANKS if study.finetune is None else ()
        return [*_weighting(study), *(told for rank in centred for told in _centre(study, privacy, rank))]
    if privacy.mode == "site":
        return [*_weighting(study), *_sums_of_clipped_updates(study, privacy)]
    return []


def _centre(study: "StudyConfig", privacy: PatientPrivacyConfig, rank: Rank) -> Iterator[str]:
    """An EMA of momentum m of centres with noise s_f / B each has noise s_f / B sqrt((1 - m) / (1 + m)), and so has
    each logit, prototypes being unit vectors.

    Of both ranks, always: a study cannot know that no site will bring volumes.
    """
    m, noise, batch = study.objective.centre_momentum, privacy.centre_noise, study.batch.of(rank)
    kept, most = ((1 - m) / (1 + m)) ** 0.5, _most_shake(study, rank)
    if (shake := noise / batch * kept) <= most:
        return
    name = "images" if rank == 2 else "volumes"
    ways = [
        *_slower(study, privacy),
        f"batch.{name}: {math.ceil(noise * kept / most)} (now {batch}), with as many patients in a step",
        f"privacy.centre_noise: {_rounded_down(most * batch / kept):g} (now {noise:g}), which costs epsilon",
    ]
    yield (
        f"the centre of {name} drowns in noise, which then stands in every target: {shake:.3g} of it, expected at most "
        f"{most:.3g}, {CENTRE_SHAKE:g} of the teacher's temperature. One of these is enough: {'; or '.join(ways)}. "
        f"The noise is privacy.centre_noise / batch.{name} * sqrt((1 - m) / (1 + m)) = {noise:g} / {batch} * "
        f"{kept:.3g}, m being the momentum"
    )


def _slower(study: "StudyConfig", privacy: PatientPrivacyConfig) -> Iterator[str]:
    """The way out for few patients: a centre that is the mean of more steps. It does for both ranks."""
    share = min((_most_shake(study, rank) * study.batch.of(rank) / privacy.centre_noise) ** 2 for rank in RANKS)
    if (m := (1 - share) / (1 + share)) < _NEVER_MOVES:
        yield (
            f"objective.centre_momentum: {_rounded_up(m)} (now {study.objective.centre_momentum:g}), with which the "
            f"centre is the mean of some {1 / (1 - m):,.0f} steps, and costs no epsilon"
        )


def _most_shake(study: "StudyConfig", rank: Rank) -> float:
    return CENTRE_SHAKE * study.objective.teacher_temperature_of(rank)


def _rounded_up(momentum: float) -> str:
    """With as many digits as tell 1 - momentum to one figure, never below it."""
    digits = math.ceil(-math.log10(1 - momentum)) + 1
    return f"{math.ceil(momentum * 10**digits) / 10**digits:.{digits}f}"


def _rounded_down(noise: float) -> float:
    """To two figures."""
    step = 10.0 ** (math.floor(math.log10(noise)) - 1)
    return math.floor(noise / step) * step


def _weighting(study: "StudyConfig") -> Iterator[str]:
    if (weighting := study.aggregation.weighting) != "uniform":
        yield (
            f"aggregation.weighting={weighting} weighs sites by counts of scans, which are not released in mode "
            f"{study.privacy.mode}; write weighting: uniform"
        )


def _sums_of_clipped_updates(study: "StudyConfig", privacy: SitePrivacyConfig) -> Iterator[str]:
    """What makes a site count otherwise than once, clipped, in the sum that noise is added to."""
    joined = study.aggregation
    if joined.rule.name != "mean":
        yield (
            f"aggregation.rule={joined.rule.name} is moved by one site further than the noise on a sum of clipped "
            "updates covers; write rule: mean"
        )
    if joined.max_size_ratio is not None:
        yield (
            f"aggregation.max_size_ratio={joined.max_size_ratio:g} lets other sites decide whether one counts, which "
            "no noise covers; write max_size_ratio: null"
        )
    if joined.late_weight > 0:
        yield (
            f"aggregation.late_weight={joined.late_weight:g} lets a site stand twice in one round's sum, which is "
            "further than its clip_norm; write late_weight: 0.0"
        )
    if joined.max_update_norm < privacy.clip_norm:
        yield (
            f"aggregation.max_update_norm={joined.max_update_norm:g} refuses updates that privacy.clip_norm="
            f"{privacy.clip_norm:g} lets through; raise the first or lower the second"
        )
    if study.wire.dtype == "int8":
        yield (
            "wire.dtype=int8 adds what earlier updates lost by rounding to one that is clipped already; write dtype: "
            "bf16 or fp32"
        )
