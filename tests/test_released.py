import argparse
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.published import SIZES, Published, needs_reference, plus_shapes, released_shapes
from unimiss_core import progress
from unimiss_core.config import load
from unimiss_core.errors import CheckpointError
from unimiss_core.network import empty_network
from unimiss_core.released import read_released, released_names
from unimiss_core.study import ModelConfig, StudyConfig

PLUS = ModelConfig(size="plus", image_size=(96, 96), volume_size=(16, 96, 96), prototypes=24, reconstruction=True)


class Foreign:
    """A class that no checkpoint may bring."""


def released_file(folder: Path, size: Published, prototypes: int = 24, **changes: Any) -> Path:
    """A file as the authors' code saves it; its tensors are views of single numbers, so it is small."""
    shapes = {
        name: [prototypes, *shape[1:]] if "last_layer" in name else shape
        for name, shape in released_shapes(size).items()
    }
    content = {
        "student": {f"module.{name}": filled(1.0, shape) for name, shape in shapes.items()},
        "teacher": {name: filled(1.0 if "weight_g" in name else 2.0, shape) for name, shape in shapes.items()},
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 400,
        "args": argparse.Namespace(arch="MiT", lr=0.0008),
        "loss": None,
    }
    path = folder / "released.pth"
    torch.save({**content, **changes}, path)
    return path


def filled(value: float, shape: list[int]) -> Tensor:
    return torch.tensor(value).expand(shape)


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_size_and_prototypes_are_recognised_and_every_tensor_finds_its_place(tmp_path: Path, size: Published) -> None:
    found = read_released(released_file(tmp_path, size))
    assert (found.model.size, found.model.prototypes) == (size, 24)
    assert (found.model.image_size, found.model.volume_size) == ((224, 224), (16, 96, 96))
    expected = {name: parameter.shape for name, parameter in empty_network(found.model).named_parameters()}
    assert {name: tensor.shape for name, tensor in found.student.items()} == expected
    assert all((tensor == 1.0).all() for tensor in found.student.values())
    assert all((tensor == 2.0).all() for tensor in found.teacher.values())


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_names_map_one_to_one_onto_the_released_ones(tmp_path: Path, size: Published) -> None:
    names = released_names(read_released(released_file(tmp_path, size)).model)
    assert len(set(names.values())) == len(names)
    assert {*names.values(), "head.last_layer.weight_g"} == released_shapes(size).keys()


@needs_reference
def test_a_file_with_another_class_is_never_unpickled(tmp_path: Path) -> None:
    path = released_file(tmp_path, "tiny", args=Foreign())
    with pytest.raises(CheckpointError, match=r"it holds tests\.test_released\.Foreign, and only argparse\.Namespace"):
        read_released(path)


@needs_reference
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("backbone.norm.weight", None, r"missing backbone\.norm\.weight"),
        ("backbone.pos_drop", torch.zeros(2), r"unexpected backbone\.pos_drop"),
        ("backbone.norm.bias", torch.zeros(47), r"backbone\.norm\.bias is \(47,\), which does not fit \(48,\)"),
        ("backbone.norm.bias", torch.full((48,), torch.nan), r"backbone\.norm\.bias is not finite"),
        ("head.last_layer.weight_g", torch.full((24, 1), 2.0), "weight_g is not 1 throughout"),
        ("backbone.transformer.pos_embed2D4", torch.zeros(1, 51, 512), r"pos_embed2D4 is \(1, 51, 512\)"),
        ("backbone.transformer.cls_tokens1", torch.tensor(1.0), r"cls_tokens1 is \(\), which does not fit"),
        ("backbone.norm.bias", torch.full((48,), 1e300, dtype=torch.float64), r"norm\.bias is not finite"),
        ("backbone.norm.bias", torch.zeros(48, dtype=torch.int64), "must hold plain tensors of real numbers"),
        (
            "backbone.norm.bias",
            torch.zeros(48).to_sparse(),
            "plain tensors of real numbers|be read safely",
        ),  # torch 2.11 reads none
        ("backbone.norm.bias", torch.zeros(48, device="meta"), "must hold plain tensors of real numbers"),
        ("backbone.norm.bias", 3, "must hold plain tensors of real numbers"),
        (7, torch.zeros(1), "must hold plain tensors of real numbers, each by its name"),
        ("\x1b[31m", torch.zeros(1), r"unexpected \\x1b\[31m"),
        ("head.last_layer.weight_v", torch.tensor(1.0), r"weight_v' is \(\); expected \(prototypes, features\)"),
        ("head.last_layer.weight_v", torch.zeros(0, 256), r"weight_v' is \(0, 256\); .* 2 to 2\*\*20 rows"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: Any, tensor: Any, message: str) -> None:
    path = released_file(tmp_path, "tiny")
    content = torch.load(path, weights_only=False)
    full_name = f"module.{name}" if isinstance(name, str) else name
    content["student"].pop(full_name, None)
    if tensor is not None:
        content["student"][full_name] = tensor
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_released(path)


@needs_reference
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_read_whole_or_refused_in_words(tmp_path: Path, zipped: bool) -> None:
    content = torch.load(released_file(tmp_path, "tiny"), weights_only=False)
    torch.save(content, path := tmp_path / "damaged.pth", _use_new_zipfile_serialization=zipped)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(12):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[chance.randrange(20_000)] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_released(path)


