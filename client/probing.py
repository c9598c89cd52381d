"""`unimiss probe`: how well labelled scans separate by an encoder's features, beside a random one's and bare pixels.

Legend of shapes: N scans, C channels, S spatial axes - (H, W) or (D, H, W) -, E features, R weightings of the scans.

Nothing is trained but a linear layer on frozen features; the other judge, nearest neighbours, trains nothing. All
encoders are judged on the same patients, so that a difference is not their luck (`unimiss_core.probe`).
"""

import io
import json
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
from client.reasons import REASONS
from client.unnamed_scans import tell_of_unnamed
from unimiss_core import durable, progress
from unimiss_core.backbone import Backbone
from unimiss_core.config import load
from unimiss_core.device import device_of
from unimiss_core.embedding import bare_pixels, embed
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.probe import Probe, neighbours, probe
from unimiss_core.scan import Modality, Rank
from unimiss_core.study import StudyConfig

Floats = NDArray[np.float64]
Features = NDArray[np.float32]
Figure = Callable[[Floats], Floats]
"""Of weightings (R, N): (R,)."""

THIS, RANDOM, PIXELS = "this encoder", "random encoder", "bare pixels"
_IN_WORDS = {"auc": "AUC", "ap": "AP", "accuracy": "accuracy"}
_HEADS = {"gain": "this minus random"}
_MOST_NAMED = 20
"""Labels that are told by name; more are counted."""
_JUDGES = {"linear": "linear probe", "neighbours": "nearest neighbours"}


@dataclass
class Seen:
    """A scan: what is known of it, and what each encoder says."""

    labels: tuple[str, ...]
    patient: str
    is_scored: bool
    key: str
    """`content_key` of the prepared values."""
    features: dict[str, Features] = field(default_factory=dict)
    """Name of an encoder -> (E,)."""
    values: NDArray[np.float16] | None = None
    """(C, *S), where they are asked for."""


def run_probe(
    checkpoint: str,
    source: Source,
    *,
    out: Path | None = None,
    set_out: Path | None = None,
    study: Path | None = None,
    batch: int = 8,
    device: str = "auto",
    key: Path | None = None,
) -> None:
    """Print what linear probe and nearest neighbours make of the scans of `source`, and write it to `out` (JSON).

    checkpoint: its folder, a released file, or `scratch`; key: of who must have signed it. study: whose model and plan
    `scratch` has. set_out: where the prepared scans go as a coordinator's probe set (`server.probing`).
    Raises CheckpointError, ConfigError, NoUsableScanError.
    """
    for option, path in {"--out": out, "--set-out": set_out}.items():
        if path is not None:
            check_file(option, path, must_be_new=True)
    beginning = _beginning(checkpoint, study, key)
    if beginning.is_taught:
        progress.report(progress.Note(TAUGHT))
    chosen = device_of(device)
    encoders = {THIS: beginning.encoder()}
    if beginning.tensors is not None:
        encoders[RANDOM] = beginning.random_encoder()
    for encoder in encoders.values():
        encoder.to(chosen)
    seen = _look(source, beginning, encoders, batch, keeps_scans=set_out is not None)
    if set_out is not None:
        _write_set(set_out, source, seen)
    taught = {"taught_by_labels": beginning.is_taught}
    told = [
        _judged(question, rank, [scan.labels[place] for scan in known], known, source.classes) | taught
        for rank, found in sorted(seen.items())
        for place, question in enumerate(source.questions)
        if (known := [scan for scan in found if scan.labels[place]])
    ]
    for one in told:
        print(_in_words(one), end="")
    if out is not None:
        durable.write_text(out, json.dumps(told, indent=2) + "\n")


def _beginning(checkpoint: str, study: Path | None, key: Path | None) -> Beginning:
    asked = None if study is None else load(StudyConfig, study)
    scratch = FromScratch() if asked is None else FromScratch(model=asked.model)
    init = init_from(checkpoint, scratch, named="CHECKPOINT")
    if asked is not None and not isinstance(init, FromScratch):
        raise ConfigError("--study: says what 'scratch' is; a checkpoint knows its model and plan itself")
    return begin(signed_by(key, init) if key else init, None if asked is None else asked.plan)


# ---------------------------------------------------------------------------------------------------------- features


