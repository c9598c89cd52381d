"""What further channels bring a task: sarcomas of STS in CT, with the same patients' PET and MR beside it.

    python -m benchmarks.channels --out runs/channels --seeds 0 1 --threads 1

Each run is configs/finetune/sts_ct.yaml with `--fold all`, from scratch, but for its channels (`ARMS`): the masks are
those of the CT, and the others are laid on its grid (`task.other_grids: resample`). A patient is tested once in each
run, on a model that never saw them, so that arms are compared patient by patient. OUT/ARM-SEED holds what `unimiss
finetune` writes; a run that is finished is not done again. At the end OUT/results.json and the table: mean over
seeds, with 95% intervals from drawing patients and seeds, and the difference to CT alone on the same draws.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from benchmarks.downstream import ROOT
from benchmarks.paired import SECONDS, Row, compared, markdown, mean_of_known, scan_means, write_seconds
from client.finetune import finetune
from client.folds import SUMMARY
from client.task_training import STATE
from unimiss_core.yaml_files import read_yaml

ARMS: Mapping[str, tuple[str, ...]] = {
    "CT": ("CT",),
    "CT, PET": ("CT", "PET"),
    "CT, MR": ("CT", "MR"),
    "CT, PET, MR": ("CT", "PET", "MR"),
}
BASELINE = "CT"
FIGURES = ("dice", "hd95_mm")
_CALLED = {"CT": "CT", "PET": "PET", "MR_T1": "MR"}
"""The table's modalities."""
_FOLDS = 5


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out.absolute() / "table.csv"
    patients = write_table(options.data / "sts_ct_pet_mr" / "meta.csv", table)
    for seed in options.seeds:
        for arm in options.arms:
            folder = folder_of(options.out, arm, seed)
            if not (folder / SUMMARY).exists():
                settings = write_settings(options.out, arm, seed, table)
                goes_on = any(folder.glob(f"fold-*/{STATE}")) or any(folder.glob("fold-*/metrics.json"))
                wall, cpu = time.monotonic(), time.process_time()
                finetune(settings, data_root=options.data, out=folder, device="cpu", fold="all", resume=goes_on)
                if not goes_on:
                    write_seconds(folder / SECONDS, wall, cpu)
    rows = list(rows_of(options, patients))
    (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join(markdown(rows, BASELINE)))


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{'-'.join(ARMS[arm])}-{seed}"


def write_table(meta: Path, out: Path) -> dict[int, str]:
    """A line for each patient, with a column for each modality and the mask of the CT; line -> patient."""
    by_patient: dict[str, dict[str, str]] = {}
    with meta.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            own = by_patient.setdefault(row["patient_id"], {"patient": row["patient_id"]})
            own[_CALLED[row["modality"]]] = row["file"]
            if row["modality"] == "CT":
                own["mask"] = row["mask"]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["patient", *_CALLED.values(), "mask"])
        writer.writeheader()
        writer.writerows(by_patient.values())
    return dict(enumerate(by_patient, start=2))


def write_settings(out: Path, arm: str, seed: int, table: Path) -> Path:
    """The run's own file: the shipped one with its seed and channels. Folds are the same in all."""
    raw = dict(read_yaml(ROOT / "configs" / "finetune" / "sts_ct.yaml"))
    columns = list(ARMS[arm])
    data = {"name": "csv", "table": str(table), "folder": raw["data"]["folder"], "label": "mask", "patient": "patient"}
    raw |= {"seed": seed, "split": {"name": "folds", "folds": _FOLDS, "seed": 0}}
    if len(columns) == 1:
        raw["data"] = {**data, "scan": columns[0], "modality": "CT"}
    else:
        raw["task"] = {**raw["task"], "channels": columns, "other_grids": "resample"}
        raw["data"] = {**data, "scan": columns}
    path = out / f"{'-'.join(columns)}-{seed}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def rows_of(options: argparse.Namespace, patients: Mapping[int, str]) -> Iterator[Row]:
    lines = sorted(patients)
    owners = [patients[line] for line in lines]
    folders = {arm: [folder_of(options.out, arm, seed) for seed in options.seeds] for arm in options.arms}
    for figure in FIGURES:
        runs = {
            arm: {folder: mean_of_known(scan_means(_tested(folder), figure, lines)) for folder in own}
            for arm, own in folders.items()
        }
        yield from compared("sts", figure, runs, owners, baseline=BASELINE, arms=tuple(ARMS))


def _tested(folder: Path) -> list[dict[str, str]]:
    """What cases.csv of all folds say of their test scans."""
    rows = []
    for fold in range(_FOLDS):
        with (folder / f"fold-{fold}" / "cases.csv").open(newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if row["part"] == "test"]
    return rows


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