@needs_reference
def test_a_file_without_teacher_gives_its_student_in_both_places_and_says_so(tmp_path: Path) -> None:
    path = released_file(tmp_path, "tiny")
    content = torch.load(path, weights_only=False)
    del content["teacher"]
    torch.save(content, path)
    said: list[object] = []
    with progress.listen(said.append):
        found = read_released(path)
    assert said == [progress.Note("the file has no teacher: its student stands in both places")]
    assert all(torch.equal(found.student[name], found.teacher[name]) for name in found.student)


def plus_file(folder: Path, **changes: Any) -> Path:
    """A file as UniMiSS+ saves it: the student's names begin with `module.`, the teacher's do not."""
    shapes = plus_shapes(PLUS)
    content = {
        "student": {f"module.{name}": filled(1.0, shape) for name, shape in shapes.items()},
        "teacher": {name: filled(1.0 if "weight_g" in name else 2.0, shape) for name, shape in shapes.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 401,
        "args": argparse.Namespace(arch="MiTplus", img_size3D=[16, 96, 96]),
        "dino_loss": {"center": torch.zeros(1, 24)},
    }
    torch.save({**content, **changes}, path := folder / "plus.pth")
    return path


def test_a_file_of_unimiss_plus_is_recognised_and_every_tensor_finds_its_place(tmp_path: Path) -> None:
    found = read_released(plus_file(tmp_path))
    assert found.model == PLUS
    expected = {name: parameter.shape for name, parameter in empty_network(PLUS).named_parameters()}
    assert {name: tensor.shape for name, tensor in found.student.items()} == expected
    assert all((tensor == 1.0).all() for tensor in found.student.values())
    assert all((tensor == 2.0).all() for tensor in found.teacher.values())
    names = released_names(PLUS)
    assert len(set(names.values())) == len(names) == len(plus_shapes(PLUS)) - 1  # the gain has no place here


def test_the_example_study_of_unimiss_plus_can_start_from_a_released_file() -> None:
    study = load(StudyConfig, Path(__file__).parents[1] / "configs/study/unimiss_plus.yaml")
    assert study.model == PLUS.model_copy(update={"prototypes": 65_536})


def test_what_draws_is_turned_from_a_convolution_into_a_transposed_one(tmp_path: Path) -> None:
    path = plus_file(tmp_path)
    content = torch.load(path, weights_only=False)
    kernel = torch.arange(96.0).view(3, 32, 1, 1)
    content["student"]["module.backbone.recon_conv2D.weight"] = kernel
    torch.save(content, path)
    x = torch.randn(2, 32, 4, 5, generator=torch.Generator().manual_seed(0))
    ours = F.conv_transpose2d(x, read_released(path).student["reconstruction.patch.2d.weight"])
    torch.testing.assert_close(ours, F.conv2d(x, kernel))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("backbone.norm.weight", None, r"not the published plus model: missing backbone\.norm\.weight"),
        ("backbone.fc.weight", torch.zeros(2), r"unexpected backbone\.fc\.weight"),
        (
            "backbone.DecPosEmbed3D3",
            torch.zeros(1, 4609, 128),
            r"is \(1, 4609, 128\), which does not fit \(4608, 128\)",
        ),
        ("backbone.transformer.pos_embed2D1", torch.zeros(1, 3137, 128), r"pos_embed2D1 is \(1, 3137, 128\)"),
        ("backbone.recon_conv3D.weight", torch.zeros(2, 32, 1, 1, 1), r"recon_conv3D\.weight is \(2, 32, 1, 1, 1\)"),
        ("backbone.TransposeConv2D2.bias", torch.full((32,), torch.nan), r"TransposeConv2D2\.bias is not finite"),
        ("head.last_layer.weight_g", torch.full((24, 1), 2.0), "weight_g is not 1 throughout"),
        ("head.last_layer.weight_v", None, r"has no 'head\.last_layer\.weight_v'; expected .* its projection head"),
    ],
)
def test_tensors_of_unimiss_plus_that_do_not_fit_are_named(
    tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    path = plus_file(tmp_path)
    content = torch.load(path, weights_only=False)
    content["student"].pop(f"module.{name}", None)
    if tensor is not None:
        content["student"][f"module.{name}"] = tensor
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_released(path)


def test_what_the_authors_fine_tuned_is_told_from_what_they_pretrained(tmp_path: Path) -> None:
    torch.save({"ConvBlock2D0.0.conv.weight": torch.zeros(32, 3, 3, 3)}, path := tmp_path / "final.pth")
    with pytest.raises(CheckpointError, match=r"expected a dict with 'student'.*got one model's tensors alone, with"):
        read_released(path)


def test_what_is_no_released_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth: cannot be read \(No such file or directory\)"):
        read_released(tmp_path / "absent.pth")
    (garbage := tmp_path / "garbage.pth").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="it is damaged"):
        read_released(garbage)
    torch.save({"model": {}}, other := tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="expected a dict with 'student'"):
        read_released(other)
    torch.save({"student": {"a": torch.zeros(1)}, "teacher": {}}, strange := tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"encoder depths \(0, 0, 0, 0\) are those of no published model"):
        read_released(strange)
