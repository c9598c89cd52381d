"""Does the shipped `nano` study learn on small batches of both ranks? Centralised, on the real files.

    python -m benchmarks.recipe --seeds 0 1 2 --steps 1200 --json FILE

One learner trains on the X-rays and volumes of all sites of configs/simulation/shared_real.yaml, in turn, and is
probed before and after: NIH Pneumonia on patients that no site holds (2D), AdrenalMNIST3D's training and validation
split (3D; its test split stays untouched). Printed: what the targets tell (shares of log K, over the last 100 steps)
and the probes' AUC, paired by seed.
"""

import argparse
import csv
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cache import Library, open_library, read_scans
from client.site_config import DataSource, SiteConfig, TableConfig, anchored
from unimiss_core.config import parse, read_yaml
from unimiss_core.embedding import embed, encoder_of
from unimiss_core.learner import Learner
from unimiss_core.network import tensors_of
from unimiss_core.plan import prepare
from unimiss_core.probe import probe
from unimiss_core.scan import Rank
from unimiss_core.schedule import rank_of_step
from unimiss_core.study import StudyConfig
from unimiss_core.views import draw_batch, generator_for, whole

ROOT = Path(__file__).parents[1]
LAST = 100
"""Steps at the end over which targets are looked at."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    study = parse(StudyConfig, _study(options.steps), where="nano")
    with tempfile.TemporaryDirectory() as scratch:
        library = open_library(_pooled(options.data, Path(scratch)), study.plan)
        tasks = {"nih-pneumonia": _nih(options.data, study), "adrenal": _adrenal(options.data, study)}
        runs = [_run(study.model_copy(update={"seed": seed}), library, tasks) for seed in options.seeds]
    _print(runs)
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "runs": runs}, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps, images and volumes in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _study(steps: int) -> dict[str, Any]:
    raw = dict(read_yaml(ROOT / "configs" / "study" / "nano.yaml"))
    return raw | {"schedule": {"rounds": 1, "local_steps": steps, "alternate": [1, 1]}}


def _pooled(data: Path, scratch: Path) -> SiteConfig:
    """All that the sites of shared_real.yaml hold, as one site."""
    nih = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    sources = [DataSource(folder=data / "nih_cxr14" / "images_224", table=nih, patient_range=(0.0, 0.7))]
    for label, modality in (("CT", "CT"), ("PET", "PT"), ("MR_T1", "MR")):
        table = TableConfig(
            path=data / "sts_ct_pet_mr" / "meta.csv", patient="patient_id", where={"modality": (label,)}
        )
        folder = data / "sts_ct_pet_mr" / "volumes"
        sources.append(DataSource(folder=folder, table=table, modality=modality, patient_range=(0.0, 0.7)))
    return anchored(SiteConfig(name="pooled", data=tuple(sources), state=scratch, devices=("cpu",)), scratch)


class Task:
    """Labelled scans as the model takes them: (N, 1, *S), labels and patients (N,)."""

    def __init__(self, scans: Tensor, labels: NDArray[np.str_], patients: NDArray[np.str_]) -> None:
        self.scans, self.labels, self.patients = scans, labels, patients

    def auc(self, study: StudyConfig, tensors: Mapping[str, Tensor]) -> float:
        encoder = encoder_of(study.model, tensors)
        features = torch.cat([embed(encoder, part) for part in self.scans.split(32)]).numpy()
        return probe(features, self.labels, self.patients).auc() or math.nan


def _nih(data: Path, study: StudyConfig) -> Task:
    table = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    source = DataSource(folder=data / "nih_cxr14" / "images_224", table=table, patient_range=(0.7, 1.0))
    with table.path.open(newline="", encoding="utf-8") as file:
        labels = {row["image"]: row["label"] for row in csv.DictReader(file)}
    found = [
        (whole(prepare(scan, study.plan)[0], study.views.image_size), labels[origin.files[0]], origin.patient)
        for origin, scan in read_scans([source], study.plan)
    ]
    scans, names, patients = zip(*found, strict=True)
    return Task(torch.stack(scans), np.array(names), np.array(patients))


def _adrenal(data: Path, study: StudyConfig) -> Task:
    with np.load(data / "adrenalmnist3d" / "adrenalmnist3d_64.npz") as held:
        volumes = np.concatenate([held["train_images"][:600], held["val_images"]])
        labels = np.concatenate([held["train_labels"][:600], held["val_labels"]]).ravel().astype(str)
    scans = [whole(v[None].astype(np.float32) / max(1, v.max()), study.views.volume_size) for v in volumes]
    return Task(torch.stack(scans), labels, np.arange(len(labels)).astype(str))


def _run(study: StudyConfig, library: Library, tasks: Mapping[str, Task]) -> dict[str, Any]:
    learner = Learner(study, ranks=library.ranks)
    before = {name: task.auc(study, tensors_of(learner.teacher)) for name, task in tasks.items()}
    steps = study.schedule.local_steps
    watch_from = max(0, steps - LAST)
    began, cpu = time.monotonic(), time.process_time()
    for step in range(steps):
        if step == watch_from:
            learner.start_round(tensors_of(learner.student), tensors_of(learner.teacher))  # figures begin anew
        rank: Rank = rank_of_step(library.ranks, step, study.schedule.alternate)
        generator = generator_for(study.seed, "pooled", step)
        scans = library.of_rank(rank)
        chosen = torch.randperm(len(scans), generator=generator)[: study.batch.of(rank)]
        learner.step(draw_batch([scans[i] for i in chosen.tolist()], study.views, generator), step=step)
    figures = learner.round_diagnostics()
    after = {name: task.auc(study, tensors_of(learner.teacher)) for name, task in tasks.items()}
    run = {
        "seed": study.seed,
        "wall_s": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu,
        "shares_of_log_k": {k: v / math.log(study.model.prototypes) for k, v in figures.items() if "entropy" in k},
        "before": before,
        "after": after,
    }
    print(json.dumps(run), flush=True)
    return run


def _print(runs: list[dict[str, Any]]) -> None:
    for name in runs[0]["before"]:
        gains = [run["after"][name] - run["before"][name] for run in runs]
        spread = statistics.stdev(gains) if len(gains) > 1 else math.nan
        print(
            f"{name}: AUC {statistics.fmean(run['before'][name] for run in runs):.3f} before, "
            f"{statistics.fmean(run['after'][name] for run in runs):.3f} after; "
            f"gain {statistics.fmean(gains):+.3f} (sd {spread:.3f}, {len(gains)} seeds)"
        )


if __name__ == "__main__":
    main()
