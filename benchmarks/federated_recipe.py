"""Does the shipped `nano` study learn in a federation? The sites of configs/simulation/shared_real.yaml, on real files.

    python -m benchmarks.federated_recipe --seeds 0 1 2 --threads 1 --json FILE

Each seed is simulated as `unimiss-simulate` does it, in this process, and its teacher is probed before and after as in
`benchmarks.recipe`; beside it, unless `--no-central`, one learner takes as many steps on all sites' scans together, and
with `--alone` each site does so on its own scans, as a federation of itself: what it would have without the others.
Printed: of every site what its targets tell in the last round (shares of log K), each task's floor, AUC and gain of
all, and what the project asks of the federation with PASS or FAIL. `--set a.b=VALUE` changes the study.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.recipe import (
    ROOT,
    Run,
    auc_of,
    gain_lines,
    gains_of,
    pooled,
    probed,
    train_pooled,
    verdict_lines,
)
from benchmarks.recipe_tasks import TASKS, Task, task
from client.cache import open_library
from server.run_folder import RunFolder
from server.simulate import SimulationConfig, simulate
from unimiss_core import checkpoint
from unimiss_core.config import load, parse
from unimiss_core.study import StudyConfig

SIMULATION = ROOT / "configs" / "simulation" / "shared_real.yaml"
MOST_CPU_MIN = 30.0
"""What is asked of a run, beside the entropies at every site and the gains of `benchmarks.recipe`."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    changes = dict(_change(text) for text in options.set)
    runs: list[Run] = []
    central: list[Run] = []
    alone: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks: dict[str, Task] = {}
        for seed in options.seeds:
            folder = (options.out or Path(scratch)) / f"seed-{seed}"
            simulation = _simulation(seed, changes, options.data)
            spent = _simulate(simulation, folder)
            study = load(StudyConfig, folder / "study.yaml")
            tasks = tasks or {name: task(name, options.data, study) for name in TASKS}
            runs.append(_result(folder, study, tasks, spent))
            for site in simulation["sites"] if options.alone else ():
                of_site = folder.with_name(f"{folder.name}-{site['name']}")
                spent = _simulate(_of_one_site(simulation, site), of_site)
                alone.setdefault(site["name"], []).append(_result(of_site, study, tasks, spent))
            if options.central:
                library = open_library(pooled(options.data, Path(scratch) / "pooled"), study.plan)
                central.append(train_pooled(study, library, tasks))
        floors = {name: auc_of(each.floor()) for name, each in tasks.items()}
    print("\n".join([*_lines(runs, central, alone, floors), *verdict_lines(runs, MOST_CPU_MIN)]))
    if options.json:
        content = {"changes": changes, "floors": floors, "federated": [asdict(run) for run in runs]}
        content |= {"central": [asdict(run) for run in central]}
        content |= {"alone": {site: [asdict(run) for run in of_site] for site, of_site in alone.items()}}
        options.json.write_text(json.dumps(content, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="change a setting of the study")
    parser.add_argument("--no-central", dest="central", action="store_false", help="without the central runs")
    parser.add_argument("--alone", action="store_true", help="with each site by itself, too")
    parser.add_argument("--out", type=Path, help="keep the runs' folders here")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _change(text: str) -> tuple[str, Any]:
    path, _, value = text.partition("=")
    return path, yaml.safe_load(value)


def _simulation(seed: int, changes: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """The shipped simulation with absolute paths, a seed and the changes; without its own probe."""
    text = SIMULATION.read_text(encoding="utf-8").replace("../../../shared/data", str(data.resolve()))
    raw: dict[str, Any] = yaml.safe_load(text) | {"study": str(SIMULATION.parent / "../study/nano.yaml"), "probe": []}
    overrides = raw.setdefault("overrides", {})
    for path, value in {"seed": seed, **changes}.items():
        *above, last = path.split(".")
        at = overrides
        for key in above:
            at = at.setdefault(key, {})
        at[last] = value
    parse(SimulationConfig, raw, where="simulation")
    return raw


def _of_one_site(simulation: Mapping[str, Any], site: Mapping[str, Any]) -> dict[str, Any]:
    return {**simulation, "sites": [site], "quorum": {"min_sites": 1, "min_replies": 1}}


def _simulate(simulation: Mapping[str, Any], folder: Path) -> tuple[float, float]:
    """Run it into `folder`; (processor, wall) seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(dict(simulation)), encoding="utf-8")
    began, cpu = time.monotonic(), time.process_time()
    simulate(path, folder)
    return time.process_time() - cpu, time.monotonic() - began


def _result(folder: Path, study: StudyConfig, tasks: Mapping[str, Task], spent: tuple[float, float]) -> Run:
    run = RunFolder(folder)
    before, after = (checkpoint.load(run.checkpoint_of(r)) for r in (0, study.schedule.rounds))
    last = run.metric_rows()[-1]["sites"]
    most = math.log(study.model.prototypes)
    return Run(
        seed=study.seed,
        cpu_s=spent[0],
        wall_s=spent[1],
        entropies={
            f"{name} of {site}": value / most
            for site, line in last.items()
            for name, value in line["diagnostics"].items()
            if "entropy" in name
        },
        gains=gains_of(probed(study.model, before.teacher, tasks), probed(study.model, after.teacher, tasks)),
    )


def _lines(
    runs: list[Run], central: list[Run], alone: Mapping[str, list[Run]], floors: Mapping[str, float]
) -> Iterator[str]:
    yield "federated"
    yield from gain_lines(runs, floors)
    if central:
        yield "central, as many steps on all scans together"
        yield from gain_lines(central, floors)
    for site, of_site in alone.items():
        yield f"{site} alone, as many rounds"
        yield from gain_lines(of_site, floors)


if __name__ == "__main__":
    main()
