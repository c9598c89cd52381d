"""Site-level privacy, which the coordinator keeps: DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963) with all sites in
every round.

With the study's clip_norm C, noise_multiplier z and n = privacy.sites, a round's step is

    (sum_i min(1, C / |delta_i|) delta_i + N(0, (z C)^2 I)) / n

where delta_i is site i's update as it was decoded, all parameter groups end to end: zeros where the site trained
nothing. So a site moves the sum by at most C, whatever it sent and whichever groups it trained, and the noise, which is
on every value that sites train, tells nobody which those were. All else that sites are sent - the teacher, its
retention, what the server optimiser makes of a step - follows from such steps and the study.

- **Who is counted.** All who replied, also where they are more than n: to count n of them would let one site decide
  about another, and move the sum by 2 C. n is a divisor that everybody knows, not a count of replies. Fewer than n are
  refused by the quorum; not for privacy's sake, for noise and divisor do not hang on them, but because the step would
  be shorter than the study says.
- **What a round releases.** One sum with one draw of noise, counted before anybody can see it
  (`server.released_rounds`). A try of a round that fails asked sites with what the round before had released, and took
  no sum. A round that is done again draws anew, and is another release where it was counted before. Noise is never
  kept, nor drawn from the study's seed.
- **What is promised.** Of two federations that differ in what one site's updates hold, nothing being one of them. Who
  takes part and who fails is not hidden, nor is whether a round came about. One archive put in another's place moves
  the sum by up to 2 C, and costs what half the noise would.
- **To whom.** To those who see releases: what sites are sent, and checkpoints. The coordinator itself sees updates,
  counts and losses, which also stand in its metrics and report and on its screen.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from server.aggregation import Aggregate, shortened
from server.coordinator_config import CoordinatorConfig
from server.exact_sum import ExactSum, SpareMemory
from server.measured import measured
from server.wording import listed
from unimiss_core.codec import Layout, TensorSpec
from unimiss_core.errors import ConfigError
from unimiss_core.gaussian_privacy import LARGEST, gaussian_epsilon, gaussian_noise_for, in_words
from unimiss_core.groups import Group
from unimiss_core.noise import Noise
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.scan import RANKS
from unimiss_core.schedule import teacher_retention
from unimiss_core.study import StudyConfig

WORTH_FROM = 1000
"""Sites below which the noise drowns what they learned (docs/privacy.md, 'Site level')."""

_ROUNDING = 2.0**-30
"""More than rounding can add to what a site moves the sum by, as a share of the clip norm: `ExactSum` moves each value
by at most 2^-46 of its tensor's largest, which is 2^-31 over 2^30 values."""


class SiteLevelMean(Aggregate):
    """The noised sum of clipped updates, over privacy.sites. Each site counts 1, whatever its weights.

    Memory is that of the sum, 8 bytes for each parameter and size of update, and once the noise of the largest tensor.
    """

    def __init__(
        self, layout: Layout, privacy: SitePrivacyConfig, noise: Noise, spare: SpareMemory | None = None
    ) -> None:
        self._layout = layout
        self._privacy = privacy
        self._noise = noise
        self._sums = ExactSum(privacy.clip_norm, spare)
        self._came: set[str] = set()

    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        groups = [group for group, weight in weights.items() if weight > 0]
        counted = measured(update, [spec.name for group in groups for spec in self._layout[group]])
        most = self._privacy.clip_norm * (1 - _ROUNDING)
        self._sums.add(counted, shortened(counted.norm(), most))
        self._came |= counted.keys()

    def result(self) -> dict[str, Tensor]:
        """Of every tensor that sites train, whether or not any did."""
        return {spec.name: self._released(spec) for specs in self._layout.values() for spec in specs}

    def _released(self, spec: TensorSpec) -> Tensor:
        came = spec.name in self._came
        total = self._sums.take_whole(spec.name) if came else torch.zeros(spec.size, dtype=torch.float64)
        self._noise.add_([total], self._privacy.noise_multiplier * self._privacy.clip_norm)
        return total.div_(self._privacy.sites).float().view(spec.shape)


def public_retention(study: StudyConfig, round: int) -> dict[Group, float]:
    """What is left of the global teacher in a round, by the study's schedule alone: the product of the momenta of all
    steps of the round, for every group.

    The mean over the sites that trained a group (`server.round_sum`) would tell who has volumes. Shared, 2D and head
    tensors are trained by every step of every site, so theirs is that mean; 3D tensors are taken as where all steps are
    on volumes, since they too get their noise in every round, which the teacher then evens out at one pace.
    """
    return teacher_retention(study, frozenset({max(RANKS)}), round)


