"""Reading the weights that the authors of UniMiSS released, under our names.

Released files are dicts with `student`, `teacher` and training state, written by torch.save; only tensors, plain
containers and one class, `argparse.Namespace`, are accepted from them.

Files of UniMiSS (ECCV 2022) hold MiT, files of UniMiSS+ (TPAMI 2024) MiTplus with its reconstruction: the two are told
apart by MiTplus's first convolutions, and laid out alike.
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
from unimiss_core.model import ARCHITECTURES
from unimiss_core.model_config import MiTSize
from unimiss_core.network import empty_network
from unimiss_core.released_names import GAIN, PROTOTYPES, as_ours, released_name
from unimiss_core.study import ModelConfig

PUBLISHED_IMAGE_SIZE = (224, 224)
PUBLISHED_IMAGE_SIZE_OF_PLUS = (96, 96)
PUBLISHED_VOLUME_SIZE = (16, 96, 96)
PUBLISHED_SIZES: tuple[MiTSize, ...] = ("tiny", "small")

_OF_PLUS = re.compile(r"backbone\.transformer\.ConvBlock[23]D[01]\.")
"""Convolutions before the first stage, which only MiTplus has."""


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
        bare = any(isinstance(value, Tensor) for value in held.values())
        found = "; got one model's tensors alone, with which no head and no teacher came" if bare else ""
        raise CheckpointError(
            f"{path}: expected a dict with 'student' and 'teacher' tensors, as UniMiSS released them{found}"
        )
    student = _bare_names(held["student"], path)
    if "teacher" not in held:
        progress.report(progress.Note("the file has no teacher: its student stands in both places"))
    teacher = _bare_names(held["teacher"] if "teacher" in held else held["student"], path)
    model = _recognise(student, path)
    return Released(model, _under_our_names(student, model, path), _under_our_names(teacher, model, path))


def under_our_names(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """One released network's tensors, in released spelling without `module.` -> under our names, in our shapes.

    Position tables and the class token lose their leading 1, the reconstruction's kernels change channels in for out.
    The gain of the prototypes' weight normalisation must be 1 throughout, as it always is in the published recipe: our
    prototypes have no gain to put another into.
    Raises CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    return _under_our_names(tensors, model, None)


def released_names(model: ModelConfig) -> dict[str, str]:
    """Our name -> the released spelling, for every tensor of the network."""
    return {name: released_name(name, plus=model.is_plus) for name, _ in empty_network(model).named_parameters()}


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
    plus = any(_OF_PLUS.match(name) for name in tensors)
    size = "plus" if plus else _size_of_mit(tensors, path)
    if PROTOTYPES not in tensors:
        raise CheckpointError(f"{path}: has no '{PROTOTYPES}'; expected a checkpoint with its projection head")
    prototypes = tensors[PROTOTYPES]
    try:
        return ModelConfig(
            size=size,
            image_size=PUBLISHED_IMAGE_SIZE_OF_PLUS if plus else PUBLISHED_IMAGE_SIZE,
            volume_size=PUBLISHED_VOLUME_SIZE,
            prototypes=prototypes.shape[0] if prototypes.ndim == 2 else 0,
            reconstruction=plus,
        )
    except ValidationError:
        raise CheckpointError(
            f"{path}: '{PROTOTYPES}' is {tuple(prototypes.shape)}; expected (prototypes, features), 2 to 2**20 rows"
        ) from None


def _size_of_mit(tensors: Mapping[str, Tensor], path: Path) -> MiTSize:
    depths = tuple(
        len({name.split(".")[3] for name in tensors if name.startswith(f"backbone.transformer.block{i}.")})
        for i in range(1, 5)
    )
    sizes = [size for size in PUBLISHED_SIZES if ARCHITECTURES[size].encoder_depths == depths]
    if not sizes:
        known = ", ".join(f"{size} {ARCHITECTURES[size].encoder_depths}" for size in PUBLISHED_SIZES)
        raise CheckpointError(f"{path}: encoder depths {depths} are those of no published model; known: {known}")
    return sizes[0]


def _under_our_names(tensors: Mapping[str, Tensor], model: ModelConfig, path: Path | None) -> dict[str, Tensor]:
    where = f"{path}: " if path else ""
    expected = {name: parameter.shape for name, parameter in empty_network(model).named_parameters()}
    names = released_names(model)
    problems = [f"missing {name}" for name in sorted({*names.values(), GAIN} - tensors.keys())]
    problems += [f"unexpected {_shown(name)}" for name in sorted(tensors.keys() - {*names.values(), GAIN})]
    ours: dict[str, Tensor] = {}
    for name, released in names.items():
        if released not in tensors:
            continue
        tensor = tensors[released]
        ours[name] = as_ours(name, tensor)
        if ours[name].shape != expected[name]:
            problems.append(f"{released} is {tuple(tensor.shape)}, which does not fit {tuple(expected[name])}")
        elif not tensor.to(torch.float32).isfinite().all():
            problems.append(f"{released} is not finite")
    if GAIN in tensors and not (tensors[GAIN] == 1).all():
        problems.append(f"{GAIN} is not 1 throughout; prototypes of unit length cannot hold another gain")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{where}not the published {model.size} model: {'; '.join(problems[:5])}{more}")
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in ours.items()}


def _shown(name: str) -> str:
    """A name out of a foreign file, fit for a terminal."""
    return ascii(name)[1:-1][:100]
