"""The model card (Mitchell et al. 2019, arXiv:1810.03993) beside an exported model.

It counts sites and names none, and holds no patient and no path: whoever exports may hand it on as it is.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client.export_sources import Pretrained, Source, Tuned
from unimiss_core.card_wording import KINDS, inputs_in_words, literally, plan_in_words, promise_in_words, sizes_in_words
from unimiss_core.exported import ExportedConfig
from unimiss_core.model_config import ModelConfig

_NOT_FOR_DIAGNOSIS = (
    "**Not for diagnosis.** This is a research model and no medical device; no decision about a patient may rest on it."
)


_FIGURE = re.compile(r"[a-z0-9_]+")
"""Of a figure over all classes; one of a single class has a stroke and the class's name."""


def card(source: Source, config: ExportedConfig, use: str) -> str:
    """Markdown. config: as it is written beside the card. use: how the files are used, as Markdown."""
    about = _of_encoder(source) if isinstance(source, Pretrained) else _of_task(source)
    made_from = "manifest.json" if isinstance(source, Pretrained) else source.described_by
    rows = {**about.rows, "checked": _checks(config), made_from: f"sha256 `{config.source_digest}`"}
    table = "\n".join(f"| {name} | {told} |" for name, told in rows.items() if told)
    return f"""\
---
license: {json.dumps(config.licence) if config.licence else "unknown"}
tags: [medical-imaging, {"self-supervised" if isinstance(source, Pretrained) else config.holds}, federated-learning]
---

# {about.title}

{about.summary}

| | |
|---|---|
{table}
| licence | {literally(config.licence) if config.licence else "not stated: whoever publishes this must"} |

## Intended use

{about.use}

{_NOT_FOR_DIAGNOSIS}

## Privacy

{about.privacy}

## How scans must be prepared

{plan_in_words(config.plan)}

That leaves values in [0, 1]; the network takes x -> 4 x - 2 of them.

{inputs_in_words(config.inputs)}

## Files

{use}
## Limits

Its features carry whatever tells scanners and patients apart, and scans of other scanners, ages or diseases than it was
trained on may be met otherwise. `config.json` and this page are not signed.
"""


@dataclass(frozen=True, kw_only=True)
class _About:
    """What differs between the two kinds of model; a row of which nothing is told is left out."""

    title: str
    summary: str
    rows: Mapping[str, str]
    use: str
    privacy: str


def _of_encoder(source: Pretrained) -> _About:
    manifest, study, config = source.manifest, source.study, source.config
    released, authors = manifest.origin == "released", "UniMiSS+" if config.model.is_plus else "UniMiSS"
    rounds = "" if released else str(manifest.round)
    if study is not None:
        rounds += f" of {study.schedule.rounds}, {study.schedule.local_steps} steps each"
    return _About(
        title="Encoder for 2D and 3D medical images" + ("" if released else f", round {manifest.round}"),
        summary=f"The weights that the authors of {authors} released, under the names of Federated UniMiSS."
        if released
        else "Pretrained without labels by Federated UniMiSS. No image left a site.",
        rows={
            "model": f"{_called(config.model)}, encoder and decoder of the {config.part}, {_count(source)}",
            "images, volumes": sizes_in_words(config.model),
            "trained on": _data(source),
            "sites": "" if released else str(source.trained_by.sites if source.trained_by else "not known here"),
            "rounds": rounds,
            "objective": "" if study is None else f"`{study.objective.name}`",
            "study": f"sha256 `{config.study_digest}`" if config.study_digest else "",
        },
        use="Research: features of X-ray, CT and MR scans, and a beginning for models of segmentation and "
        "classification, in 2D and 3D.",
        privacy=_privacy(source),
    )


def _data(source: Pretrained) -> str:
    if source.manifest.origin == "released":
        return "what its authors say"
    told = source.trained_by
    if told is None:
        return "images (2D) and volumes (3D), as far as sites had them; which had what is not known here"
    kinds = {"images (2D)": told.with_images, "volumes (3D)": told.with_volumes}
    return (
        ", ".join(f"{kind} at {count} site{'s' * (count != 1)}" for kind, count in kinds.items() if count) or "nothing"
    )


