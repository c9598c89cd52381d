"""Patients of a probe whom a site of the simulation trains on, too: its figure shows what is remembered of them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from client.catalogue import catalogue
from client.patients import load_secret
from client.site import UNBEGUN, Site
from client.site_config import DataSource, load_site
from unimiss_core.errors import UnimissError
from unimiss_core.study import StudyConfig


def shared_patients(
    sources: Sequence[DataSource], used: Collection[tuple[Path, ...]], sites: Mapping[str, Path], study: StudyConfig
) -> Iterator[str]:
    """In words, for each site that trains on some, how many. used: the files of each scan that the probe judges by.

    A patient is known by a key that each site's secret makes, so that headers are looked at again for each site. Not in
    a patient-level study, where nothing tells whom a site trains on.
    """
    if study.privacy.mode == "patient":
        return
    asked, interpolate = frozenset(used), study.plan.interpolates
    for name, file in sites.items():
        try:
            site = Site(load_site(file), study, UNBEGUN)
            trained_on = {scan.patient for scan in site.library.scans}
        except UnimissError:
            continue  # it takes no part
        found = catalogue(sources, load_secret(site.config.state), interpolate=interpolate).candidates
        patients = {one.patient for one in found if one.paths in asked}
        if shared := len(patients & trained_on):
            yield (
                f"{shared} of its {len(patients)} patients are called as patients that {name} trains on; if they are "
                "the same, the figure shows what is remembered of them: see patient_range"
            )
