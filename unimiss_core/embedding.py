"""What a pretrained encoder says about scans: one feature vector for each, without training.

Legend of shapes: N scans, C channels, S spatial axes - (H, W) or (D, H, W).
"""

from pathlib import Path

import torch
from torch import Tensor

from unimiss_core import checkpoint
from unimiss_core.checkpoint import Manifest
from unimiss_core.model import MiT
from unimiss_core.network import empty_network, load_tensors_


def load_encoder(folder: Path) -> tuple[MiT, Manifest]:
    """The backbone of a checkpoint's teacher, which embeds better than its student, and what the checkpoint says.

    Raises CheckpointError: no checkpoint there, or damaged.
    """
    found = checkpoint.load(folder)
    network = empty_network(found.manifest.model).to_empty(device="cpu")
    load_tensors_(network, found.teacher)
    return network.backbone.eval().requires_grad_(False), found.manifest


@torch.inference_mode()
def embed(encoder: MiT, scans: Tensor) -> Tensor:
    """scans (N, C, *S) as the plan prepares them -> features (N, width), float32, on the CPU.

    Raises ValueError: a shape that the encoder does not take.
    """
    device = next(encoder.parameters()).device
    features: Tensor = encoder(scans.to(device, torch.float32))
    return features.cpu()
