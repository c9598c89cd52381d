"""A federation on one machine: sites and coordinator file are made, then the ordinary apps run.

This file and those that it is made of, server/simulated_*.py, alone on the coordinator's side may import a site's code.

    OUT/hospitals/NAME/     synthetic scans, as real files, where the simulation asks for them
    OUT/sites/NAME/         each site's file and state, as a hospital would have it
    OUT/probe/NAME.npz      held-out labelled scans, preprocessed
    OUT/coordinator.yaml    the coordinator file
and the artefacts of any run (docs/artefacts.md).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
import yaml
from flwr.app import Context, RecordDict, UserConfig
from pydantic import Field, model_validator

from client.cache import open_library
from client.label_config import LabelsConfig
from client.patients import keep_secret
from client.phantoms import PhantomConfig
from client.pictures import write_png
from client.site import simulation_folder
from client.site_config import DataSource, SiteConfig, SiteTraining, below_base, load_site
from server.app import app as server_app
from server.app import check_probed
from server.local_grid import LocalGrid
from server.run_folder import RunFolder
from server.simulated_data import require_either_data_or_phantom, sources_of
from server.simulated_probe import SimulatedProbe, probe_file, problems
from server.simulated_setup import lacking_files, lacking_scans, require_all
from server.wording import listed
from unimiss_core import durable, progress
from unimiss_core.config import Config, Name, dump_yaml, load, parse
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.given_path import GivenPath
from unimiss_core.study import StudyConfig
from unimiss_core.views import draw_batch, generator_for
from unimiss_core.yaml_files import read_yaml

EXAMPLES = 6
"""Scans of each rank in a site's contact sheet of views."""

GENERATED = "# Written anew at each start of the simulation: change the simulation's file instead.\n"
"""How a generated site file begins."""


class SimulatedSite(SiteTraining):
    """One hospital: folders that exist, or a phantom hospital that is written first; and how it trains."""

    data: tuple[DataSource, ...] = ()
    """As in a site file; folders count from the simulation file's folder."""
    phantom: PhantomConfig | None = None
    labels: LabelsConfig | None = None
    """As in a site file; its paths count from the simulation file's folder, those of a phantom hospital from its own,
    where `labels.csv` is (`client.phantoms`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_either_data_or_phantom(self)
        return self


class Quorum(Config):
    """As in a coordinator file."""

    min_sites: Annotated[int, Field(gt=0)] = 1
    min_replies: Annotated[int, Field(gt=0)] = 1
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """For all sites of a round together: with one worker they train one after the other."""


class SimulationConfig(Config):
    study: GivenPath
    """The study file, from the simulation file's folder."""
    overrides: Mapping[str, Any] = {}
    """Settings of the study that this simulation changes, nested as in the study file; with another `name`, as of an
    objective, such a part begins from the defaults of that name."""
    start: GivenPath | None = None
    """A checkpoint folder to begin from, as in a coordinator file."""
    sites: Annotated[tuple[SimulatedSite, ...], Field(min_length=1)]
    probe: tuple[SimulatedProbe, ...] = ()
    probe_every: Annotated[int, Field(gt=0)] | None = None
    """As in a coordinator file."""
    quorum: Quorum = Quorum()
    """Where it stands in the file, a run goes on without sites that cannot take part, as one between hospitals does.
    Where it does not, what they lack is told of all, and no round begins."""
    forget_ledgers: tuple[Name, ...] = ()
    """Sites whose ledger was begun anew, as in a coordinator file."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 1
    """Sites that train at the same time; 1 gives the same bits on every run, on a CPU."""

    @property
    def goes_on_without(self) -> bool:
        """Whether who wrote the file said how many sites are enough."""
        return "quorum" in self.model_fields_set

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.probe_every and not self.probe:
            raise ValueError("probe_every has no meaning without probe; leave it out, or give labelled scans")
        for kind, names in {"sites": [s.name for s in self.sites], "probe": [p.name for p in self.probe]}.items():
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind}: the name {', '.join(sorted(twice))} stands twice")
        if strangers := set(self.forget_ledgers) - {site.name for site in self.sites}:
            raise ValueError(f"forget_ledgers: there is no site {', '.join(sorted(strangers))}")
        if not self.quorum.min_replies <= self.quorum.min_sites <= len(self.sites):
            raise ValueError(
                f"quorum: min_replies={self.quorum.min_replies} must not be above min_sites={self.quorum.min_sites}, "
                f"nor that above the number of sites, {len(self.sites)}"
            )
        return self


class Simulation(NamedTuple):
    """A simulation's file, read and checked together with its study."""

    config: SimulationConfig
    study: StudyConfig
    base: Path
    """Folder that relative paths of the file count from."""


