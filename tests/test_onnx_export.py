"""Graphs are asked by onnxruntime and held against torch, or against what the published code answered."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from client import onnx_export
from client.onnx_export import EncoderOutputs, Graph, difference, fitted, graph_of
from client.research_command import main
from tests.published import golden, image, needs_reference, recipe_weights
from unimiss_core.errors import ExportError
from unimiss_core.layers import PositionTable
from unimiss_core.model import Architecture, MiT, token_grids
from unimiss_core.network import initialise_
from unimiss_core.tasks import Segmenter, TaskModel

ROOT = Path(__file__).parents[1]
SHALLOW = Architecture(
    stem=4, widths=(8, 8, 8, 8), encoder_depths=(1, 0, 0, 0), decoder_depths=(0, 0, 1), head_hidden=8, bottleneck=8
)
"""Every kind of layer once: tracing costs seconds for each block."""
SIZE = (13, 34, 47)
"""Odd, and not what the position tables below are made for."""


def small_task_model() -> TaskModel:
    backbone = MiT(SHALLOW, {3: (16, 64, 64)})
    model = TaskModel(backbone, Segmenter(3, width=SHALLOW.width, stem=SHALLOW.stem, outputs=3)).eval()
    initialise_(model, 0)
    for module in model.modules():
        if isinstance(module, PositionTable):
            nn.init.normal_(module.table, generator=torch.Generator().manual_seed(1))  # so that a wrong resize shows
    return model.requires_grad_(False)


def asked(graph: bytes, scans: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    answers: list[np.ndarray] = session.run(None, {"scan": scans})
    return answers


@pytest.fixture(scope="module")
def traced() -> tuple[TaskModel, Graph]:
    model = small_task_model()
    return model, graph_of(model, SIZE, channels=1, outputs=["logits"], facts={"unimiss.holds": "segmentation"})


def test_a_volumes_graph_answers_as_torch_for_any_batch_at_a_size_of_its_own(traced: tuple[TaskModel, Graph]) -> None:
    model, graph = traced
    for batch in (1, 4):
        scans = torch.randn(batch, 1, *SIZE, generator=torch.Generator().manual_seed(batch))
        (found,) = asked(graph.payload, scans.numpy())
        torch.testing.assert_close(torch.from_numpy(found), model(scans), atol=1e-4, rtol=1e-4)
    assert graph.config.input == ("batch", 1, *SIZE)
    assert graph.config.outputs == {"logits": ("batch", 3, *SIZE)}
    assert 0 < graph.config.largest_difference <= 1e-4


def test_a_graph_says_what_it_is_and_not_where_it_was_made(traced: tuple[TaskModel, Graph]) -> None:
    payload = traced[1].payload
    assert {prop.key: prop.value for prop in onnx.load_from_string(payload).metadata_props} == {
        "unimiss.holds": "segmentation"
    }
    for place in (str(ROOT), str(Path(torch.__file__).parent), "model.py"):
        assert place.encode() not in payload


def test_a_graph_of_other_weights_is_refused(traced: tuple[TaskModel, Graph]) -> None:
    other = small_task_model()
    other.head.classes.bias += 1e-2
    with pytest.raises(ExportError, match=r"answers otherwise than torch: by .*e-0[23] .*, expected at most 1e-04"):
        onnx_export._checked(traced[1].payload, other, SIZE, channels=1, outputs=["logits"])


def test_what_is_refused_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, traced: tuple[TaskModel, Graph]
) -> None:
    from tests.test_research_command import nano_checkpoint

    folder = nano_checkpoint(tmp_path / "checkpoints" / "round-0001")
    monkeypatch.setattr("client.onnx_export._traced", lambda *_, **__: traced[1].payload)
    monkeypatch.setattr("client.onnx_export._answers", lambda *_, **__: [np.zeros((1, 32)), np.zeros((1, 257, 32))])
    arguments = ["export", str(folder), "--to", "onnx", "--input-size", "64", "64", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "answers otherwise than torch" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_fitted_tables_change_no_number_and_are_resized_no_more() -> None:
    model, scans = small_task_model(), torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    made = fitted(model, SIZE, channels=1)
    assert torch.equal(made(scans), model(scans))
    grids = [module.grid for module in made.modules() if isinstance(module, PositionTable)]
    finest = token_grids(SIZE)
    assert sorted(grids) == sorted([*finest, *finest[:3]])
    assert next(module for module in model.modules() if isinstance(module, PositionTable)).grid == (8, 16, 16)


def test_an_encoder_answers_features_and_tokens_in_one_pass() -> None:
    encoder = MiT(SHALLOW, {2: (40, 40)})
    initialise_(encoder, 0)
    scans = torch.rand(2, 1, 40, 40)
    features, tokens = EncoderOutputs(encoder)(scans)
    torch.testing.assert_close(features, encoder(scans))
    assert torch.equal(features, tokens[:, 0])
    assert tokens.shape == (2, 101, 8)


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.1, 0.2], [0.1, 0.25], 0.05),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([np.inf], [np.inf], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_a_difference_is_a_share_of_the_largest_value_where_that_is_above_one(
    found: Any, expected: Any, told: float
) -> None:
    assert difference(np.array(found), np.array(expected)) == pytest.approx(told)


@needs_reference
def test_the_graph_of_an_imported_release_answers_what_the_published_code_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = recipe_weights("tiny", "")
    torch.save({"student": weights, "teacher": weights}, tmp_path / "released.pth")
    assert main(["import", str(tmp_path / "released.pth"), str(tmp_path / "imported")]) == 0
    arguments = ["--to", "onnx", "--input-size", "224", "224", "--channels", "3", "--out", str(tmp_path / "onnx")]
    assert main(["export", str(tmp_path / "imported"), *arguments]) == 0
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"encoder-2d.onnx", "config.json", "README.md"}
    features, tokens = asked((tmp_path / "onnx" / "encoder-2d.onnx").read_bytes(), image("x2d").numpy())
    np.testing.assert_allclose(features, golden("tiny")["features2d"], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(tokens[:, 0], features)
    figure = capsys.readouterr().out.split("differs from torch by ")[1].split()[0]
    assert 0 < float(figure) <= 1e-4
    assert figure in (tmp_path / "onnx" / "README.md").read_text()