def _privacy(source: Pretrained) -> str:
    if source.manifest.origin == "released":
        return "Nothing is promised here of those whose scans it was trained on."
    if source.study is None:
        return (
            "Not known here: the study's file did not lie beside the checkpoint. Take it as if nothing were promised."
        )
    return (
        f"{promise_in_words(source.study, source.spent)}\n\nWhere the run was begun from a start, that was trained on "
        "scans of its own, of which this says nothing."
    )


def _of_task(source: Tuned) -> _About:
    manifest, task = source.manifest, source.manifest.task
    kind = task.kind.replace("_", "-") + " classification" if task.name == "classification" else "segmentation"
    by_a_federation = manifest.trained_in == "rounds"
    began = {"unknown": "; what it began with is not known here", "scratch": ", from scratch"}.get(
        manifest.began_with, f", from a {manifest.began_with}"
    )
    return _About(
        title=f"{kind.capitalize()} of {'images' if task.rank == 2 else 'volumes'}",
        summary=f"Fine-tuned {'by a federation' if by_a_federation else 'at one place'} by Federated UniMiSS{began}.",
        rows={
            "model": f"{_called(manifest.model)} with a head, {_count(source)}",
            "input": f"{' x '.join(map(str, task.size_for(manifest.model)))} ({', '.join('DHW'[-task.rank :])})",
            "channels": ", ".join(map(literally, task.channels or ())),
            "classes": ", ".join(map(literally, task.classes)),
            "trained on": ", ".join(KINDS[kind] for kind in manifest.trained_on),
            "trained": f"`{manifest.trained}`, {manifest.epoch} {manifest.trained_in}, seed {manifest.seed}",
            "pretrained": f"sha256 `{manifest.pretrained_digest}` of its tensors" if manifest.pretrained_digest else "",
            "judged on": _judged(source),
            **_told_figures(source.figures),
        },
        use="Research: comparison with other models of the same task on scans like those that it was tuned on.",
        privacy=(
            "What was promised to the patients of the federation's sites stands in its study, if anything was: "
            if by_a_federation
            else "Fine-tuning at one place promises nothing to the patients whose labelled scans it saw: "
        )
        + "weights can tell whether a scan was trained on; hand them only to those who may know that. Of the scans "
        "that the encoder was pretrained on, that encoder's card says what was promised.",
    )


def _judged(source: Tuned) -> str:
    scans, patients = source.figures.get("scans"), source.figures.get("patients")
    if not (scans and patients and isinstance(scans, int) and isinstance(patients, int)):
        return ""
    which = "that decided when training stopped"
    if source.judged_on == "test":
        unseen = source.manifest.taught_by_labels is False or source.manifest.began_with == "scratch"
        earlier = "that this fine-tuning did not train on; an earlier fine-tuning may have trained on them"
        which = "that it never saw" if unseen else earlier
    return f"{scans} scans of {patients} patients {which}"


def _told_figures(figures: Mapping[str, Any]) -> dict[str, str]:
    """Those over all classes, each with its 95% interval over patients."""
    rows = {}
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and _FIGURE.fullmatch(name) and _is_number(figure.get("value")):
            value, low, high = (figure.get(key) for key in ("value", "low", "high"))
            interval = f" ({low:.3f} to {high:.3f})" if _is_number(low) and _is_number(high) else ""
            rows[f"`{name}`"] = f"{value:.3f}{interval}"
    return rows


def _is_number(value: object) -> bool:
    """Of a file that anyone may write."""
    return isinstance(value, int | float)


def _called(model: ModelConfig) -> str:
    return f"{model.network} `{model.size}`"


def _count(source: Source) -> str:
    shapes = [tuple(parameter.shape) for parameter in source.model.parameters()]
    return f"{sum(map(math.prod, shapes)):,} values in {len(shapes)} tensors, float32"


def _checks(config: ExportedConfig) -> str:
    told = [f"`{name}` {graph.largest_difference:.1e}" for name, graph in config.graphs.items()]
    return f"largest difference to torch, by onnxruntime: {', '.join(told)}" if told else ""
