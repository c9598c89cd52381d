import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.finetune_config import FinetuneConfig, TrainingConfig
from client.label_tables import Case
from client.labelled import Grid, Labelled
from client.task_training import (
    Training,
    classification_loss,
    drawn_batches,
    rate_share,
    tensors_of,
)
from tests.test_label_tables import BINARY, configured
from unimiss_core.errors import CheckpointError, NonFiniteLossError
from unimiss_core.study import ModelConfig
from unimiss_core.task_config import ClassificationConfig
from unimiss_core.tasks import build_task_model

SIZE = (33, 40)
CPU = torch.device("cpu")


def scans(count: int, *, rare: int = 3) -> list[Labelled]:
    """Noise, brighter where the class is 1."""
    made = []
    for number in range(count):
        target = int(number % rare == 0)
        values = np.random.default_rng(number).random((1, 36, 44)) * 0.5 + 0.4 * target
        stored = (values * 65535).astype(np.uint16)
        made.append(Labelled(Case(number, "", str(number), (target,)), stored, Grid((36, 44), (1, 1), (1, 1), None)))
    return made


def config(task: dict[str, Any] | None = None, **training: Any) -> FinetuneConfig:
    return configured(Path(), task or BINARY, {"table": "t.csv"}, training=training)


def training(settings: FinetuneConfig, found: list[Labelled], score: Any = None) -> Training:
    model = build_task_model(
        ModelConfig(prototypes=16), ClassificationConfig(rank=2, classes=("a", "b")), seed=0, pretrained=None
    )
    loss = classification_loss(found, settings, CPU)
    return Training(model, found, settings, loss=loss, score=score or (lambda _: (0.0, 0.0)), device=CPU, size=SIZE)


def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(tmp_path: Path) -> None:
    settings, found = config(epochs=3, batch=4, steps_per_epoch=2), scans(9)
    whole = training(settings, found)
    whole.run(lambda _: None)

    class KilledError(Exception):
        pass

    def save_then_die(now: Training) -> None:
        now.save(tmp_path, "digest")
        if now.progress.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        training(settings, found).run(save_then_die)
    resumed = training(settings, found)
    resumed.restore(tmp_path, "digest")
    assert resumed.progress.epoch == 2
    resumed.run(lambda _: None)
    assert resumed.progress == whole.progress
    for name, tensor in tensors_of(whole.model).items():
        assert torch.equal(tensor, tensors_of(resumed.model)[name]), name
    with pytest.raises(CheckpointError, match="of another fine-tuning"):
        training(settings, found).restore(tmp_path, "other")


def test_training_stops_when_its_score_does_not_rise_and_keeps_the_best() -> None:
    told = iter([(0.5, 0.0), (0.7, -2.0), (0.7, -1.0), (0.6, 0.0), (0.7, -1.0), (0.8, 0.0)])
    made = training(config(epochs=9, patience=2, steps_per_epoch=1), scans(4), score=lambda _: next(told))
    seen: list[dict[str, torch.Tensor]] = []
    made.run(lambda now: seen.append(tensors_of(now.model)))
    assert (made.progress.best_epoch, made.progress.best, made.progress.epoch) == (3, (0.7, -1.0), 5)
    assert all(torch.equal(made.best[name], tensor) for name, tensor in seen[2].items())


def test_what_is_frozen_does_not_move_and_what_is_trained_learns() -> None:
    settings, found = config(epochs=12, batch=6, lr=0.05, trains="linear_probe", patience=None), scans(12, rare=2)
    made = training(settings, found)
    before = tensors_of(made.model)
    made.run(lambda _: None)
    moved = {name for name, tensor in tensors_of(made.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.linear.weight", "head.linear.bias"}
    assert made.progress.curve[-1].loss < 0.7 * made.progress.curve[0].loss


def test_a_loss_that_is_no_number_stops_training_in_words() -> None:
    made = training(config(epochs=1), scans(4))
    with torch.no_grad():
        made.model.head.linear.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"smaller training\.lr"):
        made.run(lambda _: None)


def test_rates_rise_then_fall_to_a_hundredth() -> None:
    shares = [rate_share(step, 10, TrainingConfig(epochs=5, warmup_epochs=1.0)) for step in range(50)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0
    assert shares[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))


def test_everyone_comes_in_turn_or_every_class_as_often() -> None:
    found = scans(40, rare=8)
    in_turn = drawn_batches(found, config(balance="loss"), 0, steps=20, batch=4)
    assert sorted(number for batch in in_turn for number in batch) == sorted([*range(40), *range(40)])
    assert in_turn != drawn_batches(found, config(balance="loss"), 1, steps=20, batch=4)
    balanced = drawn_batches(found, config(balance="sampling"), 0, steps=200, batch=4)
    rare = np.mean([found[number].case.target[0] for batch in balanced for number in batch])
    assert 0.45 < rare < 0.55


def test_a_balanced_loss_weighs_each_class_alike() -> None:
    """At equal logits the loss' gradient on the class scores cancels over the training set: neither class pulls."""
    found = scans(40, rare=8)
    truth = torch.tensor([one.case.target[0] for one in found])
    for balance, cancels in {"loss": True, "none": False}.items():
        logits = torch.zeros(40, 2, requires_grad=True)
        classification_loss(found, config(balance=balance), CPU)(logits, truth).backward()
        assert logits.grad is not None
        assert (logits.grad.sum(0).abs().max() < 1e-6) == cancels
