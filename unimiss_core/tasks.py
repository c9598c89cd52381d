"""A backbone with a head for a doctor's task: a class for a scan, or one for each of its voxels.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, G the decoder's grid, K outputs.

The backbone's tensors keep the names that they have in pretraining (`backbone.*`), so a checkpoint's tensors fit
without a map between names. A task is of one rank: the tensors of the other are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimiss_core.backbone import Backbone, backbone_of
from unimiss_core.convolution import CONV, CONV_TRANSPOSED
from unimiss_core.errors import CheckpointError
from unimiss_core.head import at_least_float32
from unimiss_core.layers import CHANNELS, STEM_STRIDE, ConvBlock, cropped
from unimiss_core.model import MiT
from unimiss_core.model_config import ModelConfig
from unimiss_core.network import initialise_
from unimiss_core.scan import Rank
from unimiss_core.task_config import SegmentationConfig, TaskConfig, Trains
from unimiss_core.unvalued import unvalued

_BACKBONE = "backbone."
HEAD_KERNEL = "head.input.conv.weight"
"""Of a `Segmenter`, what convolves the scan itself, (O, C, *k), as `backbone.scan_kernel` does."""
FULL_WIDTH = 16
"""Channels of the map at full resolution: the widest of all in memory, so it is kept narrow."""


class TaskModel(nn.Module):
    """A backbone (`backbone.*`) and what makes an answer of its features (`head.*`)."""

    def __init__(self, backbone: Backbone, head: "Classifier | Segmenter | FineSegmenter") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *S) -> logits in float32: (B, K) of a class, or (B, K, *S) of a mask.

        Raises ValueError: a rank, channels or a size that do not fit the backbone.
        """
        logits: Tensor = self.head(self.backbone, x)
        return at_least_float32(logits)


