"""Does the shipped `nano` study learn on small batches of both ranks? Centralised, on the real files.

    python -m benchmarks.recipe --seeds 0 1 2 --threads 1 --json FILE
    python -m benchmarks.recipe --objective unimiss_plus --seeds 0 --threads 1

One learner trains on the X-rays and volumes of all sites of configs/simulation/shared_real.yaml, in turn, and is
probed before and after (`benchmarks.recipe_tasks`): NIH Pneumonia on patients that no site holds (2D), AdrenalMNIST3D
(3D), and beside them, on grey values, the size of the hippocampus (3D). Printed: what the targets tell (shares of
log K, over the last 100 steps), each task's floor and AUC, the gain of each seed with its 95% interval over patients
and of all seeds with that over seeds, and what the project asks with PASS or FAIL.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from scipy.stats import t as student_t
from torch import Tensor

from benchmarks.recipe_tasks import STS, TASKS, Task, sts_source, task
from client.cache import Library, open_library
from client.site_config import DataSource, SiteConfig, TableConfig, anchored
from unimiss_core.config import parse
from unimiss_core.embedding import encoder_of
from unimiss_core.errors import UnimissError
from unimiss_core.learner import Learner
from unimiss_core.network import tensors_of
from unimiss_core.probe import Probe, gain
from unimiss_core.scan import Rank
from unimiss_core.schedule import rank_of_step, total_steps
from unimiss_core.study import ModelConfig, StudyConfig
from unimiss_core.views import draw_batch, generator_for
from unimiss_core.yaml_files import read_yaml

ObjectiveName = Literal["unimiss", "unimiss_plus"]

ROOT = Path(__file__).parents[1]
WINDOW = 100
"""Steps over which targets are looked at; the last of these windows counts."""
TRAINED = (0.0, 0.7)
"""Patients that the learner sees, as a `patient_range`."""

MOST_TARGET, LEAST_MEAN, LEAST_GAIN, MOST_CPU_MIN = 0.9, 0.5, 0.05, 20.0
"""What is asked: shares of log K, for every representation and seed; AUC, mean of the seeds; minutes a run."""
DECIDING = {"2D": "nih-pneumonia", "3D": "adrenal"}
"""The tasks whose gain is asked for; chosen before any recipe was compared on them."""


@dataclass(frozen=True)
class Gain:
    """A task's AUC before and after training, for one seed; interval: of their difference, 95% over patients.

    All are means over the ways to part the patients into folds.
    """

    before: float
    after: float
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Run:
    """entropies: by figure and representation, shares of log K."""

    seed: int
    cpu_s: float
    wall_s: float
    entropies: dict[str, float]
    gains: dict[str, Gain]


def main() -> None:
    options = _options()
    try:
        runs, floors = _measured(options)
    except UnimissError as error:
        sys.exit(f"benchmarks.recipe: {error}")
    print("\n".join([*gain_lines(runs, floors), *verdict_lines(runs)]))
    if options.json:
        content = {
            "steps": options.steps,
            "objective": options.objective,
            "floors": floors,
            "runs": [asdict(run) for run in runs],
        }
        options.json.write_text(json.dumps(content, indent=2))


def _measured(options: argparse.Namespace) -> tuple[list[Run], dict[str, float]]:
    """(a run for each seed, each task's floor)."""
    torch.set_num_threads(options.threads)
    study = parse(StudyConfig, nano(options.steps, options.objective), where="nano")
    with tempfile.TemporaryDirectory() as scratch:
        library = open_library(pooled(options.data, Path(scratch)), study.plan)
        tasks = {name: task(name, options.data, study) for name in TASKS}
        runs = [train_pooled(study.model_copy(update={"seed": seed}), library, tasks) for seed in options.seeds]
    return runs, {name: auc_of(each.floor()) for name, each in tasks.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    raw = nano(None)
    most, warm_up = raw["schedule"]["rounds"] * raw["schedule"]["local_steps"], raw["optimiser"]["warmup_steps"]
    parser.add_argument(
        "--steps",
        type=int,
        default=most,
        help=f"optimiser steps, images and volumes in turn, more than {warm_up}, the warm-up (default: nano's {most})",
    )
    add_objective(parser)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.steps <= warm_up:
        parser.error(
            f"--steps {options.steps}: give more than nano's warm-up of {warm_up} steps, or nothing is learned"
        )
    return options


def add_objective(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--objective",
        choices=get_args(ObjectiveName),
        default="unimiss",
        help="what is learned; unimiss_plus keeps nano's temperatures and has the published weights (default: unimiss)",
    )


def nano(steps: int | None, objective: ObjectiveName = "unimiss") -> dict[str, Any]:
    """The shipped study, of so many steps and with this objective."""
    raw = dict(read_yaml(ROOT / "configs" / "study" / "nano.yaml"))
    if steps is not None:
        raw["schedule"] = dict(raw["schedule"]) | {"rounds": 1, "local_steps": steps}
    return with_reconstruction(raw) if objective == "unimiss_plus" else raw


def with_reconstruction(raw: Mapping[str, Any], **settings: float) -> dict[str, Any]:
    """A study of UniMiSS as one of UniMiSS+ at the same temperatures; settings: of its objective, else as published."""
    shared = {key: value for key, value in raw["objective"].items() if key != "slices_per_volume"}
    model = {**raw["model"], "reconstruction": True}
    return {**raw, "model": model, "objective": {**shared, "name": "unimiss_plus", **settings}}


def pooled(data: Path, scratch: Path) -> SiteConfig:
    """All that the sites of shared_real.yaml hold, as one site."""
    nih = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    images = DataSource(folder=data / "nih_cxr14" / "images_224", table=nih, patient_range=TRAINED)
    volumes = [sts_source(data, label, TRAINED) for label in STS]
    return anchored(SiteConfig(name="pooled", data=(images, *volumes), state=scratch, devices=("cpu",)), scratch)


def train_pooled(study: StudyConfig, library: Library, tasks: Mapping[str, Task]) -> Run:
    """Train on all scans of `library`, with the probes before and after."""
    learner = Learner(study, ranks=library.ranks)
    before = {name: tensor.clone() for name, tensor in tensors_of(learner.teacher).items()}
    began, cpu = time.monotonic(), time.process_time()
    train(learner, library)
    run = Run(
        seed=study.seed,
        cpu_s=time.process_time() - cpu,
        wall_s=time.monotonic() - began,
        entropies=_shares_of_log_k(learner),
        gains=gains_of(probed(study.model, before, tasks), probed(study.model, tensors_of(learner.teacher), tasks)),
    )
    print(json.dumps(asdict(run)), flush=True)
    return run


def train(learner: Learner, library: Library) -> None:
    """All steps of the learner's study."""
    study = learner.study
    steps = total_steps(study.schedule)
    for step in range(steps):
        if (steps - step) % WINDOW == 0 and step > 0:
            _say(step, _shares_of_log_k(learner))
            learner.start_round(tensors_of(learner.student), tensors_of(learner.teacher))  # figures begin anew
        rank: Rank = rank_of_step(library.ranks, step, study.schedule.alternate)
        generator = generator_for(study.seed, "pooled", step)
        scans = library.of_rank(rank)
        chosen = torch.randperm(len(scans), generator=generator)[: study.batch.of(rank)]
        learner.step(draw_batch([scans[i] for i in chosen.tolist()], study.views, generator), step=step)


def _shares_of_log_k(learner: Learner) -> dict[str, float]:
    most = math.log(learner.study.model.prototypes)
    return {name: value / most for name, value in learner.round_diagnostics().items() if "entropy" in name}


def _say(step: int, entropies: Mapping[str, float]) -> None:
    print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in entropies.items()), flush=True)


