"""`unimiss probe`: how well labelled scans separate by an encoder's features, beside a random one's and bare pixels.

Legend of shapes: N scans, C channels, S spatial axes - (H, W) or (D, H, W) -, E features, R weightings of the scans.

Nothing is trained but a linear layer on frozen features; the other judge, nearest neighbours, trains nothing. All
encoders are judged on the same patients, so that a difference is not their luck (`unimiss_core.probe`). Of several
checkpoints each sees a scan as it must be prepared for it; what one of them cannot be asked about, none is judged by.
"""

import io
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client import merit
from client.beginning import TAUGHT, Beginning, begin
from client.finetune_config import FromScratch, init_from, signed_by
from client.labelled import content_key
from client.outputs import check_file
from client.probe_sources import Source
from client.probe_words import GAIN, JUDGES, MINUS, in_words
from client.reasons import REASONS
from client.unnamed_scans import tell_of_unnamed
from unimiss_core import durable, progress
from unimiss_core.backbone import Backbone
from unimiss_core.config import load
from unimiss_core.device import device_of
from unimiss_core.embedding import bare_pixels, embed
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.label_counts import MOST_NAMED, of_one_patient
from unimiss_core.probe import Probe, neighbours, probe
from unimiss_core.scan import Modality, Rank
from unimiss_core.study import StudyConfig

Floats = NDArray[np.float64]
Features = NDArray[np.float32]
Ways = tuple[NDArray[np.float32], ...]
"""A scan as each way of preparing leaves it: (C, *S) each."""
Figure = Callable[[Floats], Floats]
"""Of weightings (R, N): (R,)."""

THIS, RANDOM, PIXELS = "this encoder", "random encoder", "bare pixels"
_LETTERS = string.ascii_uppercase
"""What several checkpoints are called, in their order."""


@dataclass
class Seen:
    """A scan: what is known of it, and what each encoder says."""

    labels: tuple[str, ...]
    patient: str
    is_scored: bool
    number: int
    """As of `Known`."""
    keys: tuple[str, ...]
    """`content_key` of the prepared values, for each way of preparing."""
    features: dict[str, Features] = field(default_factory=dict)
    """Name of an encoder -> (E,)."""
    values: NDArray[np.float16] | None = None
    """(C, *S), where they are asked for."""


@dataclass(frozen=True)
class Judged:
    """What is asked about each scan."""

    names: tuple[str, ...]
    """Of the checkpoints among `encoders`; the first is what the others are held against."""
    beginnings: tuple[Beginning, ...]
    """In the order of `names`."""
    ways: tuple[Beginning, ...]
    """Each stands for those of `beginnings` that prepare alike."""
    encoders: Mapping[str, tuple[int, Backbone]]
    """Name -> place among `ways`, and the network."""

    @property
    def first(self) -> Beginning:
        return self.beginnings[0]

    @property
    def differences(self) -> dict[str, tuple[str, str]]:
        """Name of a difference -> what is taken from what: how much one checkpoint exceeds the random encoder, or how
        much the others do the first."""
        if len(self.names) > 1:
            return {f"{name}{MINUS}{self.names[0]}": (name, self.names[0]) for name in self.names[1:]}
        return {GAIN: (THIS, RANDOM)} if RANDOM in self.encoders else {}


def run_probe(
    checkpoints: Sequence[str],
    source: Source,
    *,
    out: Path | None = None,
    scores: bool = False,
    set_out: Path | None = None,
    study: Path | None = None,
    batch: int = 8,
    device: str = "auto",
    key: Path | None = None,
) -> None:
    """Print what linear probe and nearest neighbours make of the scans of `source`, and write it to `out` (JSON).

    checkpoints: each its folder, a released file, or `scratch`; key: of who must have signed it. study: whose model and
    plan `scratch` has. set_out: where the prepared scans go as a coordinator's probe set (`server.probing`). scores:
    `out` also holds what each scan scored.
    Raises CheckpointError, ConfigError, NoUsableScanError.
    """
    _check(checkpoints, out=out, set_out=set_out, scores=scores)
    judged = _judged_by(_beginnings(checkpoints, study, key), source)
    for name, beginning in zip(judged.names, judged.beginnings, strict=True):
        if beginning.is_taught:
            progress.report(progress.Note(TAUGHT if name == THIS else f"{name}: {TAUGHT}"))
    chosen = device_of(device)
    for _, encoder in judged.encoders.values():
        encoder.to(chosen)
    seen = _look(source, judged, batch, keeps_scans=set_out is not None)
    if set_out is not None:
        _write_set(set_out, source, seen)
    told = [
        _told(question, rank, [scan.labels[place] for scan in known], known, source.classes, judged, scores=scores)
        for rank, found in sorted(seen.items())
        for place, question in enumerate(source.questions)
        if (known := [scan for scan in found if scan.labels[place]])
    ]
    if len(checkpoints) > 1:
        print("\n".join(f"{name}: {one}" for name, one in zip(judged.names, checkpoints, strict=True)))
    for one in told:
        print(in_words(one), end="")
    if out is not None:
        durable.write_text(out, json.dumps(told, indent=2) + "\n")