def _look(
    source: Source, beginning: Beginning, encoders: Mapping[str, Backbone], batch: int, *, keeps_scans: bool
) -> dict[Rank, list[Seen]]:
    """Rank -> its scans. Raises NoUsableScanError: there is none."""
    seen: dict[Rank, list[Seen]] = {}
    waiting: dict[Rank, list[NDArray[np.float32]]] = {}
    left_out, kinds = Counter[str](), Counter[Modality]()
    for known in source.scans(beginning.plan, beginning.modality):
        rank = known.scan.rank
        try:
            x = beginning.seen_whole(known.scan).numpy()
        except ScanError as error:
            left_out[error.reason] += 1
            continue
        kinds[known.scan.modality] += 1
        seen.setdefault(rank, []).append(Seen(known.labels, known.patient, known.is_scored, content_key(x)))
        waiting.setdefault(rank, []).append(x)
        if len(waiting[rank]) == batch:
            _embed(seen[rank][-batch:], waiting.pop(rank), encoders, keeps_scans=keeps_scans)
    for rank, held in waiting.items():
        _embed(seen[rank][-len(held) :], held, encoders, keeps_scans=keeps_scans)
    for rank, found in seen.items():
        seen[rank] = _without_teaching_copies(found)
        left_out["duplicate"] += len(found) - len(seen[rank])
    for reason, count in sorted((+left_out).items()):
        progress.report(progress.Note(f"left out: {count} {reason}: {REASONS[reason]}"))
    if source.way_to_name is not None and beginning.modality is None:
        tell_of_unnamed(kinds.elements(), source.way_to_name)
    if not seen:
        raise NoUsableScanError("--data: holds no labelled scan that can be used; the notes above say why")
    return seen


def _without_teaching_copies(found: Sequence[Seen]) -> list[Seen]:
    """All but scans that would teach a model what it is judged by, under another name: by a split those that teach,
    without one all but the first patient's."""
    if any(scan.is_scored for scan in found):
        judged = {scan.key for scan in found if scan.is_scored}
        return [scan for scan in found if scan.is_scored or scan.key not in judged]
    first: dict[str, str] = {}
    return [scan for scan in found if first.setdefault(scan.key, scan.patient) == scan.patient]


def _embed(
    found: Sequence[Seen],
    held: Sequence[NDArray[np.float32]],
    encoders: Mapping[str, Backbone],
    *,
    keeps_scans: bool,
) -> None:
    """Features of scans whose prepared values are `held`, into these."""
    x = torch.from_numpy(np.stack(held))
    batches = {name: embed(encoder, x).numpy() for name, encoder in encoders.items()} | {PIXELS: bare_pixels(x)}
    for place, scan in enumerate(found):
        scan.features = {name: batch[place] for name, batch in batches.items()}
        if keeps_scans:
            scan.values = held[place].astype(np.float16)


# ---------------------------------------------------------------------------------------------------------- figures


