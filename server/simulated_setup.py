"""What keeps a simulation's sites from taking part, told of all at once.

Between hospitals a round goes on without a site that cannot take part, for nobody else can mend it. Here one person has
the file and the data, and a run that ends well without most of them would be taken for a run of all.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from client.execution import devices_for
from client.listing import oddities
from client.obstacles import check_may_come
from client.patients import read_table
from client.site import UNBEGUN, Site
from client.site_config import load_site
from unimiss_core.errors import ConfigError, NoUsableScanError, UnimissError
from unimiss_core.study import StudyConfig

Lacking = dict[str, list[str]]
"""Site -> what it lacks to take part, in words; without those that lack nothing."""


def lacking_files(files: Mapping[str, Path], study: StudyConfig) -> Lacking:
    """What site files, folders, tables and devices show. files: site -> its file."""
    found = {name: list(_of_file(name, file, study)) for name, file in files.items()}
    return {name: told for name, told in found.items() if told}


def lacking_scans(files: Mapping[str, Path], study: StudyConfig) -> Lacking:
    """What reading the sites' scans shows, which are in their caches afterwards."""
    found = {name: list(_of_scans(name, file, study)) for name, file in files.items()}
    return {name: told for name, told in found.items() if told}


def require_all(sites: Collection[str], lacking: Lacking, of_probes: Sequence[str] = ()) -> None:
    """Raises ConfigError: a site, or a probe, lacks something."""
    found = [f"{name}: {words}" for name, told in sorted(lacking.items()) for words in told]
    if not found and not of_probes:
        return
    begins = "the simulation's `probe` cannot be read, and no round was begun; mend it, or leave it out:"
    if found:
        begins = (
            f"{len(lacking)} of {len(sites)} sites cannot take part, and no round was begun. Mend them, or take them "
            "out of `sites`; to go on without such sites, write `quorum` into the simulation's file:"
        )
    raise ConfigError("\n".join([begins, *_items([*found, *of_probes])]))


def _items(told: Sequence[str]) -> Iterator[str]:
    """Each as an item, further lines of it below."""
    for words in told:
        first, *more = words.splitlines()
        yield f"  - {first}"
        yield from (f"    {line}" for line in more)


def _of_file(name: str, file: Path, study: StudyConfig) -> Iterator[str]:
    config = load_site(file, reads_scans=False)
    try:
        load_site(file)
    except ConfigError as error:
        yield _without_name(error, name)
    if study.finetune is None:  # which reads `labels` alone
        for source in config.data:
            if source.table is not None and source.table.path.is_file():
                try:
                    read_table(source.table)
                except ConfigError as error:
                    yield str(error)
    try:
        devices_for(config)
    except ConfigError as error:
        yield _without_name(error, name)


def _of_scans(name: str, file: Path, study: StudyConfig) -> Iterator[str]:
    try:
        site = Site(load_site(file), study, UNBEGUN)
        check_may_come(site.config, study, site.run, site.ledger)
    except UnimissError:
        return  # it says no, as its file wants it to, before a scan is read; the run tells why
    try:
        _ = site.library
    except NoUsableScanError as error:
        yield "\n".join([_without_name(error, name), *(oddities(site.config.data) if study.finetune is None else ())])
    except ConfigError as error:
        yield _without_name(error, name)
    except UnimissError:
        return  # as where it has no labels


def _without_name(error: UnimissError, name: str) -> str:
    return str(error).removeprefix(f"site '{name}': ")