def _check(checkpoints: Sequence[str], *, out: Path | None, set_out: Path | None, scores: bool) -> None:
    """What can be told before anything is read. Raises ConfigError."""
    for option, path in {"--out": out, "--set-out": set_out}.items():
        if path is not None:
            check_file(option, path, must_be_new=True)
    if scores and out is None:
        raise ConfigError("--scores: are written into the file of --out; give that, too")
    if set_out is not None and len(checkpoints) > 1:
        raise ConfigError("--set-out: scans are prepared as one checkpoint takes them; give one")
    if len(checkpoints) > len(_LETTERS):
        raise ConfigError(f"CHECKPOINT: {len(checkpoints)} are given; at most {len(_LETTERS)} are held against another")


def _beginnings(checkpoints: Sequence[str], study: Path | None, key: Path | None) -> tuple[Beginning, ...]:
    asked = None if study is None else load(StudyConfig, study)
    scratch = FromScratch() if asked is None else FromScratch(model=asked.model)
    inits = [init_from(checkpoint, scratch, named="CHECKPOINT") for checkpoint in checkpoints]
    if asked is not None and not any(isinstance(init, FromScratch) for init in inits):
        raise ConfigError("--study: says what 'scratch' is; a checkpoint knows its model and plan itself")
    return tuple(
        begin(signed_by(key, init) if key else init, asked.plan if asked and isinstance(init, FromScratch) else None)
        for init in inits
    )


def _judged_by(beginnings: tuple[Beginning, ...], source: Source) -> Judged:
    """Beside them the random encoder of the first one's size. Raises ConfigError: their scans are not read alike."""
    first = beginnings[0]
    if any(one.plan.missing_slices != first.plan.missing_slices for one in beginnings):
        raise ConfigError(
            "CHECKPOINT: their plans differ in missing_slices, so that they see other scans; probe each alone"
        )
    if source.way_to_name is not None and any(one.modality != first.modality for one in beginnings):
        raise ConfigError(
            "CHECKPOINT: they take scans that do not say what they are for different kinds; say what these are, as by "
            f"{source.way_to_name}"
        )
    names = (THIS,) if len(beginnings) == 1 else tuple(_LETTERS[: len(beginnings)])
    ways: list[Beginning] = []
    encoders: dict[str, tuple[int, Backbone]] = {}
    for name, one in zip(names, beginnings, strict=True):
        place = next((place for place, way in enumerate(ways) if way.prepares_as(one)), len(ways))
        if place == len(ways):
            ways.append(one)
        encoders[name] = place, one.encoder()
    if first.tensors is not None:
        encoders[RANDOM] = 0, first.random_encoder()
    return Judged(names, beginnings, tuple(ways), encoders)


# ---------------------------------------------------------------------------------------------------------- features


