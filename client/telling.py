"""What the person at a site should know: in the site's log, and on the screen of whoever watches."""

import logging
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from client.health import note_noise_alone
from unimiss_core import progress

if TYPE_CHECKING:  # whoever has a word to say needs no more than that
    from client.cache import Library
    from client.site import Site

log = logging.getLogger(__name__)

_told: set[tuple[Path, str]] = set()
"""What was told once, by state folder."""


def tell(site: str, words: str) -> None:
    """Say `words` under the site's name, each of their lines by itself: a screen takes one line at a time."""
    for line in filter(None, (line.strip() for line in words.splitlines())):
        log.warning("%s: %s", site, line)
        progress.report(progress.Note(f"{site}: {line}"))


def tell_if_heard(site: str, words: str) -> None:
    """`tell`, where whoever listens may fail and nothing must come of it: what is answered, say."""
    with suppress(Exception):
        tell(site, words)


def tell_once_if_heard(site: str, words: str, *, state: Path) -> None:
    """`tell_if_heard`, but for what this process told already of the site with this state folder."""
    if (said := (state, words)) not in _told:
        _told.add(said)
        tell_if_heard(site, words)


def tell_of_scans(site: "Site", library: "Library") -> None:
    """Say what is left out, where a batch asks for more scans than there are, and where a promise is too weak for as
    many patients, or patients may be one."""
    name, study = site.config.name, site.study
    if library.left_out:
        told = ", ".join(f"{count} {reason}" for reason, count in library.left_out.items())
        tell(name, f"left out {told}; see unimiss-site check")
    for rank in sorted(site.ranks):
        held, asked = len(library.of_rank(rank)), study.batch.of(rank)
        if held < asked and not site.is_private:
            tell(name, f"each {rank}D batch of {asked} is drawn from {held} scans: some stand in it repeatedly")
    if site.is_private:
        tell_of_noise_alone(site, library)
    if study.privacy.mode == "patient":
        _tell_of_shared_scans(name, library)
        _tell_of_weak_deltas(name, {study.privacy.delta, site.config.privacy.delta}, library)


def tell_of_noise_alone(site: "Site", library: "Library") -> None:
    """Say of which ranks a private study finds no scan, and let `unimiss-site status` say so. Its rounds are answered
    and charged all the same, for that there is none is not told; so an archive that was not mounted would cost its
    patients round after round, and nobody would know."""
    missing = [rank for rank in sorted(site.ranks) if not library.of_rank(rank)]
    for rank in missing:
        tell(
            site.config.name,
            f"no usable {rank}D scan for this study: its {rank}D steps are noise alone (privacy.holds), and charged",
        )
    note_noise_alone(site.config.state, site.study.name, missing)


def _tell_of_shared_scans(site: str, library: "Library") -> None:
    """Equal scans under several patients are one person's under several names, or a mistake."""
    patients = defaultdict(set)
    for scan in library.scans:
        patients[scan.key].add(scan.patient)
    if shared := sum(len(whose) > 1 for whose in patients.values()):
        tell(
            site,
            f"{shared} scans stand under several patients each, with equal content: whoever is several patients "
            "here pays for each of them; see 'Whose a scan is' in docs/privacy.md",
        )


def _tell_of_weak_deltas(site: str, deltas: Collection[float], library: "Library") -> None:
    from client.accounting import delta_is_weak  # here, for it takes seconds, and only private studies need it

    patients = len({scan.patient for scan in library.scans})
    for delta in sorted(deltas):
        if patients and (told := delta_is_weak(delta, patients)) is not None:
            tell(site, told)