class Classifier(nn.Module):
    """One linear layer on the class token."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.linear = nn.Linear(width, outputs)

    def forward(self, backbone: Backbone, x: Tensor) -> Tensor:
        """x (B, C, *S) -> (B, K)."""
        logits: Tensor = self.linear(backbone(x))
        return logits


class Segmenter(nn.Module):
    """MiT's decoder goes on to full resolution, by a transposed convolution for each halving that is left.

    First to the stem's grid, whose map is added, then to the input's, to which a convolution of the input is added:
    the U-shape of the published decoder (transposed convolution with kernel = stride, plus the map of that
    resolution), continued. Odd axes: what doubling adds beyond the finer map is left off, as in MiT's decoder.
    """

    def __init__(self, rank: Rank, *, channels: int | None = None, width: int, stem: int, outputs: int) -> None:
        """channels: as of the backbone."""
        super().__init__()
        self.outputs = outputs
        up: Any = CONV_TRANSPOSED[rank]
        self.to_stem = up(width, stem, 2, 2)
        self.at_stem = ConvBlock(rank, stem, stem, 3, 1)
        self.to_full = up(stem, FULL_WIDTH, STEM_STRIDE[rank], STEM_STRIDE[rank])
        self.input = ConvBlock(rank, channels or CHANNELS[rank], FULL_WIDTH, 3, 1)
        self.at_full = ConvBlock(rank, FULL_WIDTH, FULL_WIDTH, 3, 1)
        self.classes = CONV[rank](FULL_WIDTH, outputs, 1)

    def forward(self, backbone: Backbone, x: Tensor) -> Tensor:
        """x (B, C, *S) -> (B, K, *S)."""
        found = backbone.features(x)
        fine = self.at_stem(cropped(self.to_stem(found.decoder_map), found.stem_map.shape[2:]) + found.stem_map)
        fine = self.at_full(cropped(self.to_full(fine), x.shape[2:]) + self.input(x))
        logits: Tensor = self.classes(fine)
        return logits


class FineSegmenter(nn.Module):
    """A 1x1 convolution of a map that is as fine as the scan, as the authors of MiTplus put it on their decoder."""

    def __init__(self, rank: Rank, *, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.classes = CONV[rank](width, outputs, 1)

    def forward(self, backbone: Backbone, x: Tensor) -> Tensor:
        """x (B, C, *S) -> (B, K, *S)."""
        logits: Tensor = self.classes(backbone.features(x).decoder_map)
        return logits


def build_task_model(
    model: ModelConfig,
    task: TaskConfig,
    *,
    seed: int,
    pretrained: Mapping[str, Tensor] | None,
    takes_head: bool = False,
) -> TaskModel:
    """A task's model on the CPU, in float32.

    pretrained: a whole network's tensors, by the names of pretraining, of which the backbone's of the task's rank are
    taken, for scans of the task's channels (`unimiss_core.channels`); None begins at random. takes_head: `pretrained`
    is of a model for the same task, and its head is taken, too.
    Every tensor follows from the seed and its name alone; the global random state is neither read nor moved.
    Raises CheckpointError: a tensor is missing or of another shape.
    """
    made = empty_task_model(model, task).to_empty(device="cpu")
    taken = set() if pretrained is None else _take_(made, pretrained, "" if takes_head else _BACKBONE)
    initialise_(made, seed, but=taken)
    return made


def load_task_model(model: ModelConfig, task: TaskConfig, *, tensors: Mapping[str, Tensor]) -> TaskModel:
    """The model that holds exactly these tensors. Raises CheckpointError: they are not those of this model."""
    made = empty_task_model(model, task)
    expected = {name: parameter.shape for name, parameter in made.named_parameters()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        odd = sorted(expected.keys() ^ tensors.keys()) or sorted(n for n in expected if expected[n] != tensors[n].shape)
        raise CheckpointError(f"the tensors are not those of the model that is described beside them: {odd[:3]}")
    made = made.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(tensors[name])
    return made.eval()


def empty_task_model(model: ModelConfig, task: TaskConfig) -> TaskModel:
    """A task's model on torch's meta device: names and shapes without values, memory or time."""
    with unvalued():
        backbone = backbone_of(model, {task.rank}, channels=task.channel_count)
        if isinstance(task, SegmentationConfig):
            return TaskModel(backbone, _segmenter(backbone, task))
        return TaskModel(backbone, Classifier(backbone.num_features, task.outputs))


def _segmenter(backbone: Backbone, task: SegmentationConfig) -> Segmenter | FineSegmenter:
    width, outputs = backbone.map_width, task.outputs
    if isinstance(backbone, MiT):
        stem = backbone.architecture.stem
        return Segmenter(task.rank, channels=backbone.channels, width=width, stem=stem, outputs=outputs)
    return FineSegmenter(task.rank, width=width, outputs=outputs)


def _take_(made: TaskModel, pretrained: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Copy in the parameters whose names begin so; which they are."""
    own = {name: parameter for name, parameter in made.named_parameters() if name.startswith(prefix)}
    wrong = [name for name, p in own.items() if name not in pretrained or pretrained[name].shape != p.shape]
    if wrong:
        raise CheckpointError(f"the pretrained tensors do not fit the task's model: {wrong[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(pretrained[name])
    return set(own)


# ---------------------------------------------------------------------------------------------------------- training


def freeze_(model: TaskModel, trains: Trains) -> None:
    """Let gradients reach only what `trains` names, and of that only what the answer hangs on."""
    model.requires_grad_(True)
    for module in _unread(model):
        module.requires_grad_(False)
    if trains == "linear_probe":
        model.backbone.requires_grad_(False)
    elif trains == "frozen":
        model.backbone.encoder.requires_grad_(False)


def _unread(model: TaskModel) -> tuple[nn.Module, ...]:
    """What of the backbone has no part in the answer; it is kept for whoever goes on to a mask."""
    return model.backbone.of_maps_alone if isinstance(model.head, Classifier) else ()


def layers_of(model: TaskModel) -> dict[str, int]:
    """Parameter -> its layer, from 0 at the input; the head's is the highest.

    A layer is what lies between two changes of resolution: the stem with the class token's beginning, four encoder
    stages, three decoder stages (the last with all that follows it), the head. A decoder that has no part in the
    answer makes none: the head's is then next to the encoder's last.
    """
    encoder_stages = len(model.backbone.encoder.stages)
    reads_decoder = model.backbone.decoder not in _unread(model)
    top = encoder_stages + (len(model.backbone.decoder.stages) if reads_decoder else 0)

    def layer(name: str) -> int:
        part, *below = name.split(".")
        if part == "head":
            return top + 1
        coder, what, *rest = below
        if what == "stages":
            return min(top, 1 + int(rest[0]) + (encoder_stages if coder == "decoder" else 0))
        return 0 if coder == "encoder" else top

    return {name: layer(name) for name, _ in model.named_parameters()}


def rate_groups(model: TaskModel, *, lr: float, decay: float, weight_decay: float) -> Sequence[dict[str, Any]]:
    """Groups for an optimiser: layer l of L gets lr * decay^(L - l) (BEiT, arXiv:2106.08254, A.3; ELECTRA before it).

    Weight decay spares biases and other tensors of one axis, as in pretraining. Parameters without gradients are left
    out; each group remembers its rate as `peak`, which a schedule scales.
    """
    layers = layers_of(model)
    top = max(layers.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((layers[name], parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * decay ** (top - layer),
            "peak": lr * decay ** (top - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
