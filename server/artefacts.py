"""What a run left in its output folder, read back; docs/artefacts.md says what each file holds.

A run may have been stopped at any moment, so any file may be missing or end in mid-line. Reading never
fails for that: what cannot be read is left out and named in `Artefacts.gaps`, one sentence each. A figure that cannot
be right is left out alone: what one site wrote costs nobody else's figures, and no round.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from server.released_rounds import record_of
from server.run_folder import RunFolder
from server.wording import counted
from unimiss_core import metric_lines
from unimiss_core.collapse import signs_in_round
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.json_text import read_value
from unimiss_core.study import StudyConfig
from unimiss_core.wire import LARGEST_COUNT, LARGEST_FIGURE, LONGEST_S

ReadT = TypeVar("ReadT")
RecordT = TypeVar("RecordT", bound=BaseModel)


def _measured(raw: Any) -> Any:
    """Figures without those that are null or no longer numbers in any useful sense."""
    if not isinstance(raw, Mapping):
        return raw or {}
    return {key: value for key, value in raw.items() if not _is_diverged(value)}


def _is_diverged(value: Any) -> bool:
    """Such a figure is left out like one that was not measured, and no axis is stretched for it."""
    return value is None or (isinstance(value, float | int) and not abs(value) <= LARGEST_FIGURE)


Figures = Annotated[Mapping[str, float], BeforeValidator(_measured)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SiteRecord(_Record):
    """One site in one round."""

    status: str
    """ok, late, refused, error or absent."""
    reason: Annotated[str, BeforeValidator(lambda raw: raw or "")] = ""
    scans: Mapping[str, Count] = {}
    """Number of scans under "2d" and "3d"."""
    left_out: Count = 0
    steps: Count = 0
    losses: Figures = {}
    bytes_down: Count = 0
    bytes_up: Count = 0
    seconds: Seconds = 0.0
    diagnostics: Figures = {}


_ABSENT = SiteRecord(status="absent")


class GlobalRecord(_Record):
    """What a round did to the global model."""

    update_norm: Figures = {}
    """L2 norm of the change of the global student, per parameter group."""
    site_epsilon: Annotated[float, Field(ge=0)] | None = None
    """Only under site-level privacy: what a site has paid that took part in every release so far."""
    probe: Mapping[str, Any] = {}
    """Figures by task, in rounds that were probed; the report takes those of the last from their own files."""


class RoundRecord(_Record):
    """One line of metrics.jsonl."""

    round: Annotated[int, Field(ge=1, le=10**6)]
    seconds: Seconds = 0.0
    sites: Mapping[str, SiteRecord] = {}
    whole: GlobalRecord = Field(GlobalRecord(), alias="global")


class StopRecord(_Record):
    """Why a run ended before its last round."""

    round: Annotated[int, Field(ge=1, le=10**6)]
    """The round at work."""
    error: str
    sites: Mapping[str, SiteRecord] = {}
    """How each site stood; `there` is one that was not asked to train yet."""


class ProbeRecord(_Record):
    """A linear probe of one task on held-out patients."""

    task: str = ""
    rank: int | None = None
    auc: Share | None = None
    interval: tuple[Share, Share] | None = None
    n: Count = 0
    classes: Mapping[str, Count] | None = None
    """Label -> scans; None where they are not named."""
    positives: Count | None = None
    pixel_floor: Share | None = None
    """`auc` of the same probe on the scans' bare pixels, shrunk: what can be told without any encoder."""
    reason: str | None = None
    """Why there is no figure."""
    gain: Difference | None = None
    gain_interval: tuple[Difference, Difference] | None = None


@dataclass(frozen=True)
class Projection:
    """Held-out embeddings of one task in the plane: before and after (N, 2), labels (N,)."""

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    labels: NDArray[np.str_]


@dataclass(frozen=True)
class Artefacts:
    study: StudyConfig | None
    rounds: tuple[RoundRecord, ...]
    """By round number; where a resumed run wrote a round twice, the later line counts."""
    views: Mapping[str, bytes]
    """PNG by site."""
    projections: Mapping[str, Projection]
    before: Mapping[str, ProbeRecord]
    after: Mapping[str, ProbeRecord]
    gaps: tuple[str, ...]
    stop: StopRecord | None = None
    released: tuple[int, ...] = ()
    """Only under site-level privacy: the round of each release, in the order in which they were made."""

    taught_by_labels: bool | None = None
    """Whether labels had taught what the run began from; None where it began from no checkpoint, or nobody told."""

    @property
    def counts_are_told(self) -> bool:
        """Whether sites tell how many scans they have, and how long they worked; of a patient-level study they do not,
        and 1 stands for any number."""
        return self.study is None or self.study.privacy.mode != "patient"

    @property
    def sites(self) -> list[str]:
        """Every site that any round names, sorted."""
        return sorted({name for one in self.rounds for name in one.sites})

    def records(self, site: str) -> list[SiteRecord]:
        """The site in each of `rounds`; a round that does not name it counts as absence."""
        return [one.sites.get(site, _ABSENT) for one in self.rounds]

    def missed(self, site: str) -> list[int]:
        """Numbers of the rounds that the site did not count in."""
        records = zip(self.rounds, self.records(site), strict=True)
        return [one.round for one, record in records if record.status not in ("ok", "late")]

    def collapsed(self) -> dict[str, list[str]]:
        """Site -> signs of collapse in the last round that it told figures of; only sites that show some."""
        if self.study is None:
            return {}
        last = {name: one for one in self.rounds for name, record in one.sites.items() if record.diagnostics}
        signs = {
            name: signs_in_round(self.study, one.round, one.sites[name].diagnostics)
            for name, one in sorted(last.items())
        }
        return {name: found for name, found in signs.items() if found}

    def traffic(self, sites: Iterable[str]) -> tuple[int, int]:
        """Bytes to these sites and from them, over all rounds."""
        records = [record for site in sites for record in self.records(site)]
        return sum(one.bytes_down for one in records), sum(one.bytes_up for one in records)