def check_site_level(study: StudyConfig, config: CoordinatorConfig) -> None:
    """Raises ConfigError where a study promises site-level privacy that its noise does not keep, where rounds would
    come about with fewer sites than they are divided by, or where one site could be two."""
    privacy = study.privacy
    if not isinstance(privacy, SitePrivacyConfig):
        return
    if (spent := site_epsilon(privacy, rounds := study.schedule.rounds)) > privacy.max_epsilon:
        least = gaussian_noise_for(min(privacy.max_epsilon, LARGEST), rounds, privacy.delta)
        enough = math.ceil(101 * least) / 100  # a hundredth more, for the sites' own accountant tells a little more
        raise ConfigError(
            f"study '{study.name}': its noise comes to {in_words(spent)} at delta {privacy.delta:g} after {rounds} "
            f"rounds, above privacy.max_epsilon={privacy.max_epsilon:g}. privacy.noise_multiplier: {enough:g} would do"
        )
    if config.min_replies < privacy.sites:
        sites, replies = config.called("min_sites"), config.called("min_replies")
        raise ConfigError(
            f"study '{study.name}': its rounds are divided by privacy.sites={privacy.sites}, so that as many updates "
            f"must count, but the {config.file_in_words} says {replies}={config.min_replies}; write {sites}: "
            f"{max(config.min_sites, privacy.sites)} and {replies}: {privacy.sites}, or begin a study of fewer sites"
        )
    _check_identity(study, config)


def _check_identity(study: StudyConfig, config: CoordinatorConfig) -> None:
    """A site that connects under two names moves the sum by two clip norms, which costs what half the noise would."""
    if config.identity != "proved":
        return
    if not (nameless := [site.name for site in config.sites if not site.public_key]) and config.sites:
        return
    lacks = f"gives no public_key for {listed(nameless)}" if nameless else "names no sites"
    raise ConfigError(
        f"study '{study.name}' promises site-level privacy, so that no site may count twice under two names, but the "
        f"coordinator file {lacks}. List every site under sites: with its public_key, and let the SuperLink "
        "authenticate nodes (docs/federation.md, 'Which sites are asked'); or write identity: believed where you know "
        "every site yourself"
    )


def who_is_believed(study: StudyConfig, config: CoordinatorConfig) -> str | None:
    """A note for whoever starts a site-level study whose sites are not told apart by keys."""
    privacy, rounds = study.privacy, study.schedule.rounds
    if not isinstance(privacy, SitePrivacyConfig) or config.identity == "proved":
        return None
    if config.is_simulated:
        return "identity: simulated: all sites are taken to be the operator's own; nothing shows that no site is two"
    twice = gaussian_epsilon(privacy.noise_multiplier / 2, rounds, privacy.delta)
    return (
        "identity: believed: nothing shows that no site takes part under two names. One that does pays "
        f"{in_words(twice)} at delta {privacy.delta:g} by the last round, instead of "
        f"{in_words(site_epsilon(privacy, rounds))}"
    )


def site_epsilon(privacy: SitePrivacyConfig, rounds: int) -> float:
    """What a site pays that takes part in so many rounds; infinite where that promises nothing."""
    return gaussian_epsilon(privacy.noise_multiplier, rounds, privacy.delta)


def what_it_is_worth(study: StudyConfig, layout: Layout) -> str | None:
    """A warning for whoever starts a site-level study of fewer sites than `WORTH_FROM`."""
    privacy = study.privacy
    if not isinstance(privacy, SitePrivacyConfig) or privacy.sites >= WORTH_FROM:
        return None
    values = sum(spec.size for specs in layout.values() for spec in specs)
    drowned = privacy.noise_multiplier * math.sqrt(values) / privacy.sites
    return (
        f"site-level privacy of {privacy.sites:,} sites: each round's noise is {drowned:,.1f} times as long as the "
        f"longest mean update there can be (noise_multiplier x sqrt(values) / sites = {privacy.noise_multiplier:g} x "
        f"sqrt({values:,}) / {privacy.sites:,}). Below {WORTH_FROM:,} sites expect little or nothing of such a model; "
        "docs/privacy.md says what each number of sites is worth"
    )