def _look(source: Source, judged: Judged, batch: int, *, keeps_scans: bool) -> dict[Rank, list[Seen]]:
    """Rank -> its scans. Raises NoUsableScanError: there is none."""
    seen: dict[Rank, list[Seen]] = {}
    waiting: dict[Rank, list[Ways]] = {}
    left_out, kinds = Counter[str](), Counter[Modality]()
    for known in source.scans(judged.first.plan, judged.first.modality):
        rank = known.scan.rank
        try:
            x = tuple(way.seen_whole(known.scan).numpy() for way in judged.ways)
        except ScanError as error:
            left_out[error.reason] += 1
            continue
        kinds[known.scan.modality] += 1
        keys = tuple(content_key(values) for values in x)
        seen.setdefault(rank, []).append(Seen(known.labels, known.patient, known.is_scored, known.number, keys))
        waiting.setdefault(rank, []).append(x)
        if len(waiting[rank]) == batch:
            _embed(seen[rank][-batch:], waiting.pop(rank), judged.encoders, keeps_scans=keeps_scans)
    for rank, held in waiting.items():
        _embed(seen[rank][-len(held) :], held, judged.encoders, keeps_scans=keeps_scans)
    for rank, found in seen.items():
        seen[rank] = _without_teaching_copies(found)
        left_out["duplicate"] += len(found) - len(seen[rank])
    for reason, count in sorted((+left_out).items()):
        progress.report(progress.Note(f"left out: {count} {reason}: {REASONS[reason]}"))
    if source.way_to_name is not None and judged.first.modality is None:
        tell_of_unnamed(kinds.elements(), source.way_to_name)
    if not seen:
        raise NoUsableScanError("--data: holds no labelled scan that can be used; the notes above say why")
    return seen


def _without_teaching_copies(found: Sequence[Seen]) -> list[Seen]:
    """All but scans that would teach a model what it is judged by, under another name: by a split those that teach,
    without one all but the first patient's."""
    if any(scan.is_scored for scan in found):
        judged = {key for scan in found if scan.is_scored for key in scan.keys}
        return [scan for scan in found if scan.is_scored or judged.isdisjoint(scan.keys)]
    first: dict[str, str] = {}
    return [scan for scan in found if all(first.setdefault(key, scan.patient) == scan.patient for key in scan.keys)]


def _embed(
    found: Sequence[Seen], held: Sequence[Ways], encoders: Mapping[str, tuple[int, Backbone]], *, keeps_scans: bool
) -> None:
    """Features of scans whose prepared values are `held`, into these."""
    ways = [torch.from_numpy(np.stack(values)) for values in zip(*held, strict=True)]
    batches = {name: embed(encoder, ways[way]).numpy() for name, (way, encoder) in encoders.items()}
    batches[PIXELS] = bare_pixels(ways[0])
    for place, scan in enumerate(found):
        scan.features = {name: batch[place] for name, batch in batches.items()}
        if keeps_scans:
            scan.values = held[place][0].astype(np.float16)


# ---------------------------------------------------------------------------------------------------------- figures


def _told(
    question: str,
    rank: Rank,
    labels: Sequence[str],
    found: Sequence[Seen],
    classes: Sequence[str] | None,
    judged: Judged,
    *,
    scores: bool,
) -> dict[str, Any]:
    """Figures of one question: judge -> encoder -> figure, each with its interval."""
    there = [name for name in classes or sorted(set(labels)) if name in labels]
    patients = [scan.patient for scan in found]
    named = [] if _look_like_patients(labels, patients) else there
    place = {name: f"{number:03}" for number, name in enumerate(there)}  # `probe` takes classes in the order of texts
    known = np.array([place[label] for label in labels]), np.array(patients)
    scored = np.array([scan.is_scored for scan in found]) if any(scan.is_scored for scan in found) else None
    judges: dict[str, dict[str, Probe]] = {name: {} for name in JUDGES}
    for name in found[0].features:
        features = np.stack([scan.features[name] for scan in found])
        judges["linear"][name] = probe(features, *known, scored=scored)
        judges["neighbours"][name] = neighbours(features, *known, scored=scored)
    reason = _reason(judges["linear"], judged.names)
    told: dict[str, Any] = {
        "question": question,
        "rank": rank,
        "scans": len(labels),
        "patients": len(set(patients)),
        "judged": len(judges["linear"][judged.names[0]].labels),
        "classes": {name: labels.count(name) for name in named},
        "reason": reason or None,
        "figures": {} if reason else {name: _figures(of, judged) for name, of in judges.items()},
    }
    if scores:
        numbers = [scan.number for scan in found if scored is None or scan.is_scored]
        told["scores"] = [] if reason else _scores(numbers, judges)
    return told | _about(judged)


def _about(judged: Judged) -> dict[str, Any]:
    """Of one checkpoint whether labels taught it, of several also which is which."""
    taught = {"taught_by_labels": any(one.is_taught for one in judged.beginnings)}
    if len(judged.names) == 1:
        return taught
    return taught | {
        "encoders": {
            name: {"tensors": one.digest, "taught_by_labels": one.is_taught}
            for name, one in zip(judged.names, judged.beginnings, strict=True)
        }
    }


