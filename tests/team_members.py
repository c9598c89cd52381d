# ruff: noqa: ARG001 - every such function is given a device and a team
"""What the processes of a team do in tests; importable by name, as `client.devices.run_team` needs it."""

import math
import os
import signal
import time

import torch
from torch import Tensor

from unimiss_core import progress
from unimiss_core.errors import NonFiniteLossError, WireError
from unimiss_core.execution import Execution
from unimiss_core.learner import Learner
from unimiss_core.network import build_network, tensors_of
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.team import Team, part_of


def train(
    study: StudyConfig,
    batches: list[Tensor],
    dtype: torch.dtype,
    micro_batch: dict[Rank, int] | None = None,
    *,
    device: torch.device,
    team: Team,
) -> dict[str, Tensor]:
    """A step on this process's part of each batch; all that the learner holds then, and each step's loss, NaN where it
    was not taken."""
    execution = Execution(device=device, micro_batch=micro_batch or {})
    learner = Learner(study, ranks={2, 3}, execution=execution, team=team)
    other = tensors_of(build_network(study.model, seed=1))
    learner.start_round({name: tensor.clone() for name, tensor in tensors_of(learner.student).items()}, other)
    learner.student.to(dtype)
    learner.teacher.to(dtype)
    learner.centre = {name: centre.to(dtype) for name, centre in learner.centre.items()}
    losses = []
    for step, batch in enumerate(batches):
        part = part_of(team, len(batch))
        try:
            losses.append(learner.step(batch[part.scans].to(dtype), step=step, share=part.share).total)
        except NonFiniteLossError:
            losses.append(math.nan)
    return {**learner.state(weights=True).tensors, "losses": torch.tensor(losses)}


def train_each(
    study: StudyConfig,
    batches: list[Tensor],
    micro_batch: dict[Rank, int] | None = None,
    *,
    device: torch.device,
    team: Team,
) -> list[dict[str, Tensor]]:
    """`train` on each batch anew, in float32."""
    return [train(study, [batch], torch.float32, micro_batch, device=device, team=team) for batch in batches]


def every_place(*, device: torch.device, team: Team) -> tuple[int, Tensor]:
    """(size of the team, sum of the places + 1), after a word of progress."""
    progress.report(progress.Note(f"from place {team.place}"))
    value = torch.tensor([float(team.place + 1)])
    team.sum_([value])
    return team.size, value


def one_is_killed(*, device: torch.device, team: Team) -> None:
    """The second process dies as the kernel kills one that takes too much memory; the first waits for it in a sum."""
    if team.place == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    team.sum_([torch.zeros(3)])


def one_fails(text: str, *, device: torch.device, team: Team) -> None:
    _report_and_meet(team)
    if team.place == 1:
        raise OSError(text)
    team.sum_([torch.zeros(3)])


def one_refuses(reason: str, *, device: torch.device, team: Team) -> None:
    _report_and_meet(team)
    if team.place == 1:
        raise WireError(reason, "in words")
    team.sum_([torch.zeros(3)])


def refuse(*, device: torch.device, team: Team) -> None:
    raise NonFiniteLossError("step 3: loss nan")


def never_ends(*, device: torch.device, team: Team) -> None:
    while True:
        progress.report(progress.Note("at work"))
        team.sum_([torch.zeros(3)])
        time.sleep(0.01)


def _report_and_meet(team: Team) -> None:
    """The parent may take its time over the word of progress: the first process has sent it when the others go on."""
    progress.report(progress.Note("at work"))
    team.sum_([torch.zeros(1)])
