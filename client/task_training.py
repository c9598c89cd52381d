"""Training a task's model: the loop, its early stop, and its state on disk after every epoch.

Legend of shapes: B scans or windows, C channels, S spatial axes, K outputs.

Every draw - who is in a batch, what is cropped, how it is shaded - follows from seed, epoch and step alone. A training
that was killed goes on after its last whole epoch, and on a CPU with one thread ends bit for bit as if it had not been.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from client.finetune_config import FinetuneConfig, TrainingConfig, layer_decay_of
from client.labelled import Labelled
from client.training_views import crop_of, window_of
from client.tuning_settings import Settings, differences, settings_of
from unimiss_core import durable, progress
from unimiss_core.errors import CheckpointError, NonFiniteLossError
from unimiss_core.json_text import object_in
from unimiss_core.task_config import UNKNOWN, ClassificationConfig
from unimiss_core.tasks import TaskModel, freeze_, rate_groups
from unimiss_core.views import generator_for

STATE = "state.safetensors"
_VERSION = "2"
"""Of the state: of what its digest is made."""
_UNREADABLE = f"{STATE} cannot be read; begin anew in another folder"
_HEAVIEST = 20.0
"""Largest weight of a class in the loss, against an even share: a class of three scans must not lead the steps."""
_LEAST_RATE = 0.01
"""Share of the peak rate that the last step is taken at."""

Batch = tuple[Tensor, Tensor]
"""What the model sees (B, C, *S), and what it should say: classes (B,), labels or UNKNOWN (B, K), or masks (B, *S)."""
Loss = Callable[[Tensor, Tensor], Tensor]
Standing = tuple[float, float]
"""How good a model is on the validation scans: the score, higher being better, and what decides between equal ones."""
Score = Callable[[TaskModel], Standing]


@dataclass(frozen=True)
class Epoch:
    """One line of the curves."""

    epoch: int
    """From 1."""
    loss: float
    """Mean over its steps."""
    score: float | None
    """Of the validation scans; None where they were not looked at."""


@dataclass
class Progress:
    """Where a training stands after an epoch."""

    curve: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best: Standing = (-math.inf, -math.inf)

    @property
    def epoch(self) -> int:
        return len(self.curve)

    def is_over(self, config: TrainingConfig) -> bool:
        looks_since = sum(one.score is not None for one in self.curve[self.best_epoch :])
        return self.epoch >= config.epochs or (config.patience is not None and looks_since >= config.patience)


class Training:
    """A model in training with its optimiser, and the best tensors so far."""

    def __init__(
        self,
        model: TaskModel,
        scans: Sequence[Labelled],
        config: FinetuneConfig,
        *,
        loss: Loss,
        score: Score,
        device: torch.device,
        size: Sequence[int],
    ) -> None:
        """scans: those to train on. score: of the validation scans. size: S that the model sees."""
        self.model = model.to(device)
        self.scans, self.config, self.device, self.size = scans, config, device, tuple(size)
        self._loss, self._score = loss, score
        self.progress = Progress()
        self.best = tensors_of(model)
        train = config.training
        freeze_(model, train.trains)
        groups = rate_groups(model, lr=train.lr, decay=layer_decay_of(config), weight_decay=train.weight_decay)
        self._optimiser = torch.optim.AdamW(groups)
        self._batch = min(train.batch, len(scans))
        self.steps_per_epoch = train.steps_per_epoch or math.ceil(len(scans) / self._batch)

    def run(self, save: Callable[["Training"], None]) -> Progress:
        """Train to the end or the early stop; `save` is called after every epoch. `best` then holds the best tensors.

        Raises NonFiniteLossError.
        """
        while not self.progress.is_over(self.config.training):
            self._take_epoch()
            save(self)
        return self.progress

    def _take_epoch(self) -> None:
        done, train = self.progress, self.config.training
        epoch = done.epoch
        batches = drawn_batches(self.scans, self.config, epoch, steps=self.steps_per_epoch, batch=self._batch)
        losses = [self._take_step(epoch * self.steps_per_epoch + i, numbers) for i, numbers in enumerate(batches)]
        loss, standing = float(np.mean(losses)), None
        if (epoch + 1) % train.validate_every == 0 or epoch + 1 == train.epochs:
            self.model.eval()
            standing = self._score(self.model)
        if standing is not None and standing > done.best:
            done.best, done.best_epoch, self.best = standing, epoch + 1, tensors_of(self.model)
        done.curve.append(Epoch(epoch + 1, loss, standing[0] if standing else None))
        measure = "AUC" if isinstance(self.config.task, ClassificationConfig) else "Dice"
        told = ""
        if standing:
            told = f", validation {measure} {standing[0]:.4f} (best {done.best[0]:.4f} in epoch {done.best_epoch})"
        progress.report(progress.Note(f"epoch {epoch + 1} of {train.epochs}: loss {loss:.4f}{told}"))

    def _take_step(self, step: int, numbers: Sequence[int]) -> float:
        train = self.config.training
        share = rate_share(step, self.steps_per_epoch, train)
        for group in self._optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.model.train()
        x, truth = self._views([self.scans[number] for number in numbers], step)
        with autocast(self.device, train.precision):
            logits = self.model(x.to(self.device))
        loss = self._loss(logits.float(), truth.to(self.device))
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"step {step + 1}: the loss is not finite; take a smaller training.lr, or precision fp32 for bf16"
            )
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if train.clip_norm is not None:
            trained = [p for group in self._optimiser.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        self._optimiser.step()
        value = float(loss.detach())
        within = step % self.steps_per_epoch + 1
        progress.report(progress.StepDone(self.config.name, within, self.steps_per_epoch, value))
        return value

    def _views(self, scans: Sequence[Labelled], step: int) -> Batch:
        task, train = self.config.task, self.config.training
        apart = task.channels is not None
        generators = [generator_for(self.config.seed, "view", step, place) for place in range(len(scans))]
        if isinstance(task, ClassificationConfig):
            drawn = zip(scans, generators, strict=True)
            views = [crop_of(one, self.size, train.augmentation, own, shades_apart=apart) for one, own in drawn]
            targets = torch.tensor([one.case.target for one in scans])
            return torch.stack(views), targets.float() if task.kind == "multi_label" else targets[:, 0]
        pairs = [
            window_of(one, self.size, train.augmentation, own, foreground=train.foreground, shades_apart=apart)
            for one, own in zip(scans, generators, strict=True)
        ]
        return torch.stack([view for view, _ in pairs]), torch.stack([mask for _, mask in pairs])

    # ------------------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path, digest: str) -> None:
        """All that going on needs, in one file. digest: of what it must be gone on with."""
        tensors = {f"model.{name}": tensor for name, tensor in tensors_of(self.model).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}": value.detach().cpu() for key, value in state.items()}
        told = {"version": _VERSION, "digest": digest, "progress": json.dumps(asdict(self.progress))}
        told["settings"] = json.dumps(settings_of(self.config))
        durable.write_bytes(folder / STATE, as_bytes({n: t.contiguous() for n, t in tensors.items()}, metadata=told))

    def restore(self, folder: Path, digest: str) -> None:
        """Go on where `save` was called. Raises CheckpointError: damaged, or saved of another fine-tuning."""
        kept = check_state(folder, digest, settings_of(self.config))
        try:
            with safe_open(folder / STATE, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            raise CheckpointError(_UNREADABLE) from None
        curve = [Epoch(**one) for one in kept["curve"]]
        self.progress = Progress(curve, kept["best_epoch"], (kept["best"][0], kept["best"][1]))
        self.best = _below("best.", tensors)
        set_tensors_(self.model, _below("model.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimiser.", tensors).items():
            number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
        self._optimiser.load_state_dict({"state": state, "param_groups": self._optimiser.state_dict()["param_groups"]})


def check_state(folder: Path, digest: str, settings: Settings) -> Mapping[str, Any]:
    """The progress that `Training.save` wrote; no tensor is read.

    Raises CheckpointError: damaged, or saved of another fine-tuning.
    """
    try:
        with safe_open(folder / STATE, "pt") as file:
            told = file.metadata()
        version, of, kept = told.get("version"), told["digest"], object_in(told["progress"])
        then = object_in(told["settings"]) if "settings" in told else settings
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise CheckpointError(_UNREADABLE) from None
    if version != _VERSION:
        raise CheckpointError(
            f"{STATE} was written by another version of this program, with which this one does not go on; begin anew "
            "in another folder, or go on with that version"
        )
    if of != digest:
        changed = differences(then, settings) or (
            "its file, its scans, its labels or what it began with have changed, or this program reads scans otherwise"
        )
        raise CheckpointError(
            f"{STATE} is of another fine-tuning: {changed}; put that back, or begin anew in another folder"
        )
    return kept


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 runs the network in bfloat16; losses and weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def rate_share(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to a hundredth over all epochs that may come."""
    total = config.epochs * steps_per_epoch
    warmup = min(total - 1, round(config.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return (step + 1) / warmup
    through = (step - warmup) / max(1, total - 1 - warmup)
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * through)) / 2