def read_artefacts(out: Path) -> Artefacts:
    """Everything in `out` that a report shows. Raises nothing for missing or damaged files."""
    gaps: list[str] = []
    report = out / "report"
    study = _read(out / "study.yaml", lambda path: load(StudyConfig, path), gaps)
    return Artefacts(
        study=study,
        rounds=_read(out / metric_lines.NAME, lambda path: _rounds(path, gaps), gaps) or (),
        views={path.stem.removeprefix("views-"): path.read_bytes() for path in sorted(report.glob("views-*.png"))},
        projections=_read_if_present(report / "probe-projection.npz", _projections, gaps),
        before=_read_if_present(report / "probe-before.json", _probe, gaps),
        after=_read_if_present(report / "probe-after.json", _probe, gaps),
        stop=_read(out / "stopped.json", lambda path: _stop(path, gaps), gaps)
        if (out / "stopped.json").exists()
        else None,
        released=_released(out, study, gaps),
        taught_by_labels=RunFolder(out).was_taught(),
        gaps=tuple(gaps),
    )


def _read(path: Path, read: Callable[[Path], ReadT], gaps: list[str]) -> ReadT | None:
    if not path.exists():
        gaps.append(f"{path.name} is missing.")
        return None
    try:
        return read(path)
    except (ConfigError, ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        # Not the error's own words: they would bring this machine's paths into a report that is passed on.
        gaps.append(f"{path.name} could not be read and was left out.")
        return None


def _read_if_present(path: Path, read: Callable[[Path], Mapping[str, ReadT]], gaps: list[str]) -> Mapping[str, ReadT]:
    """A run without labelled scans has no probe; that is no gap."""
    return (_read(path, read, gaps) or {}) if path.exists() else {}


def _rounds(path: Path, gaps: list[str]) -> tuple[RoundRecord, ...]:
    by_number: dict[int, RoundRecord] = {}
    for number, line in enumerate(metric_lines.parsed(path), start=1):
        try:
            record = _as_far_as_right(RoundRecord, line, f"Line {number} of {path.name}", gaps)
        except ValueError:
            gaps.append(f"Line {number} of {path.name} is damaged or incomplete and was left out.")
        else:
            by_number[record.round] = record
    return tuple(by_number[number] for number in sorted(by_number))


def _as_far_as_right(kind: type[RecordT], raw: Any, told_of: str, gaps: list[str]) -> RecordT:
    """The record without what cannot be right in it; without a site's line where that lacks its status. Raises
    ValueError: then there is none."""
    wrong = 0
    while True:
        try:
            record = kind.model_validate(raw)
        except ValidationError as error:
            wrong += len(places := {_place_of(one["type"], one["loc"]) for one in error.errors()})
            for place in sorted(places, key=len, reverse=True):
                _take_out(raw, place)
        else:
            if wrong:
                gaps.append(f"{told_of}: {counted(wrong, 'figure')} cannot be right and {_left_out(wrong)}.")
            return record


def _place_of(error: str, place: Sequence[int | str]) -> tuple[int | str, ...]:
    """Of what must go, for the rest to be right: what lacks something, or is wrong itself."""
    return tuple(place[:-1] if error == "missing" else place)


def _take_out(raw: Any, place: Sequence[int | str]) -> None:
    """Raises ValueError: it is no part of what the record says of a site or of the model, but the record's own."""
    if len(place) < 2:
        raise ValueError
    for key in place[:-1]:
        raw = raw[key]
    raw.pop(place[-1], None)


def _left_out(wrong: int) -> str:
    return "was left out" if wrong == 1 else "were left out"


def _stop(path: Path, gaps: list[str]) -> StopRecord:
    return _as_far_as_right(StopRecord, read_value(path), path.name, gaps)


def _released(out: Path, study: StudyConfig | None, gaps: list[str]) -> tuple[int, ...]:
    """Nothing where the study promises no site-level privacy, or there is no record."""
    if study is None or (record := record_of(out, study)) is None or not (path := out / "released.json").exists():
        return ()
    return _read(path, lambda _: tuple(record.rounds), gaps) or ()


def _probe(path: Path) -> Mapping[str, ProbeRecord]:
    """By task; a list of records that each name their task reads the same."""
    raw = read_value(path)
    named = {record["task"]: record for record in raw} if isinstance(raw, list) else raw
    return TypeAdapter(dict[str, ProbeRecord]).validate_python(named)


def _projections(path: Path) -> Mapping[str, Projection]:
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, own_fid=False, allow_pickle=False) as arrays:
        tasks = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
        found = {
            task: Projection(
                before=arrays[f"{task}/before"].astype(np.float64),
                after=arrays[f"{task}/after"].astype(np.float64),
                labels=arrays[f"{task}/labels"].astype(np.str_),
            )
            for task in tasks
        }
    for task, one in found.items():
        shapes = (one.before.shape, one.after.shape, one.labels.shape)
        if shapes != ((len(one.labels), 2), (len(one.labels), 2), (len(one.labels),)):
            raise ValueError(f"{task}: shapes {shapes} are not (N, 2), (N, 2), (N,)")
    return found
