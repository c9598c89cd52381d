"""A federation on one machine: sites and coordinator file are made, then the ordinary apps run.

This is the only file of the coordinator's side that may import a site's code.

    OUT/hospitals/NAME/     synthetic scans, as real files, where the simulation asks for them
    OUT/sites/NAME/         each site's file and state, as a hospital would have it
    OUT/probe/NAME.npz      held-out labelled scans, preprocessed
    OUT/coordinator.yaml    the coordinator file
and the artefacts of any run (docs/artefacts.md).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
import yaml
from flwr.app import Context, RecordDict, UserConfig
from pydantic import Field, model_validator

from client.app import app as client_app
from client.phantoms import PhantomConfig, write_hospital
from client.site import Site, simulation_folder
from client.site_config import DataSource, SiteConfig, TableConfig, load_site
from server.app import app as server_app
from server.local_grid import LocalGrid
from unimiss_core import durable, progress
from unimiss_core.config import Config, dump_yaml, load, parse, read_yaml
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.study import StudyConfig

log = logging.getLogger(__name__)


class SimulatedSite(Config):
    """One hospital: folders that exist, or a phantom hospital that is written first."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    data: tuple[DataSource, ...] = ()
    """As in a site file; folders count from the simulation file's folder."""
    phantom: PhantomConfig | None = None
    device: str = "auto"
    threads: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        return _either_data_or_phantom(self)


class SimulatedProbe(Config):
    """Labelled scans that no site trains on; read by the readers, then probed before and after the run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    data: tuple[DataSource, ...] = ()
    phantom: PhantomConfig | None = None
    rank: Annotated[int, Field(ge=2, le=3)]
    label: str
    """Column of the table with the label."""
    positive: tuple[str, ...] | None = None
    """Labels that count as positive, all others as negative; None keeps every label a class of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        return _either_data_or_phantom(self)


class Quorum(Config):
    """As in a coordinator file; a simulation asks for all sites unless it says otherwise."""

    min_sites: Annotated[int, Field(gt=0)] = 1
    min_replies: Annotated[int, Field(gt=0)] = 1
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0


class SimulationConfig(Config):
    study: Path
    """The study file, from the simulation file's folder."""
    overrides: Mapping[str, Any] = {}
    """Settings of the study that this simulation changes, nested as in the study file."""
    sites: Annotated[tuple[SimulatedSite, ...], Field(min_length=1)]
    probe: tuple[SimulatedProbe, ...] = ()
    quorum: Quorum = Quorum()
    workers: Annotated[int, Field(gt=0)] = 1
    """Sites that train at the same time; 1 gives the same bits on every run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, entries in {"sites": self.sites, "probe": self.probe}.items():
            names = [entry.name for entry in entries]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind}: the name {', '.join(sorted(twice))} stands twice")
        return self


def simulate(config_path: Path, out: Path, *, resume: bool = False) -> None:
    """Run the simulation of a file into `out`, in this process. Raises UnimissError."""
    config = load(SimulationConfig, config_path)
    coordinator = prepare(config, config_path.resolve().parent, out.resolve())
    run_config: UserConfig = {"coordinator": str(coordinator), "resume": resume}
    nodes = {site.name: site_node_config(out.resolve(), site.name) for site in config.sites}
    with LocalGrid(client_app, nodes, run_config=run_config, workers=config.workers) as grid:
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), run_config))


def site_node_config(out: Path, name: str) -> UserConfig:
    return {"site": str(_site_file(out, name))}


def prepare_for_engine(simulation: str, context: Context) -> Path:
    """For a run under Flower's simulation engine: make everything, return the coordinator file.

    A relative path counts from the app's own configs folder, because the engine's working folder is its own.
    """
    path = Path(simulation).expanduser()
    if not path.is_absolute():
        path = Path(__file__).resolve().parent.parent / "configs" / "simulation" / path
    return prepare(load(SimulationConfig, path), path.parent, simulation_folder(context).resolve())


def prepare(config: SimulationConfig, base: Path, out: Path) -> Path:
    """Write hospitals, site files, probe sets and the coordinator file below `out`; what is there already is kept.

    base: folder that relative paths of the simulation count from. Raises ConfigError.
    """
    study = _study(config, base)
    out.mkdir(parents=True, exist_ok=True)
    for site in config.sites:
        _write_site(site, base, out)
    durable.write_text(out / "study-requested.yaml", dump_yaml(study))
    coordinator = {
        "study": "study-requested.yaml",
        "out": ".",
        **config.quorum.model_dump(mode="json"),
        "probe": [str(_probe_file(probe, study, base, out)) for probe in config.probe],
    }
    durable.write_text(out / "coordinator.yaml", yaml.safe_dump(coordinator, sort_keys=False))
    return out / "coordinator.yaml"


def _study(config: SimulationConfig, base: Path) -> StudyConfig:
    path = base / config.study
    load(StudyConfig, path)  # mistakes of the file itself are told under its own name
    return parse(StudyConfig, _merged(read_yaml(path), config.overrides), where=f"{path} with the overrides")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
