"""A fine-tuned model as a MONAI bundle: what `monai.bundle` loads and runs, with this package installed.

    configs/metadata.json     what goes in and comes out, by MONAI's schema
    configs/inference.json    network, preprocessing, inferer, postprocessing: parts of `client.bundle_parts`
    models/                   the model as fine-tuning wrote it, with its digest

Reading, preparing and laying masks onto their sources are ours, so that a bundle answers as the model was judged.
"""

import importlib.util
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from client.export_sources import Tuned
from unimiss_core import task_checkpoint
from unimiss_core.card_wording import literally
from unimiss_core.errors import ConfigError
from unimiss_core.extras import way_to
from unimiss_core.layers import CHANNELS
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig

_USE = """\
A MONAI bundle. {scans}; answers go to
`output_dir`: `predictions.csv`, or masks in the geometry of each scan's own file. Both name a scan by its {called}.
What cannot be read is left out, and logged. MONAI warns that a bundle's configuration is run as a program: so it is.

    pip install -e 'FOLDER_OF_FEDERATED_UNIMISS[finetune]' fire
    python -m monai.bundle run --bundle_root . --config_file configs/inference.json \\
        --meta_file configs/metadata.json --dataset_dir SCANS --output_dir ANSWERS
"""

_PARTS = "client.bundle_parts"
_NOTHING = -2.0
"""What value 0 of a prepared scan is to the model: windows beyond the scan's edge are filled up with it."""


def use_of(manifest: TaskManifest) -> str:
    """How the bundle is used, as Markdown."""
    if manifest.task.channels is None:
        one = "Each file in `dataset_dir`, or each folder in it with a DICOM series, is a scan"
        return _USE.format(scans=one, called="file's name")
    told = zip(manifest.task.channels, manifest.channel_numbers, strict=True)
    named = ", ".join(f"{number:04d} is {literally(name)}" for name, number in told)
    cases = (
        "The files in `dataset_dir`, or the folders in it with a DICOM series each, are called CASE_0000.nii.gz,\n"
        f"CASE_0001.nii.gz, ..., where {named}; or a case is one NIfTI file, which holds\n"
        "these as its volumes, numbered alike"
    )
    return _USE.format(scans=cases, called="case")


def require_extra() -> None:
    """Raises ConfigError: MONAI is not installed."""
    if importlib.util.find_spec("monai") is None:
        raise ConfigError(f"monai must be installed for --to monai: {way_to('finetune')}")


def files_of(source: Tuned) -> dict[str, bytes]:
    """The bundle's files by their path in it."""
    manifest = source.manifest
    model, _ = task_checkpoint.packed(dict(source.model.named_parameters()), manifest)
    return {
        "configs/metadata.json": _json(metadata(manifest)),
        "configs/inference.json": _json(inference(manifest)),
        **{f"models/{name}": content for name, content in model.items()},
    }


def inference(manifest: TaskManifest) -> dict[str, Any]:
    """`configs/inference.json`: components by the names that MONAI's own bundles use."""
    dense = not isinstance(manifest.task, ClassificationConfig)
    scans = {"_target_": f"{_PARTS}.scans_in", "folder": "@dataset_dir"}
    if manifest.task.channels is not None:
        scans = {"_target_": f"{_PARTS}.cases_in", "folder": "@dataset_dir", "manifest": "@manifest"}
    return {
        "imports": [f"$import {_PARTS} as bundle_parts"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "models": "$@bundle_root + '/models'",
        "manifest": {"_target_": f"{_PARTS}.manifest", "folder": "@models"},
        "network_def": {"_target_": f"{_PARTS}.network", "folder": "@models"},
        "network": "$@network_def.to(@device)",
        "predictor": {"_target_": f"{_PARTS}.Chances", "network": "@network", "manifest": "@manifest"},
        "datalist": scans,
        "preprocessing": {
            "_target_": "monai.transforms.Compose",
            "transforms": [{"_target_": f"{_PARTS}.Prepared", "manifest": "@manifest"}],
        },
        "dataset": {"_target_": "monai.data.Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": _sliding_window(manifest) if dense else {"_target_": "monai.inferers.SimpleInferer"},
        "postprocessing": {
            "_target_": "monai.transforms.Compose",
            "transforms": [
                {
                    "_target_": f"{_PARTS}.{'MaskAtSource' if dense else 'Table'}",
                    "manifest": "@manifest",
                    "folder": "@output_dir",
                }
            ],
        },
        "run": ["$bundle_parts.run(@dataset, @predictor, @inferer, @postprocessing)"],
    }


def metadata(manifest: TaskManifest) -> dict[str, Any]:
    """`configs/metadata.json`, by MONAI's bundle specification."""
    task = manifest.task
    is_classes = isinstance(task, ClassificationConfig)
    names = task.classes if is_classes else ("background", *task.classes)
    size = list(task.size_for(manifest.model))
    channels = ["image"] if task.channels is None else [_inert("channel", name) for name in task.channels]
    return {
        "version": version("federated-unimiss"),
        "changelog": {version("federated-unimiss"): "as exported"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"federated-unimiss": version("federated-unimiss")},
        "task": f"{task.name} of {'images' if task.rank == 2 else 'volumes'}",
        "description": "Fine-tuned by Federated UniMiSS; README.md beside configs is its model card.",
        "authors": "see README.md",
        "copyright": "see README.md",
        "intended_use": "Research. Not for diagnosis.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": len(channels),
                    "spatial_shape": size,
                    "dtype": "float32",
                    "value_range": [-2, 2],
                    "is_patch_data": not is_classes,
                    "channel_def": {str(number): name for number, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "logits",
                    "format": "classes" if is_classes else "segmentation",
                    "num_channels": task.outputs,
                    "spatial_shape": [] if is_classes else size,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": not is_classes,
                    "channel_def": {str(number): _inert("class", name) for number, name in enumerate(names)},
                }
            },
        },
        "unimiss": {
            "channels_at_most": task.channel_count or CHANNELS[task.rank],
            "plan": manifest.plan.model_dump(mode="json"),
        },
    }


def _inert(what: str, name: str) -> str:
    """The name of a class or channel as mere text: MONAI runs what begins with $ as a program, and takes @ and % for
    references."""
    return f"{what} {name}".replace("::", ": :")


def _sliding_window(manifest: TaskManifest) -> dict[str, Any]:
    """As `client.segmenting.probabilities` goes over a scan."""
    return {
        "_target_": "monai.inferers.SlidingWindowInferer",
        "roi_size": list(manifest.task.size_for(manifest.model)),
        "sw_batch_size": 4,
        "overlap": manifest.overlap,
        "mode": "gaussian",
        "padding_mode": "constant",
        "cval": _NOTHING,
        "sw_device": "@device",
        "device": "cpu",
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