def _reason(probed: Mapping[str, Probe], names: Sequence[str]) -> str:
    """Why there is no figure; of which checkpoint, where the others have some."""
    refused = {name: probed[name].reason for name in names if probed[name].reason}
    return next((why if len(refused) == len(names) else f"{name}: {why}" for name, why in refused.items()), "")


def _scores(numbers: Sequence[int], judges: Mapping[str, Mapping[str, Probe]]) -> list[dict[str, Any]]:
    """Of each judged scan what every encoder says, by judge: a number for each class, in the order of `classes`.
    Patients are numbered as they come, for scans of one are no independent witnesses."""
    any_of = next(iter(judges["linear"].values()))
    assert any_of.folds is not None
    whose = np.unique(any_of.patients, return_inverse=True)[1]
    return [
        {
            "scan": number,
            "patient": int(whose[row]),
            "label": int(any_of.labels[row]),
            "fold": int(any_of.folds[row]),
            **{judge: {name: _rounded(of, row) for name, of in probed.items()} for judge, probed in judges.items()},
        }
        for row, number in enumerate(numbers)
    ]


def _rounded(found: Probe, row: int) -> list[float]:
    assert found.scores is not None
    return [round(float(score), 6) for score in found.scores[row]]


def _look_like_patients(labels: Sequence[str], patients: Sequence[str]) -> bool:
    """Whether most labels stand for one patient, as where folders of patients were given for folders of labels: then
    none is named. Raises ConfigError, which names none either: there are many."""
    count, alone = len(set(labels)), of_one_patient(labels, patients)
    if count > MOST_NAMED and 2 * alone > count:
        raise ConfigError(
            f"--data: asks to tell {count} labels apart, of which {alone} are of one patient each, so they look "
            "like patients; give a folder whose folders are called by their label, or a table"
        )
    return 2 * alone > count


def _figures(probed: Mapping[str, Probe], judged: Judged) -> dict[str, dict[str, merit.Figure]]:
    """Encoder -> figure -> value and interval; and by the name of each difference how much one exceeds another."""
    each = {encoder: _of_probe(found) for encoder, found in probed.items()}
    for name, (one, floor) in judged.differences.items():
        each[name] = {figure: partial(_difference, of, each[floor][figure]) for figure, of in each[one].items()}
    patients = probed[judged.names[0]].patients.tolist()
    return {encoder: merit.with_intervals(figures, patients) for encoder, figures in each.items()}


def _of_probe(found: Probe) -> dict[str, Figure]:
    return {"auc": found.aucs, "ap": partial(_precisions, found), "accuracy": partial(_accuracies, found)}


def _precisions(found: Probe, weights: Floats) -> Floats:
    """(R,): average precision, as `Probe.aucs` has the AUC: of the last of two classes, of more the mean over classes,
    and scores of different folds, which are of different models, are not compared."""
    assert found.scores is not None
    assert found.folds is not None
    told = [1] if len(found.classes) == 2 else range(len(found.classes))
    everyone = np.ones(len(found.labels))
    each = [
        merit.of_column(merit.average_precision, found.scores[:, k], found.labels == k, everyone, found.folds, weights)
        for k in told
    ]
    return np.asarray(np.mean(each, axis=0))


def _accuracies(found: Probe, weights: Floats) -> Floats:
    """(R,): share of scans whose likeliest class is theirs."""
    assert found.scores is not None
    right = found.scores.argmax(1) == found.labels
    return np.asarray((weights * right).sum(1) / weights.sum(1))


def _difference(of: Figure, floor: Figure, weights: Floats) -> Floats:
    return of(weights) - floor(weights)


def _write_set(path: Path, source: Source, seen: Mapping[Rank, Sequence[Seen]]) -> None:
    """The prepared scans as a coordinator takes them, patients as numbers. Raises ConfigError: more than one set."""
    if len(seen) > 1 or len(source.questions) > 1:
        raise ConfigError("--set-out: a set is of one rank, and asks one thing; give --data that holds no more")
    found = [scan for scan in next(iter(seen.values())) if scan.labels[0]]
    _, patients = np.unique(np.array([scan.patient for scan in found]), return_inverse=True)
    packed = io.BytesIO()
    scans = np.stack([scan.values for scan in found if scan.values is not None])
    np.savez(packed, scans=scans, labels=np.array([scan.labels[0] for scan in found]), patients=patients)
    durable.write_bytes(path, packed.getvalue())
