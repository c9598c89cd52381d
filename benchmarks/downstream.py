"""What a pretraining was worth to the doctor's tasks: the shipped fine-tunings from its encoder, and from scratch.

    python -m benchmarks.downstream --out runs/downstream --steps 800 --threads 1
    python -m benchmarks.downstream --out runs/federated --init runs/shared-real/checkpoints/round-0016 --threads 1

Without --init an encoder is pretrained first, in OUT/pretrained: the shipped `nano` study, seed 0, on the scans of all
sites of configs/simulation/shared_real.yaml together, without labels, as in `benchmarks.recipe`. Each run after that is
a file of configs/finetune as it is, but for the seed, what it begins with, what of it is trained (`ARMS`) and who
tests. The test patients of a task are the same in all runs: of NIH and STS those whom no site of shared_real.yaml holds
(patient_range 0.7 to 1), so that nothing of theirs was pretrained on; of the hippocampus fold 0, of AdrenalMNIST3D its
own test split, neither of which was pretrained on at all.

OUT/TASK-ARM-SEED holds what `unimiss finetune` writes, and `seconds.json`. A run that is finished is not done again:
call once more to go on. At the end OUT/results.json and OUT/rows.md have the figures: means over seeds, with 95%
intervals from drawing patients and seeds with replacement, 1000 times, and the difference to scratch on the same draws.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.paired import SECONDS, Row, Weighed, compared, markdown, mean_of_known, scan_means, write_seconds
from benchmarks.recipe import add_objective, nano, pooled, train
from benchmarks.recipe_tasks import HELD_OUT
from client import merit
from client.cache import open_library
from client.finetune import finetune
from client.finetune_config import load_finetune
from client.label_tables import label_table
from client.patients import patient_of
from client.task_training import STATE
from unimiss_core import checkpoint, progress
from unimiss_core.config import parse
from unimiss_core.errors import UnimissError
from unimiss_core.learner import Learner
from unimiss_core.network import tensors_of
from unimiss_core.study import StudyConfig
from unimiss_core.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
TASKS = ("hippocampus", "sts_ct", "sts_mr", "adrenal", "nih_findings")
"""Files of configs/finetune."""
CLASSIFICATIONS = ("adrenal", "nih_findings")


@dataclass(frozen=True)
class Arm:
    pretrained: bool
    trains: str
    masks: bool = True
    """Whether it is for segmentations, too."""


ARMS: Mapping[str, Arm] = {
    "scratch": Arm(False, "full"),
    "full": Arm(True, "full"),
    "frozen": Arm(True, "frozen"),
    "frozen-random": Arm(False, "frozen"),
    "probe": Arm(True, "linear_probe", masks=False),
    "probe-random": Arm(False, "linear_probe", masks=False),
}
BASELINE = "scratch"
FIGURES = {"segmentation": ("dice", "hd95_mm"), "classification": ("auc",)}


@dataclass(frozen=True)
class Run:
    """One fine-tuning, in a folder of its own."""

    task: str
    arm: str
    seed: int
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "metrics.json").exists()


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    runs = list(planned(options))
    try:
        if not options.table_only:
            init = options.init or pretrained(options)
            for run in runs:
                if not run.is_done:
                    _do(run, init, options.data)
    except UnimissError as error:
        sys.exit(f"benchmarks.downstream: {error}")
    rows = list(rows_of([run for run in runs if run.is_done], options.data))
    lines = markdown(rows, BASELINE)
    (options.out / "rows.md").write_text("\n".join(lines) + "\n")
    (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join(lines))


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that what is finished early can be compared."""
    for seed in options.seeds:
        for task in options.tasks:
            for name in options.arms:
                if ARMS[name].masks or task in CLASSIFICATIONS:
                    yield Run(task, name, seed, options.out / f"{task}-{name}-{seed}")


def pretrained(options: argparse.Namespace) -> Path:
    """The checkpoint in OUT/pretrained, which is made where it is not there yet."""
    folder: Path = options.out / "pretrained"
    if folder.exists():
        return folder
    study = parse(StudyConfig, nano(options.steps, options.objective), where="nano")
    with tempfile.TemporaryDirectory() as scratch:
        library = open_library(pooled(options.data, Path(scratch)), study.plan)
        learner = Learner(study, ranks=library.ranks)
        wall, cpu = time.monotonic(), time.process_time()
        train(learner, library)
    options.out.mkdir(parents=True, exist_ok=True)
    write_seconds(options.out / "pretrained.json", wall, cpu)
    checkpoint.save(
        folder.absolute(),
        origin="federation",
        round=1,
        study_digest=study.digest(),
        model=study.model,
        plan=study.plan,
        student=tensors_of(learner.student),
        teacher=tensors_of(learner.teacher),
    )
    return folder