def simulate(config_path: Path, out: Path, *, resume: bool = False) -> None:
    """Run the simulation of a file into `out`, in this process. Raises UnimissError."""
    # Not at the top: under Flower's engine this file is imported while another thread imports the ClientApp, and would
    # leave it half-imported in that thread's hands.
    from client.app import app as client_app

    simulation, out = read_simulation(config_path), out.resolve()
    nodes = {site.name: site_node_config(out, site.name) for site in simulation.config.sites}
    with RunFolder(out).alone():
        run_config: UserConfig = {"coordinator": str(prepare(simulation, out, resume=resume)), "resume": resume}
        with LocalGrid(client_app, nodes, run_config=run_config, workers=simulation.config.workers) as grid:
            server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), run_config))


def site_node_config(out: Path, name: str) -> UserConfig:
    return {"site": str(_site_file(out, name))}


def prepare_for_engine(simulation: str, context: Context, num_nodes: int) -> Path:
    """For a run under Flower's simulation engine: make everything, return the coordinator file.

    A relative path counts from the app's own configs folder, because the engine's working folder is its own.
    """
    path = Path(simulation).expanduser()
    if not path.is_absolute():
        path = Path(__file__).resolve().parent.parent / "configs" / "simulation" / path
    read = read_simulation(path)
    if num_nodes != (num_sites := len(read.config.sites)):
        raise ConfigError(
            f"the simulation has {num_sites} sites, Flower's engine {num_nodes} nodes; "
            f"give --federation-config 'num-supernodes={num_sites}'"
        )
    resume = bool(context.run_config.get("resume", False))
    return prepare(read, engine_folder(context), resume=resume)


def engine_folder(context: Context) -> Path:
    """The folder of a run under Flower's simulation engine."""
    return simulation_folder(context).resolve()


def read_simulation(path: Path) -> Simulation:
    """Read a simulation's file and its study with the overrides. Raises ConfigError: every mistake in either; a probe
    that cannot judge the study's model; or a patient-level study has too little noise for its own promise."""
    raw, base = read_yaml(path), path.resolve().parent
    try:
        config = parse(SimulationConfig, raw, where=str(path))
    except ConfigError as error:
        raise ConfigError("\n".join([str(error), *_mistakes_of_study(raw, base)])) from None
    study = _study(config.study, config.overrides, base)
    if study.privacy.mode == "patient":
        from client.accounting import check_study  # here, for it takes seconds, and only private studies need it

        check_study(study)  # its sites would refuse it one by one, after their hospitals were written
    _check_probes(config.probe, study)
    return Simulation(config, study, base)


def prepare(simulation: Simulation, out: Path, *, resume: bool) -> Path:
    """Write hospitals, site files, probe sets and the coordinator file below `out`; what is there already is kept.

    Raises ConfigError, before anything is written where `out` holds another run or another coordinator is at work in
    it; and what sites and probes lack, before a scan is read where files and folders alone show it.
    """
    config, study, base = simulation
    folder = RunFolder(out)
    with folder.alone():
        is_begun = folder.check(study, resume=resume) is not None
        sites = _prepare_sites(simulation, out, goes_on=config.goes_on_without or is_begun)
        durable.write_text(out / "study-requested.yaml", dump_yaml(study))
        coordinator = {
            "study": "study-requested.yaml",
            **({} if config.start is None else {"start": str((base / config.start).resolve())}),
            "out": ".",
            "identity": "simulated",
            "written_by": "unimiss-simulate",
            **config.quorum.model_dump(mode="json"),
            "wait_s": 1.0,  # on one machine every site has answered by then, or never will,
            "retry_s": 0.0,  # and nobody mends it while it is waited for
            "forget_ledgers": list(config.forget_ledgers),
            "probe": [str(probe_file(probe, study, base, out, sites=sites)) for probe in config.probe],
            "probe_every": config.probe_every,
        }
        durable.write_text(out / "coordinator.yaml", yaml.safe_dump(coordinator, sort_keys=False))
    return out / "coordinator.yaml"


def _prepare_sites(simulation: Simulation, out: Path, *, goes_on: bool) -> dict[str, Path]:
    """Write the sites' files and have their scans read: name -> file of those that lack nothing. goes_on: without those
    that lack something. Raises ConfigError, as `prepare` does."""
    config, study, base = simulation
    for site in config.sites:
        _write_site(site, base, out)
    files = {site.name: _site_file(out, site.name) for site in config.sites}
    of_probes = [told for probe in config.probe for told in problems(probe, study, base, out)]
    lacking = lacking_files(files, study)
    if of_probes or not goes_on:
        require_all(files, lacking, of_probes)
    for site in config.sites:
        _write_example_views(site, study, out)
    lacking |= lacking_scans({name: files[name] for name in files if name not in lacking}, study)
    if not goes_on:
        require_all(files, lacking)
    elif lacking and len(files) - len(lacking) >= config.quorum.min_sites:
        why = "as the file's quorum allows" if config.goes_on_without else "as the run was begun before"
        progress.report(progress.Note(f"going on without {listed(sorted(lacking))}, {why}"))
    return {name: file for name, file in files.items() if name not in lacking}