def drawn_batches(
    scans: Sequence[Labelled], config: FinetuneConfig, epoch: int, *, steps: int, batch: int
) -> list[list[int]]:
    """Numbers of the scans of each of `steps` batches.

    Everyone in turn, in an order of the epoch's own; or, balanced by sampling, each class as often as another.
    """
    generator = generator_for(config.seed, "order", epoch)
    task, count = config.task, steps * batch
    if isinstance(task, ClassificationConfig) and config.training.balance == "sampling":
        targets = [one.case.target for one in scans]
        chances = torch.tensor([1 / targets.count(target) for target in targets], dtype=torch.float64)
        numbers = torch.multinomial(chances, count, replacement=True, generator=generator)
    else:
        rounds = -(-count // len(scans))
        numbers = torch.cat([torch.randperm(len(scans), generator=generator) for _ in range(rounds)])[:count]
    return [part.tolist() for part in numbers.split(batch)]


def classification_loss(scans: Sequence[Labelled], config: FinetuneConfig, device: torch.device) -> Loss:
    """Cross-entropy; balanced by loss, a class counts inversely to how many training scans it has."""
    task = config.task
    assert isinstance(task, ClassificationConfig)
    balanced = config.training.balance == "loss"
    targets = np.array([one.case.target for one in scans])  # (N, 1) or (N, K)
    if task.kind == "multi_label":
        there, absent = (targets == 1).sum(0), (targets == 0).sum(0)
        ratio = np.clip(absent / np.maximum(there, 1), 1 / _HEAVIEST, _HEAVIEST)
        heavier = torch.tensor(ratio, dtype=torch.float32, device=device) if balanced else None
        return lambda logits, truth: _over_known(logits, truth, heavier)
    counts = np.bincount(targets[:, 0], minlength=len(task.classes))
    shares = np.clip(len(targets) / (len(counts) * np.maximum(counts, 1)), 0, _HEAVIEST)
    weights = torch.tensor(shares, dtype=torch.float32, device=device) if balanced else None
    return lambda logits, truth: F.cross_entropy(logits, truth, weight=weights)


def _over_known(logits: Tensor, truth: Tensor, heavier: Tensor | None) -> Tensor:
    """Mean of the cross-entropy over labels that are known: (B, K) each. A batch without any costs nothing."""
    known = truth != UNKNOWN
    each = F.binary_cross_entropy_with_logits(logits, truth.clamp(min=0), pos_weight=heavier, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def tensors_of(model: TaskModel) -> dict[str, Tensor]:
    """A copy of every parameter, by name, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def set_tensors_(model: TaskModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of the model's own names into it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
