"""The benchmark's count of bytes is what messages weigh, and the goals hold on the published model."""

import numpy as np
import pytest
import torch

from benchmarks.wire import GOALS, SITES, Updates, block_errors, traffic
from tests.federation import RUN, StubSite, layout_for, random_tensors, reply_with, small_study
from unimiss_core.codec import TensorSpec
from unimiss_core.formats import BLOCK
from unimiss_core.study import ModelConfig
from unimiss_core.wire import TrainRequest, num_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", SITES)
def test_traffic_is_what_messages_weigh(kind: str, dtype: str) -> None:
    study = small_study(wire={"dtype": dtype})
    layout = layout_for(SITES[kind])
    tensors = random_tensors(layout, 0)
    by_step = {"student": None, "student_step": tensors} if dtype == "int8" else {"student": tensors}
    request = TrainRequest(study=study, run=RUN, round=3, teacher=None, teacher_retention={}, **by_step)
    first = TrainRequest(study=study, run=RUN, round=3, student=tensors, teacher=tensors, teacher_retention={})
    reply = reply_with(tensors, request, StubSite("a", dict.fromkeys(SITES[kind], 4)))
    counted = traffic(study.model, SITES[kind], dtype)
    assert counted.down == num_bytes(request.pack(layout))
    assert counted.first_down == num_bytes(first.pack(layout))
    assert counted.up == num_bytes(reply.pack(layout, dtype))


@pytest.mark.parametrize("prototypes", [65_536, 1_024])
@pytest.mark.parametrize("dtype", GOALS)
def test_a_site_of_images_moves_no_more_than_is_asked(dtype: str, prototypes: int) -> None:
    model = ModelConfig(size="small", image_size=(224, 224), volume_size=(16, 96, 96), prototypes=prototypes)
    assert traffic(model, SITES["2D only"], dtype).share <= GOALS[dtype]


def test_the_block_quantiser_of_the_chosen_shape_is_the_one_of_the_wire() -> None:
    layout = {"shared": (TensorSpec("a", (3, 700)),), "head": (TensorSpec("b", (41,)),)}
    update = random_tensors(layout, 3)  # type: ignore[arg-type]
    ours = Updates(layout, "int8")  # type: ignore[arg-type]
    ours.add(update)
    (found,) = (e for name, e in block_errors(update, layout) if name.startswith(f"{BLOCK} values, bf16 up"))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, ours.figures()["per_round"], rtol=1e-4)


def test_feedback_shows_in_the_sum() -> None:
    layout = {"shared": (TensorSpec("a", (500,)),)}
    updates = Updates(layout, "int8")  # type: ignore[arg-type]
    for _ in range(20):
        updates.add({"a": torch.linspace(-1, 1, 500)})
    figures = updates.figures()
    assert figures["sum_with_feedback"] < figures["sum_without_feedback"] / 5
