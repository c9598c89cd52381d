"""Reading the weights that the authors of UniMiSS released, under our names.

Released files are dicts with `student`, `teacher` and training state, written by torch.save; only tensors, plain
containers and one class, `argparse.Namespace`, are accepted from them.

Files of UniMiSS+ (TPAMI 2024) are laid out alike, but hold another network, MiTplus, with which MiT shares no tensor:
they are known by its first convolutions, and refused in words. docs/export.md says what differs.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from unimiss_core import progress
from unimiss_core.errors import CheckpointError
from unimiss_core.model import ARCHITECTURES, Size
from unimiss_core.network import empty_network
from unimiss_core.study import ModelConfig

PUBLISHED_IMAGE_SIZE = (224, 224)
PUBLISHED_VOLUME_SIZE = (16, 96, 96)
PUBLISHED_SIZES: tuple[Size, ...] = ("tiny", "small")

_GAIN = "head.last_layer.weight_g"
_PROTOTYPES = "head.last_layer.weight_v"
_OF_PLUS = re.compile(r"backbone\.transformer\.ConvBlock[23]D[01]\.")
"""Convolutions before the first stage, which only the network of UniMiSS+ has."""

# Ours -> released; {0} is a number counted from 0 in both, {0+1} one that the released code counts from 1.
_NAMES = {
    r"backbone\.encoder\.stem\.(\d)d\.(.+)": "backbone.transformer.patch_embed{0}D0.{1}",
    r"backbone\.encoder\.class_token": "backbone.transformer.cls_tokens1",
    r"backbone\.encoder\.stages\.(\d)\.class_token\.(.+)": "backbone.transformer.cls_tokens{0+1}.{1}",
    r"backbone\.encoder\.stages\.(\d)\.embed\.(\d)d\.(.+)": "backbone.transformer.patch_embed{1}D{0+1}.proj.{2}",
    r"backbone\.encoder\.stages\.(\d)\.position\.(\d)d\.table": "backbone.transformer.pos_embed{1}D{0+1}",
    r"backbone\.encoder\.stages\.(\d)\.blocks\.(.+)": "backbone.transformer.block{0+1}.{1}",
    r"backbone\.decoder\.stages\.(\d)\.class_token\.(.+)": "backbone.cls_tokens{0}.{1}",
    r"backbone\.decoder\.stages\.(\d)\.embed\.(\d)d\.(.+)": "backbone.DecEmbed{1}D{0}.proj.{2}",
    r"backbone\.decoder\.stages\.(\d)\.position\.(\d)d\.table": "backbone.DecPosEmbed{1}D{0}",
    r"backbone\.decoder\.stages\.(\d)\.blocks\.(.+)": "backbone.Decblock{0}.{1}",
    r"backbone\.decoder\.norm\.(.+)": "backbone.norm.{0}",
    r"head\.mlp\.(.+)": "head.mlp.{0}",
    r"head\.prototypes\.weight": _PROTOTYPES,
}
_NAMES_IN_BLOCKS = {
    ".attention.query.": ".attn.q.",
    ".attention.key_value.": ".attn.kv.",
    ".attention.project.": ".attn.proj.",
    ".attention.reduce.2d.": ".attn.sr2D.",
    ".attention.reduce.3d.": ".attn.sr3D.",
    ".attention.reduce_norm.": ".attn.norm.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
}


@dataclass(frozen=True)
class Released:
    """A released checkpoint under our names: what it is, and both networks' tensors on the CPU."""

    model: ModelConfig
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def read_released(path: Path) -> Released:
    """Read a released file. Its size is recognised from its tensors, its number of prototypes from its head.

    A file without a `teacher`, as some are passed on, gives its student in both places, and a `progress.Note` says so.

    Raises CheckpointError: not such a file, holds other classes than allowed, or its tensors are not those of the
    published model, each with what is wrong.
    """
    content = _load(path)
    held = content if isinstance(content, dict) else {}
    if "student" not in held or not all(isinstance(held.get(part, {}), Mapping) for part in ("student", "teacher")):
        raise CheckpointError(f"{path}: expected a dict with 'student' and 'teacher' tensors, as UniMiSS released them")
    student = _bare_names(held["student"], path)
    if "teacher" not in held:
        progress.report(progress.Note("the file has no teacher: its student stands in both places"))
    teacher = _bare_names(held["teacher"] if "teacher" in held else held["student"], path)
    model = _recognise(student, path)
    return Released(model, _under_our_names(student, model, path), _under_our_names(teacher, model, path))


