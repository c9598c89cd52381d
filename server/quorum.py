"""A round that too few sites, or too few updates, came of: what its operator is told, and the ways on.

Where each of those who are lacking gave a reason that lasts (`unimiss_core.reasons`), to ask them again is in vain: the
run ends at once, and can be resumed when a person has mended something. Otherwise the round is tried again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from server.coordinator_config import CoordinatorConfig
from server.site_round import SiteRound
from server.wording import listed
from unimiss_core.errors import RoundError
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.reasons import REASONS, lasts
from unimiss_core.study import StudyConfig


class TooFew(RoundError):  # noqa: N818 - what there is, as people say it
    """lasting: whether all who are lacking would have to be mended by a person."""

    def __init__(self, message: str, *, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting


def too_few_sites(
    lines: Mapping[str, SiteRound], *, there: int, least: int, study: StudyConfig, config: CoordinatorConfig
) -> TooFew:
    """lines: how each site stands before it is asked to train. there: how many can take part."""
    told = "".join(f"; {name}: {line.reason}" for name, line in sorted(lines.items()) if line.reason)
    return _too_few(f"{there} of at least {least} sites are there{told}", lines, there, study, config)


def too_few_updates(
    round: int, lines: Mapping[str, SiteRound], study: StudyConfig, config: CoordinatorConfig
) -> TooFew:
    """lines: what became of each site in the round."""
    came = sum(line.counts for line in lines.values())
    told = "; ".join(f"{name}: {line.status} {line.reason}".rstrip() for name, line in sorted(lines.items()))
    begins = f"round {round} could not be completed: {came} of at least {config.min_replies} updates count ({told})"
    return _too_few(f"{begins}; rounds up to {round - 1} are saved", lines, came, study, config)


def is_in_vain(lines: Mapping[str, SiteRound]) -> bool:
    """Whether somebody is lacking, and it is no use to ask any of those again."""
    lacking = [line.reason for line in lines.values() if line.reason and not line.counts]
    return bool(lacking) and all(map(lasts, lacking))


def _too_few(
    begins: str, lines: Mapping[str, SiteRound], left: int, study: StudyConfig, config: CoordinatorConfig
) -> TooFew:
    in_vain = is_in_vain(lines)
    mend = (
        "No time mends this; a person can"
        if in_vain
        else f"Mend the sites{_or_the_study(lines)}, then {config.goes_on_by}"
    )
    ways = "".join(f"\n  - {way}" for way in (*_mends(lines), *_without(left, study, config)))
    return TooFew(f"{begins}. {mend}:{ways}", lasting=in_vain)


def _mends(lines: Mapping[str, SiteRound]) -> Iterator[str]:
    """What is to be done about each reason that lasts, and what cannot be."""
    sites = defaultdict(list)
    for name, line in sorted(lines.items()):
        if lasts(line.reason):
            sites[line.reason].append(name)
    for reason, names in sites.items():
        yield f"{listed(names)}, {reason}: {REASONS[reason].mend}"


def _without(left: int, study: StudyConfig, config: CoordinatorConfig) -> Iterator[str]:
    """How to go on with the sites that are left. A study of site-level privacy says itself how many it takes."""
    privacy = study.privacy
    sites, replies = config.called("min_sites"), config.called("min_replies")
    if isinstance(privacy, SitePrivacyConfig) and left < privacy.sites:
        yield (
            f"without them: not in this study, whose privacy.sites={privacy.sites} says how many updates a round "
            f"takes, so that no lower {replies} is accepted. Let others take their place, or begin a run of a study "
            "with a lower privacy.sites, to whose epsilon what this one released adds (docs/privacy.md, 'Site level')"
        )
    elif left:
        out = "; who is taken out of its `sites` is not asked any more" if config.names_its_sites else ""
        lower = f"lower {sites} and {replies} of the {config.file_in_words} to {left}"
        yield f"without them: {lower}, then {config.goes_on_by}{out}"
    yield "or leave it at this: what was finished is saved, and the last checkpoint is whole"


def _or_the_study(lines: Mapping[str, SiteRound]) -> str:
    if not any(line.reason in ("too_large", "not_finite") for line in lines.values()):
        return ""
    return (
        " - or, where updates are too large or not finite, begin a run with a lower optimiser.lr or another "
        "aggregation.max_update_norm or max_size_ratio -"
    )