def _judged(
    question: str, rank: Rank, labels: Sequence[str], found: Sequence[Seen], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Figures of one question: judge -> encoder -> figure, each with its interval."""
    there = [name for name in classes or sorted(set(labels)) if name in labels]
    patients = [scan.patient for scan in found]
    named = [] if _look_like_patients(labels, patients) else there
    place = {name: f"{number:03}" for number, name in enumerate(there)}  # `probe` takes classes in the order of texts
    known = np.array([place[label] for label in labels]), np.array(patients)
    scored = np.array([scan.is_scored for scan in found]) if any(scan.is_scored for scan in found) else None
    judges: dict[str, dict[str, Probe]] = {name: {} for name in _JUDGES}
    for name in found[0].features:
        features = np.stack([scan.features[name] for scan in found])
        judges["linear"][name] = probe(features, *known, scored=scored)
        judges["neighbours"][name] = neighbours(features, *known, scored=scored)
    one = judges["linear"][THIS]
    return {
        "question": question,
        "rank": rank,
        "scans": len(labels),
        "patients": len(set(patients)),
        "judged": len(one.labels),
        "classes": {name: labels.count(name) for name in named},
        "reason": one.reason or None,
        "figures": {} if one.reason else {name: _figures(of) for name, of in judges.items()},
    }


def _look_like_patients(labels: Sequence[str], patients: Sequence[str]) -> bool:
    """Whether most labels stand for one patient, as where folders of patients were given for folders of labels: then
    none is named. Raises ConfigError, which names none either: there are many."""
    owners: dict[str, set[str]] = {}
    for label, patient in zip(labels, patients, strict=True):
        owners.setdefault(label, set()).add(patient)
    alone = sum(len(whose) == 1 for whose in owners.values())
    if len(owners) > _MOST_NAMED and 2 * alone > len(owners):
        raise ConfigError(
            f"--data: asks to tell {len(owners)} labels apart, of which {alone} are of one patient each, so they look "
            "like patients; give a folder whose folders are called by their label, or a table"
        )
    return 2 * alone > len(owners)


def _figures(probed: Mapping[str, Probe]) -> dict[str, dict[str, merit.Figure]]:
    """Encoder -> figure -> value and interval; and under `gain` how much this one's exceed the random one's."""
    each = {encoder: _of_probe(found) for encoder, found in probed.items()}
    if RANDOM in each:
        each["gain"] = {name: partial(_difference, of, each[RANDOM][name]) for name, of in each[THIS].items()}
    patients = probed[THIS].patients.tolist()
    return {encoder: merit.with_intervals(figures, patients) for encoder, figures in each.items()}


def _of_probe(found: Probe) -> dict[str, Figure]:
    return {"auc": found.aucs, "ap": partial(_precisions, found), "accuracy": partial(_accuracies, found)}


def _precisions(found: Probe, weights: Floats) -> Floats:
    """(R,): average precision, as `Probe.aucs` has the AUC: of the last of two classes, of more the mean over classes,
    and scores of different folds, which are of different models, are not compared."""
    assert found.scores is not None
    assert found.folds is not None
    each = []
    for k in [1] if len(found.classes) == 2 else range(len(found.classes)):
        positive, total, hits = found.labels == k, np.zeros(len(weights)), np.zeros(len(weights))
        for fold in np.unique(found.folds):
            there = found.folds == fold
            count = weights[:, there & positive].sum(1)
            precision = merit.average_precision(found.scores[there, k], positive[there], weights[:, there])
            total += np.where(count > 0, count * np.nan_to_num(precision), 0)
            hits += count
        each.append(np.divide(total, hits, out=np.full(len(weights), np.nan), where=hits > 0))
    return np.asarray(np.mean(each, axis=0))


def _accuracies(found: Probe, weights: Floats) -> Floats:
    """(R,): share of scans whose likeliest class is theirs."""
    assert found.scores is not None
    right = found.scores.argmax(1) == found.labels
    return np.asarray((weights * right).sum(1) / weights.sum(1))


def _difference(of: Figure, floor: Figure, weights: Floats) -> Floats:
    return of(weights) - floor(weights)


# ---------------------------------------------------------------------------------------------------------- words


def _in_words(told: Mapping[str, Any]) -> str:
    kind = "images" if told["rank"] == 2 else "volumes"
    classes = ", ".join(f"{name} {count}" for name, count in told["classes"].items())
    if len(told["classes"]) > _MOST_NAMED:
        classes = f"{len(told['classes'])} classes"
    if not told["classes"]:
        classes = "labels are not named, for most are of one patient each"
    lines = [f"{told['question']}: {told['scans']} {kind} of {told['patients']} patients ({classes})"]
    if told["reason"]:
        return f"{lines[0]}\n  no figure: {told['reason']}\n"
    if told["judged"] < told["scans"]:
        lines.append(f"  {told['judged']} of them judged, by the split given; the others teach")
    for judge, figures in told["figures"].items():
        columns = list(figures)
        lines.append(f"  {_JUDGES[judge]:20}" + "".join(f"{_HEADS.get(name, name):26}" for name in columns).rstrip())
        for name, said in _IN_WORDS.items():
            cells = [_cell(figures[column][name], signed=column == "gain") for column in columns]
            lines.append(f"    {said:18}" + "".join(f"{cell:26}" for cell in cells).rstrip())
    return "\n".join(lines) + "\n"


def _cell(figure: merit.Figure, *, signed: bool) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "undefined"
    sign = "+" if signed else ""
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


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
