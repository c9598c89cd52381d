"""The ServerApp: from Flower's run configuration to a finished run.

Run configuration (`flwr run . --run-config 'key="value"'`):
    coordinator   path of a coordinator file; its study is run into its folder. Or a study's name: the file that
                  `unimiss-server run` wrote for it, in the coordinator's folder of UNIMISS_SERVER_HOME. Sites are told
                  what stands here, and a name tells them no path
    simulation    or: path of a simulation file; sites and coordinator file are made first, then run
    out           folder of a simulated run; default ~/.unimiss/runs/<run id>
    resume        go on with an unfinished run
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import said, uploads
from server.coordinator_config import CoordinatorConfig, load_coordinator
from server.display import Display
from server.failure import told_by_flower
from server.home import VARIABLE, Home
from server.report import write_report
from server.rounds import Federation, Probe
from server.run_folder import RunFolder, folder_of
from unimiss_core import progress
from unimiss_core.config import NAME, load
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.extras import way_to
from unimiss_core.schedule import untaught
from unimiss_core.study import StudyConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    resume = bool(context.run_config.get("resume", False))
    with _shown(context):
        config = load_coordinator(coordinator_file(grid, context))
        uploads.bound(config.deadline_s)
        with _end_kept(context, RunFolder(config.out)), _said_elsewhere(context, config.out):
            run(grid, config, resume=resume)


@contextmanager
def _shown(context: Context) -> Iterator[None]:
    """Under `flwr run` nobody watches yet: then plain lines go to the run's log, which `flwr log` shows. Else whoever
    watches tells of errors too."""
    if progress.is_watched():
        yield
        return
    with told_by_flower(_to_resume(context)), Display():
        yield


@contextmanager
def _end_kept(context: Context, folder: RunFolder) -> Iterator[None]:
    """An error that a person can act on is kept in the run's folder: `unimiss-server run` reads it there."""
    try:
        yield
    except UnimissError as error:
        with suppress(OSError):  # there may be no folder, or no room in it
            folder.note_end(context.run_id, error)
        raise


@contextmanager
def _said_elsewhere(context: Context, out: Path) -> Iterator[None]:
    """`unimiss-server run` shows what this process says, where it began it."""
    if not _names_study(str(context.run_config.get("coordinator", ""))):
        yield
        return
    with said.kept(out):
        yield


def _to_resume(context: Context) -> dict[str, str]:
    """What the run configuration must say for this run to be found again."""
    if named := str(context.run_config.get("coordinator", "")):
        return {"coordinator": named}
    if simulation := str(context.run_config.get("simulation", "")):
        from server.simulate import engine_folder

        return {"simulation": simulation, "out": str(engine_folder(context))}
    return {}


def run(grid: Grid, config: CoordinatorConfig, *, resume: bool) -> None:
    """Run the study of a coordinator file over `grid`, with the probe, and write the report."""
    study = load(StudyConfig, config.study)
    if told := untaught(study):
        progress.report(progress.Note(told))
    Federation(grid, study, config, _probe_of(config, study), write_report).run(resume=resume)


def check_probed(study: StudyConfig) -> None:
    """Whether a run of the study can be probed, whatever the sets are. Raises ConfigError."""
    try:
        from server.judging import can_judge
    except ModuleNotFoundError:
        raise ConfigError(f"'probe' needs scikit-learn: {way_to('research')}") from None
    if study.finetune is not None and not can_judge(study.finetune):
        raise ConfigError(
            f"'probe': the model of study '{study.name}' cannot be judged by sets of classes: only one that sorts "
            "whole scans of one image or volume into single classes, by a head that sites share, can; leave 'probe' out"
        )


def _probe_of(config: CoordinatorConfig, study: StudyConfig) -> Probe | None:
    if not config.probe:
        return None
    check_probed(study)
    from server.judging import check_sets, judge
    from server.probing import Yardstick, tell_of_sets

    tell_of_sets(config.probe)
    if study.finetune is None:
        return Yardstick(folder_of(config), config.probe, study.model)
    check_sets(config.probe, study.finetune)
    return partial(judge, folder_of(config), config.probe, study)


def coordinator_file(grid: Grid, context: Context) -> Path:
    """The coordinator file that the run configuration names, or that the simulation it names makes."""
    if named := str(context.run_config.get("coordinator", "")):
        return Home.chosen(None).run_file(named) if _names_study(named) else Path(named).expanduser()
    if simulation := str(context.run_config.get("simulation", "")):
        from server.simulate import prepare_for_engine  # the only way from the coordinator to a site's code

        return prepare_for_engine(simulation, context, len(list(grid.get_node_ids())))
    raise ConfigError(
        "the run configuration names no run; give --run-config 'coordinator=\"/path/coordinator.yaml\"' "
        "or 'simulation=\"/path/simulation.yaml\"'"
    )


def _names_study(coordinator: str) -> bool:
    """Of the coordinator's folder that the environment names; else it is a path."""
    return bool(re.fullmatch(NAME, coordinator)) and VARIABLE in os.environ
