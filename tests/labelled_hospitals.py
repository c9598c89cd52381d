"""What tests of federated fine-tuning share: a small study of a task, and sites with labelled pictures."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from client.nifti import write_nifti
from client.pictures import write_png
from client.site import Site
from client.site_config import load_site
from tests.federation import RUN, small_study
from unimiss_core.scan import Rank, Scan
from unimiss_core.study import StudyConfig

CLASSES = ["clear", "lesion"]
PLAIN: dict[str, Any] = {"area": [1.0, 1.0], "flip": [0.0, 0.0, 0.0], "intensity": 0.0}
"""Views that are the whole scan, shrunk."""


def task_study(
    rounds: int = 1, *, local_steps: int = 1, lr: float = 0.1, finetune: dict[str, Any] | None = None, **changes: Any
) -> StudyConfig:
    """Gradient descent without momentum in the first step, on whole pictures, four at a time."""
    task = {"name": "classification", "kind": "binary", "rank": 2, "classes": CLASSES}
    raw = {
        "schedule": {"rounds": rounds, "local_steps": local_steps},
        "optimiser": {"name": "momentum_sgd", "lr": lr, "final_lr": lr, "warmup_steps": 0, "clip_norm": None},
        "batch": {"images": 4},
        "wire": {"dtype": "fp32"},
        **changes,
    }
    return small_study(task="finetune", finetune={"task": task, "augmentation": PLAIN, **(finetune or {})}, **raw)


def masks_study(**changes: Any) -> StudyConfig:
    return task_study(finetune={"task": {"name": "segmentation", "rank": 2, "classes": ["disc"]}}, **changes)


def hospital(
    folder: Path, name: str, *, pictures: int = 4, seed: int = 0, masks: bool = False, rank: Rank = 2, **settings: Any
) -> Path:
    """Write a site with labelled pictures, or volumes, each of another patient; its site file."""
    (folder / "scans").mkdir(parents=True)
    rows = []
    for number in range(pictures):
        noise = np.random.default_rng([seed, number]).integers(0, 255, (64, 64) if rank == 2 else (16, 64, 64))
        disc = np.broadcast_to(np.add.outer(np.arange(64), np.arange(64)) < 40 + 8 * number, noise.shape)
        scan, label = _written(folder, f"scans/{number}", noise), CLASSES[number % 2]
        if masks:
            label = _written(folder, f"scans/mask-{number}", disc)
        rows.append({"scan": scan, "label": label, "patient": f"P{number}"})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["scan", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)
    labels = {"data": {"table": "labels.csv"}, "classes": ["disc"] if masks else CLASSES}
    raw = {"name": name, "data": [{"folder": "scans"}], "labels": labels, "state": "state", "devices": "cpu"}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(raw | {"workers": 1} | settings))
    return path


def _written(folder: Path, stem: str, values: NDArray[Any]) -> str:
    """A PNG of an image, a NIfTI file of a volume; its path below the folder."""
    if values.ndim == 2:
        write_png(folder / f"{stem}.png", values.astype(np.uint8))
        return f"{stem}.png"
    write_nifti(folder / f"{stem}.nii.gz", Scan(values[None].astype(np.float32), (3.0, 1.0, 1.0), "OT"))
    return f"{stem}.nii.gz"


def opened(path: Path, study: StudyConfig, *, run: str = RUN) -> Site:
    return Site(load_site(path), study, run)
