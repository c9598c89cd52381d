"""Figures of arms on the same test patients: means over seeds, with intervals from drawing patients and seeds.

Each patient is drawn for all arms alike, so that the difference of two arms is one on the same patients.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unimiss_core.resampling import DRAWS, as_they_are, drawn_by_patient, interval_95

SECONDS = "seconds.json"
Floats = NDArray[np.float64]
Weighed = Callable[[Floats], Floats]
"""One run's figure: how often each of N test scans counts (R, N) -> (R,)."""


@dataclass(frozen=True)
class Row:
    """A figure of an arm, over its seeds; the difference is to the baseline, None of itself."""

    task: str
    arm: str
    figure: str
    value: float
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    difference: float | None
    difference_interval: tuple[float, float] | None
    test_patients: int
    cpu_s: float
    """Of a run, mean over seeds: reading scans, training, validating, testing."""


def compared(
    task: str,
    figure: str,
    runs: Mapping[str, Mapping[Path, Weighed]],
    patients: Sequence[str],
    *,
    baseline: str,
    arms: Sequence[str],
) -> Iterator[Row]:
    """A row for each arm that has runs.

    runs: of an arm, for each seed its folder and its figure on the test scans of these `patients` (N, one for each
    scan). arms: all that there are, in an order that stays, for an arm's seeds are drawn by its place.
    """
    drawn = {
        arm: draws(list(runs[arm].values()), patients, stream=place) for place, arm in enumerate(arms) if arm in runs
    }
    for arm, (values, seeds) in drawn.items():
        apart = None if arm == baseline or baseline not in drawn else values - drawn[baseline][0]
        yield Row(
            task=task,
            arm=arm,
            figure=figure,
            value=float(values[0]),
            interval=interval(values),
            seeds=tuple(seeds.tolist()),
            difference=None if apart is None else float(apart[0]),
            difference_interval=None if apart is None else interval(apart),
            test_patients=len(set(patients)),
            cpu_s=float(np.mean([seconds_of(folder) for folder in runs[arm]])),
        )


def scan_means(rows: Sequence[Mapping[str, str]], figure: str, lines: Sequence[int]) -> Floats:
    """(N,): of each scan the mean over its classes; nan where it has none."""
    found: dict[int, list[float]] = {number: [] for number in lines}
    for row in rows:
        if row[figure]:
            found[int(row["line"])].append(float(row[figure]))
    return np.array([np.mean(values) if values else np.nan for values in found.values()])


def mean_of_known(values: Floats) -> Weighed:
    """The mean over scans that have a value."""
    known = np.isfinite(values)
    return lambda weights: (weights[:, known] @ values[known]) / weights[:, known].sum(1)


def draws(seeds: Sequence[Weighed], patients: Sequence[str], stream: int) -> tuple[Floats, Floats]:
    """((1 + DRAWS,), (seeds,)): the mean over seeds, then over as many drawn seeds on drawn patients; and each seed's.

    Patients are drawn alike in every call with the same ones, so that draws of two arms are of the same patients; seeds
    are drawn by `stream`, for a seed of one arm has nothing to do with that of another.
    """
    weights = np.concatenate([as_they_are(len(patients)), drawn_by_patient(patients)])
    values = np.stack([figure(weights) for figure in seeds])
    own = np.random.default_rng((1, stream)).integers(0, len(seeds), (len(seeds), DRAWS))
    drawn = np.take_along_axis(values[:, 1:], own, axis=0).mean(0)
    return np.concatenate([[values[:, 0].mean()], drawn]), values[:, 0]


def interval(values: Floats) -> tuple[float, float]:
    """95%, of what `draws` gives; nan where it gives nothing."""
    return interval_95(values[1:]) or (np.nan, np.nan)


def write_seconds(path: Path, wall: float, cpu: float) -> None:
    """Spent since these readings of both clocks; a run keeps them in its folder as SECONDS."""
    spent = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
    path.write_text(json.dumps(spent) + "\n")


def seconds_of(folder: Path) -> float:
    """Processor seconds of the run in this folder; nan where it kept none, having been cut off and gone on with."""
    path = folder / SECONDS
    return float(json.loads(path.read_text())["cpu_s"]) if path.exists() else float("nan")


def markdown(rows: Sequence[Row], baseline: str) -> list[str]:
    """Rows of a table; differences to this arm whose interval spares 0 stand in bold."""
    lines = [
        f"| task | arm | figure | mean [95%] | seeds | beside {baseline} [95%] | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        places = 1 if row.figure == "hd95_mm" else 3
        seeds = ", ".join(f"{value:.{places}f}" for value in row.seeds)
        lines.append(
            f"| {row.task} ({row.test_patients}) | {row.arm} | {row.figure} | "
            f"{_told(row.value, row.interval, places)} | {seeds} | {_apart(row, places)} | {row.cpu_s:.0f} |"
        )
    return lines


def _told(value: float, interval: tuple[float, float], places: int, sign: str = "") -> str:
    low, high = interval
    return f"{value:{sign}.{places}f} [{low:{sign}.{places}f}, {high:{sign}.{places}f}]"


def _apart(row: Row, places: int) -> str:
    if row.difference is None or row.difference_interval is None:
        return ""
    told = _told(row.difference, row.difference_interval, places, "+")
    return f"**{told}**" if row.difference_interval[0] > 0 or row.difference_interval[1] < 0 else told
