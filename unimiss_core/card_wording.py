"""What all model cards say alike (Mitchell et al. 2019, arXiv:1810.03993): of privacy, sizes and preprocessing; and how
a name stands in one."""

import re
from collections.abc import Mapping, Sequence

import yaml

from unimiss_core.inputs import ChannelConfig, InputConfig
from unimiss_core.scan import Modality
from unimiss_core.study import ModelConfig, PlanConfig, StudyConfig
from unimiss_core.task_config import OtherGrids

KINDS: Mapping[Modality, str] = {"CT": "CT", "MR": "MR", "PT": "PET", "XR": "radiographs", "OT": "not stated"}
"""What scans are, in words."""
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown would read as more than itself; an underscore only at an end of a word."""
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def literally(name: str) -> str:
    """A name that somebody chose, on one line of Markdown, so that it shows as it is and does nothing: a card is opened
    by programs that run HTML, and a class may be called anything."""
    return _MARKUP.sub(r"\\\g<0>", on_one_line(name)).translate(_ENTITIES)


def on_one_line(name: str) -> str:
    """A name that somebody else chose, so that on a screen it neither begins a line nor moves the cursor."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(name.split()))


def promise_in_words(study: StudyConfig, spent: float | None = None) -> str:
    """What the study promises of the patients or sites that it was trained on.

    spent: epsilon that the promised unit, a patient or a site, has cost by now; None where that is not known.
    """
    promise = study.privacy
    if promise.mode == "none":
        return (
            "Nothing is promised. Weights can tell whether a scan was trained on, and more, to whoever asks them well; "
            "hand them only to those who may know that."
        )
    at_most = f"epsilon of at most {promise.max_epsilon:g} at delta {promise.delta:g} over all rounds of the study"
    if promise.mode == "patient":
        so_far = "" if spent is None else f" By this round a patient has cost {spent:.3g} at most."
        return (
            "Patient-level differential privacy (local DP-SGD): whoever has these weights, and all else that sites "
            f"sent, can hardly tell whether any one patient's scans were used: {at_most}, by each site's own ledger."
            f"{so_far}"
        )
    so_far = "" if spent is None else f" By this round a site has paid {spent:.3g}."
    return (
        "Site-level differential privacy (DP-FedAvg): whoever has these weights can hardly tell whether any one site's "
        f"archive was used: {at_most}.{so_far} It is no promise to a single patient beyond that of their site."
    )


def sizes_in_words(model: ModelConfig) -> str:
    image, volume = (" x ".join(map(str, size)) for size in (model.image_size, model.volume_size))
    return f"position tables for {image} and {volume} (D, H, W)"


def plan_in_words(plan: PlanConfig) -> str:
    """An indented block of Markdown."""
    lines = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def inputs_in_words(inputs: Sequence[InputConfig]) -> str:
    """How axes lie, what a prepared scan is resized to, and which its channels are: paragraphs of Markdown."""
    axes = {2: _IMAGE_AXES, 3: _VOLUME_AXES}
    sizes = " and ".join(
        f"{' x '.join(map(str, one.size))} ({'H, W' if len(one.size) == 2 else 'D, H, W'})" for one in inputs
    )
    told = [axes[len(one.size)] for one in inputs]
    if all(one.fit == "whole" for one in inputs):
        told.append(f"All of a scan is then resized to {sizes}, whatever its sides' ratio. {_RESIZE}")
    else:
        alone = "For features of the encoder alone all of it is resized to that."
        told.append(f"Windows of {sizes} are cut from it. {alone} {_RESIZE}")
    if channels := next((one.channels for one in inputs if one.channels), ()):
        told = [
            _channels_in_words(channels, inputs[0].other_grids),
            *told,
            "`unimiss predict` does all of this, and so does a MONAI bundle.",
        ]
    else:
        told.append("`client.features.prepare_file` does all of this, from a file to a tensor.")
    return "\n\n".join(told)


def _channels_in_words(channels: Sequence[ChannelConfig], other_grids: OtherGrids) -> str:
    named = ", ".join(literally(one.name) + (f" (as {one.modality})" if one.modality else "") for one in channels)
    words = (
        f"A scan has {len(channels)} channels, of one patient and on one grid, in this order: {named}. Each is "
        "prepared by itself: CT by the window, all else by percentiles of its own."
    )
    if other_grids == "resample":
        words += " Volumes that lie otherwise are laid on the grid of the first, by their files' affines, linearly."
    if any(one.modality for one in channels):
        words += " What a file says of itself goes before what stands in brackets."
    return words


_VOLUME_AXES = "The axes (D, H, W) of a volume point to the patient's superior, posterior and left."
_IMAGE_AXES = (
    "Images (H, W) lie as a radiologist sees them, where their files say how they lie: an axial slice with posterior "
    "down, a coronal or sagittal one with inferior down, the patient's left or posterior to the right. Others are as "
    "they are shown."
)
_RESIZE = (
    "Resizing is linear along each axis, and antialiased where an axis shrinks: of images what torch calls "
    '`interpolate(mode="bilinear", antialias=True)`, of volumes the same along the third axis, too.'
)
