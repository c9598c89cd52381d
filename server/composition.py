"""What `unimiss-server run STUDY.yaml` makes of a coordinator's folder: the coordinator file of that study's run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.coordinator_config import CoordinatorConfig
from server.home import Home
from server.registry import Registry, registered
from server.run_folder import RunFolder
from unimiss_core import durable
from unimiss_core.config import dump_yaml, load, parse
from unimiss_core.errors import ConfigError
from unimiss_core.study import StudyConfig
from unimiss_core.yaml_files import read_yaml

ADDED = ("study", "out", "sites", "signing_key", "ledgers", "written_by")
"""Keys of a coordinator file that are not the operator's to write in the folder's own."""


class Composed(NamedTuple):
    study: StudyConfig
    folder: RunFolder
    file: Path
    """The coordinator file."""


def compose(home: Home, study_file: Path) -> Composed:
    """Write the run's coordinator file and, beside it, the study as it was asked for, which later edits leave alone.

    Raises ConfigError: a file is wrong, no site is approved, or the run's folder holds another study's run.
    """
    study = load(StudyConfig, study_file)
    folder = RunFolder(home.run(study.name))
    folder.check(study, resume=True, else_way="or give this one another `name:`, which its sites must allow, too")
    asked, file = folder.path / "study-requested.yaml", home.run_file(study.name)
    sites = Registry(home).approved()
    if not sites:  # an empty list would mean every node
        raise ConfigError(f"{home.path}: no site is approved; unimiss-server approve SITE --key SITE.join.yaml")
    added: Mapping[str, Any] = {
        "study": str(asked),
        "out": str(folder.path),
        "signing_key": str(home.signing_key),
        "ledgers": str(home.ledgers),
        "written_by": "unimiss-server",
        "sites": [registered(site).model_dump(mode="json") for site in sites],
    }
    config = _anchored(home, parse(CoordinatorConfig, {**_given(home), **added}, where=str(home.coordinator)))
    try:
        durable.make_folder(folder.path)
        durable.write_text(asked, study_file.read_text(encoding="utf-8"))
        durable.write_text(file, dump_yaml(config))
    except OSError as error:
        raise ConfigError(f"{folder.path}: cannot be written to ({error.strerror})") from None
    return Composed(study, folder, file)


def _given(home: Home) -> Mapping[str, Any]:
    """The folder's own coordinator file, which may be empty."""
    given = read_yaml(home.coordinator) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{home.coordinator}: expected settings, such as min_sites: 2")
    if named := [key for key in ADDED if key in given]:
        raise ConfigError(f"{home.coordinator}: remove '{named[0]}': `unimiss-server run` adds {', '.join(ADDED)}")
    return given


def _anchored(home: Home, config: CoordinatorConfig) -> CoordinatorConfig:
    """Relative paths count from the folder of the operator's file, not from where this one is written."""
    return config.model_copy(
        update={
            "probe": tuple(home.path / probe for probe in config.probe),
            "start": config.start and home.path / config.start,
            "start_key": config.start_key and home.path / config.start_key,
        }
    )