def under_our_names(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """One released network's tensors, in released spelling without `module.` -> under our names, in our shapes.

    Position tables and the class token lose their leading 1. The gain of the prototypes' weight normalisation must
    be 1 throughout, as it always is in the published recipe: our prototypes have no gain to put another into.
    Raises CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    return _under_our_names(tensors, model, None)


def released_names(model: ModelConfig) -> dict[str, str]:
    """Our name -> the released spelling, for every tensor of the network."""
    return {name: _released_name(name) for name, _ in empty_network(model).named_parameters()}


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # what torch raises for a damaged file is anybody's guess
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds {_shown(foreign[1])}, and only argparse.Namespace is allowed" if foreign else "it is damaged"
        )
        raise CheckpointError(f"{path}: is no released UniMiSS checkpoint that can be read safely: {reason}") from None


def _bare_names(part: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Without `module.`, which DistributedDataParallel puts before each name."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in part.items() if isinstance(name, str)}
    if len(tensors) != len(part) or not all(_is_plain(tensor) for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: 'student' and 'teacher' must hold plain tensors of real numbers, each by its name"
        )
    return tensors


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _recognise(tensors: Mapping[str, Tensor], path: Path) -> ModelConfig:
    if any(_OF_PLUS.match(name) for name in tensors):
        raise CheckpointError(
            f"{path}: holds MiTplus, the network of UniMiSS+, whose widths and layers are others than those of MiT, "
            "the one network of this program; import weights of UniMiSS, or pretrain by the objective unimiss_plus"
        )
    depths = tuple(
        len({name.split(".")[3] for name in tensors if name.startswith(f"backbone.transformer.block{i}.")})
        for i in range(1, 5)
    )
    sizes = [size for size in PUBLISHED_SIZES if ARCHITECTURES[size].encoder_depths == depths]
    if not sizes:
        known = ", ".join(f"{size} {ARCHITECTURES[size].encoder_depths}" for size in PUBLISHED_SIZES)
        raise CheckpointError(f"{path}: encoder depths {depths} are those of no published model; known: {known}")
    if _PROTOTYPES not in tensors:
        raise CheckpointError(f"{path}: has no '{_PROTOTYPES}'; expected a checkpoint with its projection head")
    prototypes = tensors[_PROTOTYPES]
    try:
        return ModelConfig(
            size=sizes[0],
            image_size=PUBLISHED_IMAGE_SIZE,
            volume_size=PUBLISHED_VOLUME_SIZE,
            prototypes=prototypes.shape[0] if prototypes.ndim == 2 else 0,
        )
    except ValidationError:
        raise CheckpointError(
            f"{path}: '{_PROTOTYPES}' is {tuple(prototypes.shape)}; expected (prototypes, features), 2 to 2**20 rows"
        ) from None


def _under_our_names(tensors: Mapping[str, Tensor], model: ModelConfig, path: Path | None) -> dict[str, Tensor]:
    where = f"{path}: " if path else ""
    expected = {name: parameter.shape for name, parameter in empty_network(model).named_parameters()}
    names = released_names(model)
    problems = [f"missing {name}" for name in sorted({*names.values(), _GAIN} - tensors.keys())]
    problems += [f"unexpected {_shown(name)}" for name in sorted(tensors.keys() - {*names.values(), _GAIN})]
    ours: dict[str, Tensor] = {}
    for name, released in names.items():
        if released not in tensors:
            continue
        tensor = tensors[released]
        ours[name] = tensor.squeeze(0) if _has_leading_one(name) and tensor.shape[:1] == (1,) else tensor
        if ours[name].shape != expected[name]:
            problems.append(f"{released} is {tuple(tensor.shape)}, which does not fit {tuple(expected[name])}")
        elif not tensor.to(torch.float32).isfinite().all():
            problems.append(f"{released} is not finite")
    if _GAIN in tensors and not (tensors[_GAIN] == 1).all():
        problems.append(f"{_GAIN} is not 1 throughout; prototypes of unit length cannot hold another gain")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{where}not the published {model.size} model: {'; '.join(problems[:5])}{more}")
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in ours.items()}


def _shown(name: str) -> str:
    """A name out of a foreign file, fit for a terminal."""
    return ascii(name)[1:-1][:100]


def _has_leading_one(name: str) -> bool:
    return name.endswith((".table", "encoder.class_token"))


def _released_name(ours: str) -> str:
    for pattern, template in _NAMES.items():
        if match := re.fullmatch(pattern, ours):
            name = template
            for i, text in enumerate(match.groups()):
                name = name.replace(f"{{{i}}}", text)
                name = name.replace(f"{{{i}+1}}", str(int(text) + 1)) if text.isdigit() else name
            for mine, theirs in _NAMES_IN_BLOCKS.items():
                name = name.replace(mine, theirs) if ".block" in name or ".Decblock" in name else name
            return name
    raise AssertionError(f"no released name for {ours}")
