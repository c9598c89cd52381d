"""What tests of federated fine-tuning share: a small study of a task, and sites with labelled pictures."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from client.pictures import write_png
from client.site import Site
from client.site_config import load_site
from tests.federation import RUN, small_study
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
    folder: Path, name: str, *, pictures: int = 4, seed: int = 0, masks: bool = False, **settings: Any
) -> Path:
    """Write a site with labelled pictures, each of another patient; its site file."""
    (folder / "scans").mkdir(parents=True)
    rows = []
    for number in range(pictures):
        rng = np.random.default_rng([seed, number])
        pixels = rng.integers(0, 255, (64, 64)).astype(np.uint8)
        label = CLASSES[number % 2]
        if masks:
            label = f"scans/mask-{number}.png"
            write_png(folder / label, (np.add.outer(np.arange(64), np.arange(64)) < 40 + 8 * number).astype(np.uint8))
        write_png(folder / "scans" / f"{number}.png", pixels)
        rows.append({"scan": f"scans/{number}.png", "label": label, "patient": f"P{number}"})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["scan", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)
    labels = {"data": {"table": "labels.csv"}, "classes": ["disc"] if masks else CLASSES}
    raw = {"name": name, "data": [{"folder": "scans"}], "labels": labels, "state": "state", "devices": "cpu"}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(raw | {"workers": 1} | settings))
    return path


def opened(path: Path, study: StudyConfig, *, run: str = RUN) -> Site:
    return Site(load_site(path), study, run)