def _mistakes_of_study(raw: Any, base: Path) -> list[str]:
    """What is wrong with the study that a simulation names whose own file is wrong, as far as that can be read."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("study"), str):
        return []
    overrides = raw.get("overrides")
    try:
        _study(Path(raw["study"]), overrides if isinstance(overrides, Mapping) else {}, base)
    except ConfigError as error:
        return [str(error)]
    return []


def _check_probes(probes: Sequence[SimulatedProbe], study: StudyConfig) -> None:
    """Raises ConfigError."""
    if not probes:
        return
    check_probed(study)
    for probe in probes:
        if probe.rank not in study.ranks:
            raise ConfigError(
                f"probe '{probe.name}': its rank is {probe.rank}, the task's {study.ranks[0]}; give labelled scans of "
                f"rank {study.ranks[0]}, or leave the probe out"
            )


def _study(file: Path, overrides: Mapping[str, Any], base: Path) -> StudyConfig:
    path = base / file
    study = load(StudyConfig, path)  # mistakes of the file itself are told under its own name
    return parse(StudyConfig, _merged(read_yaml(path), overrides, study), where=f"{path} with the overrides")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], read: Any) -> dict[str, Any]:
    """`base`, which was read as `read`, with `changes`. Where a change chooses another class of settings by its `name`
    (`unimiss_core.config.chosen_by_name`), the old one's settings would be strangers there, and go."""
    merged = dict(base)
    for key, value in changes.items():
        old, part = merged.get(key), getattr(read, key, None)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            chosen = getattr(part, "name", None)
            merged[key] = _merged(old, value, part) if value.get("name", chosen) == chosen else value
        else:
            merged[key] = value
    return merged


_KINDS = {"cr": ("images",), "ct": ("volumes",), "mixed": ("images", "volumes")}
"""What a phantom hospital holds, for patient-level studies."""


def _site_file(out: Path, name: str) -> Path:
    return out / "sites" / name / "site.yaml"


def _write_site(site: SimulatedSite, base: Path, out: Path) -> None:
    path = _site_file(out, site.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {key: getattr(site, key) for key in SiteTraining.model_fields}
    if site.phantom is not None and site.privacy.holds is None:
        own["privacy"] = site.privacy.model_copy(update={"holds": _KINDS[site.phantom.kind]})
    sources = sources_of(site, base, out)
    config = SiteConfig(data=sources, labels=_labels(site, sources, base), state=Path("state"), **own)
    durable.write_text(path, GENERATED + dump_yaml(config))
    keep_secret(path.parent / config.state, _secret_of(site.name))


def _secret_of(site: str) -> bytes:
    """By which the site knows its patients: of its name, so that whom it holds out are the same in every folder, as
    those of a real site, whose secret is random, are in every run."""
    return hashlib.sha256(f"patients of the simulated site {site}".encode()).digest()


def _labels(site: SimulatedSite, sources: Sequence[DataSource], base: Path) -> LabelsConfig | None:
    if site.labels is None:
        return None
    root = base.resolve() if site.phantom is None else sources[0].folder
    return site.labels.model_copy(update={"data": below_base(site.labels.data, root)})


# -- what the report shows ------------------------------------------------------------------------------------------


def _write_example_views(site: SimulatedSite, study: StudyConfig, out: Path) -> None:
    """A contact sheet of what the site trains on: a column for each scan, its views below each other. None in a
    patient-level study: a picture of a patient is in no epsilon; nor in fine-tuning, whose views are one of each."""
    path = out / "report" / f"views-{site.name}.png"
    if path.exists() or study.privacy.mode == "patient" or study.finetune is not None:
        return
    path.parent.mkdir(exist_ok=True)
    try:
        library = open_library(load_site(_site_file(out, site.name)), study.plan)
    except UnimissError:
        return  # the run itself will say why this site cannot take part
    bands = []
    for rank in sorted(library.ranks):
        scans = library.of_rank(rank)[:EXAMPLES]
        views = draw_batch(scans, study.views, generator_for(study.seed, site.name, 0))[:, :, 0]  # (B, V, *S)
        flat = views if rank == 2 else views[:, :, views.shape[2] // 2]  # a volume shows by its middle slice
        bands.append(flat.permute(1, 2, 0, 3).flatten(0, 1).flatten(1))  # (V H, B W)
    width = max(band.shape[1] for band in bands)
    sheet = torch.cat([F.pad(band, (0, width - band.shape[1]), value=-2.0) for band in bands])
    write_png(path, ((sheet + 2) / 4 * 255).round().clamp(0, 255).byte().numpy())