def _do(run: Run, init: Path, data: Path) -> None:
    print(f"--- {time.strftime('%H:%M:%S')} {run.folder.name}", flush=True)
    path = write_settings(run, data)
    goes_on = (run.folder / STATE).exists()
    wall, cpu = time.monotonic(), time.process_time()
    with progress.listen(_show):
        finetune(
            path,
            data_root=data,
            out=run.folder,
            init=str(init) if ARMS[run.arm].pretrained else "scratch",
            device="cpu",
            resume=goes_on,
        )
    if not goes_on:
        write_seconds(run.folder / SECONDS, wall, cpu)


def _settings_of(run: Run) -> Path:
    """Beside the run's folder, which must be new to the fine-tuning."""
    return run.folder.parent / "settings" / f"{run.folder.name}.yaml"


def write_settings(run: Run, data: Path) -> Path:
    """The run's own file: the shipped one with its seed, what is trained, and who tests."""
    path = _settings_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = dict(read_yaml(ROOT / "configs" / "finetune" / f"{run.task}.yaml"))
    raw |= {"seed": run.seed, "training": {**raw["training"], "trains": ARMS[run.arm].trains}}
    if raw["data"]["name"] == "csv":
        table = path.with_suffix(".csv")
        write_held_out(data / raw["data"]["table"], raw["data"]["patient"], table)
        raw |= {"data": {**raw["data"], "table": str(table.absolute())}, "split": {"name": "given", "seed": 0}}
    elif raw["split"]["name"] == "folds":
        raw["split"] = {**raw["split"], "seed": 0}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def write_held_out(table: Path, patient: str, out: Path) -> None:
    """The table with a column `split`: patients that no site of shared_real.yaml holds test."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        held = HELD_OUT[0] <= patient_of(row[patient].strip(), b"").place < HELD_OUT[1]
        row["split"] = "test" if held else "train"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _show(event: progress.Event) -> None:
    if isinstance(event, progress.Note):
        print(event.text, flush=True)


# ------------------------------------------------------------------------------------------------------------ figures


def rows_of(runs: Sequence[Run], data: Path) -> Iterator[Row]:
    """Figures of each task's arms, over the seeds that are finished."""
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        kind = "classification" if task in CLASSIFICATIONS else "segmentation"
        for figure in FIGURES[kind]:
            by_arm: dict[str, dict[Path, Weighed]] = {}
            patients: list[str] = []
            for run in own:
                by_arm.setdefault(run.arm, {})[run.folder], patients = weighed(run, figure, data)
            yield from compared(task, figure, by_arm, patients, baseline=BASELINE, arms=tuple(ARMS))


def weighed(run: Run, figure: str, data: Path) -> tuple[Weighed, list[str]]:
    """A finished run's figure, and the patient of each test scan that it is of."""
    config = load_finetune(_settings_of(run), data_root=data, out=run.folder)
    patients = {case.number: case.patient for case in label_table(config).cases}
    name = "predictions.csv" if figure == "auc" else "cases.csv"
    with (run.folder / name).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "test"]
    lines = sorted({int(row["line"]) for row in rows})
    owners = [patients[number] for number in lines]
    if figure != "auc":
        return mean_of_known(scan_means(rows, figure, lines)), owners
    classes = config.task.classes[1:] if len(config.task.classes) == 2 else config.task.classes
    by_line = {int(row["line"]): row for row in rows}
    table = [by_line[number] for number in lines]
    columns = [
        (np.array([float(row[f"p/{each}"]) for row in table]), np.array([row[f"is/{each}"] == "1" for row in table]))
        for each in classes
    ]
    return lambda weights: np.mean([merit.auc(p, there, weights) for p, there in columns], axis=0), owners


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT_DIR", help="instead of a pretraining of its own")
    parser.add_argument("--steps", type=int, default=800, help="of that pretraining (default: 800)")
    add_objective(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--table-only", action="store_true", help="of what is finished; nothing is trained")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
