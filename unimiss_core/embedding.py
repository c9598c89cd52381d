"""What a pretrained encoder says about scans: one feature vector for each, without training.

Legend of shapes: N scans, C channels, S spatial axes - (H, W) or (D, H, W).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core import checkpoint
from unimiss_core.backbone import Backbone
from unimiss_core.checkpoint import Manifest
from unimiss_core.keys import SigningPublicKey
from unimiss_core.network import empty_network, load_tensors_
from unimiss_core.study import ModelConfig
from unimiss_core.tuned_round import require_pretraining

_FLOOR_SIDE = 16


def load_encoder(folder: Path, *, key: SigningPublicKey | None = None) -> tuple[Backbone, Manifest]:
    """The backbone of a checkpoint's teacher, which embeds better than its student, and what the checkpoint says.

    key: of who must have signed it; None asks for no signature. Raises CheckpointError: no checkpoint there, damaged,
    not signed by that key, of a task, or of another model than its manifest says.
    """
    found = checkpoint.load(folder, key=key)
    require_pretraining(folder, found.manifest)
    return encoder_of(found.manifest.model, found.teacher), found.manifest


def encoder_of(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Backbone:
    """The backbone of a whole network's tensors. Raises CheckpointError: they do not fit the model."""
    network = empty_network(model).to_empty(device="cpu")
    load_tensors_(network, tensors)
    return network.backbone.eval().requires_grad_(False)


@torch.inference_mode()
def embed(encoder: Backbone, scans: Tensor) -> Tensor:
    """scans (N, C, *S) as the plan prepares them -> features (N, width), float32, on the CPU.

    Raises ValueError: a shape that the encoder does not take.
    """
    device = next(encoder.parameters()).device
    features: Tensor = encoder(scans.to(device, torch.float32))
    return features.cpu()


def bare_pixels(scans: Tensor) -> NDArray[np.float32]:
    """scans (N, C, *S) -> (N, C * 256): each image, or the middle slice of each volume, as 16 x 16 averages.

    What can be told of a scan without any encoder.
    """
    flat = scans if scans.ndim == 4 else scans[:, :, scans.shape[2] // 2]
    return F.adaptive_avg_pool2d(flat.float(), _FLOOR_SIDE).flatten(1).numpy()
