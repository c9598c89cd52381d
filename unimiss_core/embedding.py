"""What an encoder says about scans: one feature vector for each, without training.

Legend of shapes: N scans, C channels, S spatial axes - (H, W) or (D, H, W).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.backbone import Backbone, backbone_of
from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import ScanError
from unimiss_core.network import below, empty_network, load_tensors_
from unimiss_core.plan import prepare
from unimiss_core.scan import Rank, Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.unvalued import unvalued
from unimiss_core.views import whole

_FLOOR_SIDE = 16


def encoder_of(model: ModelConfig, tensors: Mapping[str, Tensor], rank: Rank | None = None) -> Backbone:
    """The backbone of a whole network's tensors, or of a task's model, which is of one rank.

    Raises CheckpointError: they do not fit the model.
    """
    if rank is None:
        network = empty_network(model).to_empty(device="cpu")
        load_tensors_(network, tensors)
        backbone = network.backbone
    else:
        with unvalued():
            backbone = backbone_of(model, {rank})
        load_tensors_(backbone.to_empty(device="cpu"), below("backbone.", tensors))
    return backbone.eval().requires_grad_(False)


def seen_whole(scan: Scan, plan: PlanConfig, size: Sequence[int]) -> Tensor:
    """(C, *size) as an encoder takes it: prepared by the plan, and resized as a whole. Raises ScanError."""
    try:
        values, _ = prepare(scan, plan)
        return whole(values, size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ScanError("out_of_memory") from None


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
