"""The published implementation's measured values, and the recipe of their weights and inputs.

`reference/README.md` beside them says how they were made; where the folder is absent, tests that need it are skipped.
"""

import json
import zlib
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tests.shared_files import REFERENCE, needs
from unimiss_core.network import Network, empty_network, load_tensors_
from unimiss_core.released import released_names, under_our_names
from unimiss_core.study import ModelConfig

needs_reference = needs(REFERENCE)

Published = Literal["tiny", "small"]
SIZES: tuple[Published, ...] = ("tiny", "small")


def published_model(size: Published, *, prototypes: int = 512) -> ModelConfig:
    return ModelConfig(size=size, image_size=(224, 224), volume_size=(16, 96, 96), prototypes=prototypes)


def released_shapes(size: Published) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((REFERENCE / f"keys_{size}.json").read_text())
    return shapes


@cache
def network(size: Published, salt: str) -> Network:
    """The network with the recipe's weights, imported from their released names."""
    model = published_model(size)
    made = empty_network(model).to_empty(device="cpu")
    load_tensors_(made, under_our_names(recipe_weights(size, salt), model))
    return made


def recipe_weights(size: Published, salt: str) -> dict[str, Tensor]:
    """The recipe's weights under their released names."""
    return {name: _weight(salt + name, name, shape) for name, shape in released_shapes(size).items()}


def plus_weights(model: ModelConfig) -> dict[str, Tensor]:
    """The recipe's weights of MiTplus and its head under their released names. Their shapes are held against the
    published ones in `tests/test_mit_plus.py`."""
    return {name: _weight(name, name, shape) for name, shape in plus_shapes(model).items()}


def plus_shapes(model: ModelConfig) -> dict[str, list[int]]:
    """What a released file of UniMiSS+ must hold so that our network can take it, by our map of names."""
    ours = {name: list(p.shape) for name, p in empty_network(model).named_parameters()}
    shapes = {theirs: _as_released(name, ours[name]) for name, theirs in released_names(model).items()}
    return {**shapes, "head.last_layer.weight_g": [model.prototypes, 1]}


def _as_released(name: str, shape: list[int]) -> list[int]:
    if name.startswith("reconstruction.") and len(shape) > 1:
        return [shape[1], shape[0], *shape[2:]]
    return [1, *shape] if name.endswith((".table", "encoder.class_token")) else shape


def measured(size: Published) -> dict[str, Any]:
    """Loss terms and gradient norms of one step."""
    values: dict[str, Any] = json.loads((REFERENCE / f"step_{size}_open.json").read_text())
    return values


def golden(size: Published) -> dict[str, Tensor]:
    """Features and head outputs."""
    with np.load(REFERENCE / f"golden_{size}_open.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def image(name: str) -> Tensor:
    return torch.from_numpy(random_state(name).rand(2, 3, 224, 224).astype(np.float32))


def volume(name: str) -> Tensor:
    return torch.from_numpy(random_state(name).standard_normal((2, 1, 16, 96, 96)).astype(np.float32))


def views(rank: int) -> Tensor:
    """(2, 2, C, *S): the step's two views of two scans."""
    make = image if rank == 2 else volume
    return torch.stack([make(f"view{rank}d{i}") for i in range(2)], dim=1)


def centre_logits() -> Tensor:
    return torch.from_numpy((0.01 * random_state("center").standard_normal((1, 512))).astype(np.float32))[0]


def random_state(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def _weight(seed_name: str, name: str, shape: list[int]) -> Tensor:
    if name.endswith("weight_g"):
        return torch.ones(shape)
    normal = random_state(seed_name).standard_normal(shape)
    is_norm = "norm" in name and name.endswith("weight")
    return torch.from_numpy((1 + 0.05 * normal if is_norm else 0.05 * normal).astype(np.float32))
