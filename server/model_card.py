"""A model card (Mitchell et al. 2019, arXiv:1810.03993) for a checkpoint that is handed on: what it is, what it was
trained by, what is promised of the patients, and how to check and use it."""

import math

from server.artefacts import Artefacts
from server.wording import counted
from unimiss_core.card_wording import inputs_in_words, literally, plan_in_words, promise_in_words, sizes_in_words
from unimiss_core.checkpoint import Manifest
from unimiss_core.gaussian_privacy import gaussian_epsilon
from unimiss_core.inputs import inputs_of
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.study import StudyConfig


def model_card(manifest: Manifest, study: StudyConfig, run: Artefacts, *, signed_by: str) -> str:
    """Markdown. run: the artefacts of the run that made the checkpoint. signed_by: fingerprint of the signing key.

    No site is named: which hospitals took part is theirs to tell.
    """
    values = sum(math.prod(shape) for shape in manifest.tensors.values())
    done = [one for one in run.rounds if one.round <= manifest.round]
    sites = {name for one in done for name, record in one.sites.items() if record.status in ("ok", "late")}
    return f"""\
# {literally(study.name)}, round {manifest.round}

{_what_it_is(study)} at {counted(len(sites), "site")} by Federated
UniMiSS. No image left a site.

| | |
|---|---|
| model | `{manifest.model.size}`, {values:,} values in {len(manifest.tensors)} tensors, float32 |
| images, volumes | {sizes_in_words(manifest.model)} |
| prototypes | {manifest.model.prototypes:,} |
| objective | `{study.finetune.task.name if study.finetune else study.objective.name}` |
| rounds | {manifest.round} of {study.schedule.rounds}, {study.schedule.local_steps} steps each |
| study | sha256 `{manifest.study_digest}`, in full in `study.yaml` |
| signed by | `{signed_by}` |

## Privacy

{privacy_in_words(study, manifest.round, run)}

Where the run was begun from a start, that was trained on scans of its own, of which this says nothing.

## Files

`teacher.safetensors` is what embedding and fine-tuning use; `student.safetensors` is what the next round would train.
`manifest.json` names every file that the run kept; `server.json`, and `server.safetensors` where there is one, were not
handed on, for only resuming needs them. `manifest.sig` signs the manifest. This page is not signed.

    unimiss verify FOLDER --key signing.pub
    {_how_it_is_used(study)}

Take `signing.pub` from the coordinator's operator and compare its fingerprint with theirs: a key that came with the
files shows nothing.

## How scans must be prepared

{plan_in_words(manifest.plan)}

That leaves values in [0, 1]; the network takes x -> 4 x - 2 of them.

{inputs_in_words(inputs_of(manifest.model, study.finetune.task if study.finetune else None))}

## Limits

A research model, not a medical device. Its features carry whatever tells the sites' scanners and patients apart, and
were judged by the probes of the run's report alone. Nothing here says under which licence it is handed on: who
publishes it must.
"""


def _what_it_is(study: StudyConfig) -> str:
    if study.finetune is None:
        return "An encoder for 2D and 3D medical images, pretrained without labels"
    task, whole = study.finetune.task, study.finetune.head == "shared"
    classes = ", ".join(map(literally, task.classes))
    scans = "images" if task.rank == 2 else "volumes"
    if task.channels is not None:
        scans += f" of the channels {', '.join(map(literally, task.channels))}"
    what = f"A model for the {task.name} of {scans} ({classes})"
    return f"{what if whole else f'The encoder of {what[0].lower()}{what[1:]}'}, fine-tuned by labels"


def _how_it_is_used(study: StudyConfig) -> str:
    if study.finetune is None:
        return "unimiss embed FOLDER INPUT --key signing.pub --out features.npz"
    if study.finetune.head == "shared":
        return "unimiss predict FOLDER SCANS --key signing.pub --out ANSWERS"
    return "unimiss finetune CONFIG.yaml --init FOLDER --key signing.pub"


def privacy_in_words(study: StudyConfig, round: int, run: Artefacts) -> str:
    """What the study promises of the patients or sites that it was trained on."""
    return promise_in_words(study, site_epsilon_by(study, round, run))


def site_epsilon_by(study: StudyConfig, round: int, run: Artefacts) -> float | None:
    """Under site-level privacy: what a site has paid by the release of this round that took part in every one.

    The most that any of these says, so that a line or file that is damaged or lost makes it no less: the metrics, the
    record of what was released, and that each round was released once.
    """
    promise = study.privacy
    if not isinstance(promise, SitePrivacyConfig):
        return None
    told = [one.whole.site_epsilon for one in run.rounds if one.round <= round and one.whole.site_epsilon is not None]
    noted = max((number for number, one in enumerate(run.released, start=1) if one == round), default=0)
    return max([gaussian_epsilon(promise.noise_multiplier, max(noted, round), promise.delta), *told])