def probed(model: ModelConfig, teacher: Mapping[str, Tensor], tasks: Mapping[str, Task]) -> dict[str, list[Probe]]:
    """Each task's probes with these tensors as encoder."""
    encoder = encoder_of(model, teacher)
    return {name: each.probed(encoder) for name, each in tasks.items()}


def auc_of(probes: list[Probe]) -> float:
    return statistics.fmean(math.nan if (auc := each.auc()) is None else auc for each in probes)


def gains_of(before: Mapping[str, list[Probe]], after: Mapping[str, list[Probe]]) -> dict[str, Gain]:
    return {name: _gain(before[name], probes) for name, probes in after.items()}


def _gain(before: list[Probe], after: list[Probe]) -> Gain:
    found = [gain(old, new) for old, new in zip(before, after, strict=True)]
    lows, highs = zip(*(each[1] if each else (math.nan, math.nan) for each in found), strict=True)
    return Gain(auc_of(before), auc_of(after), (statistics.fmean(lows), statistics.fmean(highs)))


def gain_lines(runs: list[Run], floors: Mapping[str, float]) -> Iterator[str]:
    """For each task its floor, its AUC before and after, and the gain: of all seeds, then of each."""
    for name, floor in floors.items():
        gains = [run.gains[name] for run in runs]
        low, high = over_seeds([each.value for each in gains])
        yield (
            f"{name}: floor {floor:.3f}; AUC {statistics.fmean(g.before for g in gains):.3f} before, "
            f"{statistics.fmean(g.after for g in gains):.3f} after; gain "
            f"{statistics.fmean(g.value for g in gains):+.3f} [{low:+.3f}, {high:+.3f}] over {len(gains)} seeds"
        )
        for run, each in zip(runs, gains, strict=True):
            low, high = each.interval
            yield (
                f"    seed {run.seed}: {each.before:.3f} to {each.after:.3f}, "
                f"{each.value:+.3f} [{low:+.3f}, {high:+.3f}] over patients"
            )


def over_seeds(gains: list[float]) -> tuple[float, float]:
    """95% interval of their mean, by Student's t; infinite where there is one seed."""
    if len(gains) < 2:
        return -math.inf, math.inf
    reach = student_t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains) - reach, statistics.fmean(gains) + reach


def verdict_lines(runs: list[Run], most_cpu_min: float = MOST_CPU_MIN) -> Iterator[str]:
    """What is asked, what was found, and whether that is enough."""

    def line(passes: bool, asked: str, found: str) -> str:
        return f"{'PASS' if passes else 'FAIL'}  {asked}: {found}"

    targets = [v for run in runs for k, v in run.entropies.items() if k.startswith("target_entropy_")]
    means = [v for run in runs for k, v in run.entropies.items() if k.startswith("mean_target_entropy_")]
    yield line(max(targets) < MOST_TARGET, f"target entropy below {MOST_TARGET} log K", f"largest {max(targets):.3f}")
    yield line(min(means) > LEAST_MEAN, f"mean-target entropy above {LEAST_MEAN} log K", f"smallest {min(means):.3f}")
    for kind, name in DECIDING.items():
        mean = statistics.fmean(run.gains[name].value for run in runs)
        yield line(mean >= LEAST_GAIN, f"gain of at least {LEAST_GAIN} AUC in {kind}", f"{name} {mean:+.3f}")
    slowest = max(run.cpu_s for run in runs) / 60
    yield line(slowest <= most_cpu_min, f"at most {most_cpu_min:g} processor minutes a run", f"longest {slowest:.1f}")


if __name__ == "__main__":
    main()
