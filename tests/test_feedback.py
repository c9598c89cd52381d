"""Error feedback at a site: what the wire loses is kept on its disk, sent later, and never sent twice."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.feedback import with_feedback
from client.site import Site
from client.site_state import SiteState
from client.trainer import run_round
from tests.federation import layout_for, random_tensors, small_study, whole_layout
from tests.test_trainer import first_round, site_with_pictures
from unimiss_core.codec import released
from unimiss_core.errors import WireError
from unimiss_core.groups import GROUPS, group_of
from unimiss_core.wire import TrainReply, TrainRequest

LAYOUT = layout_for(frozenset({2}))
STUDIES = {dtype: small_study(4, batch={"images": 3}, wire={"dtype": dtype}) for dtype in ("fp32", "bf16", "int8")}
INT8 = STUDIES["int8"]


def kept(site: Site, round: int, prefix: str) -> dict[str, Tensor]:
    state = site.memory.before(round + 1)
    assert state is not None
    assert state.round == round
    return {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}


def whole(request: TrainRequest, round: int, student: Mapping[str, Tensor]) -> TrainRequest:
    return replace(request, round=round, student=student, teacher=student)


def stepped(request: TrainRequest, round: int, seed: int) -> TrainRequest:
    """The request of a later round to a site that holds the student before it."""
    step = released({name: 1e-3 * t for name, t in random_tensors(LAYOUT, seed).items()}, LAYOUT, "int8")
    retention = dict.fromkeys(GROUPS, 0.9)
    return replace(request, round=round, student=None, student_step=step, teacher_retention=retention)


def same(ours: TrainReply, theirs: TrainReply) -> bool:
    packed = (reply.pack(LAYOUT, "int8").array_records["update"] for reply in (ours, theirs))
    a, b = ({group: array.data for group, array in record.items()} for record in packed)
    return a == b


def test_what_was_received_and_what_is_kept_is_all_that_was_trained(tmp_path: Path) -> None:
    """Beside a site that sends exactly: the same training, round by round from the same students."""
    exact, site = (site_with_pictures(tmp_path / dtype, STUDIES[dtype]) for dtype in ("fp32", "int8"))
    names = [spec.name for specs in LAYOUT.values() for spec in specs]
    total, received = ({name: torch.zeros(1, dtype=torch.float64) for name in names} for _ in range(2))
    student = first_round(INT8).student
    assert student is not None
    for round in (1, 2, 3):
        theirs = run_round(exact, whole(first_round(exact.study), round, student)).update
        ours = run_round(site, whole(first_round(INT8), round, student)).update
        seen = released(ours, LAYOUT, "int8")
        for name in names:
            total[name] = total[name] + theirs[name].double()
            received[name] = received[name] + seen[name].double()
        lost = kept(site, round, "feedback/")
        assert any(tensor.abs().max() > 0 for tensor in lost.values())
        for name in names:
            torch.testing.assert_close(received[name] + lost[name].double(), total[name], rtol=0, atol=1e-8)
        student = {name: tensor + seen[name] for name, tensor in student.items()}


def test_a_round_that_is_asked_again_gives_the_same_bytes_also_after_a_restart(tmp_path: Path) -> None:
    site = site_with_pictures(tmp_path / "a", INT8)
    run_round(site, first_round(INT8))
    second = stepped(first_round(INT8), 2, seed=5)
    first_answer = run_round(site, second)
    after = kept(site, 2, "feedback/")
    again = run_round(site_with_pictures(tmp_path / "a", INT8), second)
    assert same(again, first_answer)
    assert all(torch.equal(tensor, after[name]) for name, tensor in kept(site, 2, "feedback/").items())
    third = stepped(first_round(INT8), 3, seed=6)
    unbroken = site_with_pictures(tmp_path / "b", INT8)
    for request in (first_round(INT8), second):
        run_round(unbroken, request)
    assert same(run_round(site, third), run_round(unbroken, third))


def test_a_site_that_lost_its_memory_asks_for_whole_tensors_and_begins_with_nothing_lost(tmp_path: Path) -> None:
    site = site_with_pictures(tmp_path, INT8)
    run_round(site, first_round(INT8))
    shutil.rmtree(tmp_path / "state" / "runs")
    request = stepped(first_round(INT8), 2, seed=5)
    with pytest.raises(WireError, match="needs_whole"):
        run_round(site, request)
    student = first_round(INT8).student
    assert student is not None
    reply = run_round(site, whole(request, 2, student))
    seen = released(reply.update, LAYOUT, "int8")
    assert all(
        torch.equal(tensor, reply.update[name] - seen[name]) for name, tensor in kept(site, 2, "feedback/").items()
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_other_formats_keep_neither_feedback_nor_student(tmp_path: Path, dtype: str) -> None:
    site = site_with_pictures(tmp_path, STUDIES[dtype])
    run_round(site, first_round(STUDIES[dtype]))
    assert not kept(site, 1, "feedback/")
    assert not kept(site, 1, "released/")


def test_what_a_group_without_a_step_lost_waits() -> None:
    """At a site with both ranks, in a round of 2D steps alone, what it sends for 3D tensors does not count."""
    study = small_study(2, schedule={"rounds": 2, "local_steps": 2, "alternate": [2, 2]}, wire={"dtype": "int8"})
    layout = whole_layout()
    update = {name: t * ("3d" not in name.split(".")) for name, t in random_tensors(layout, 0).items()}
    before = {name: 1e-3 * t for name, t in random_tensors(layout, 1).items()}
    sent, lost = with_feedback(update, before, study=study, ranks=(2, 3), round=1)
    for name in update:
        waits = group_of(name) == "3d"
        assert torch.equal(sent[name], update[name] if waits else update[name] + before[name])
        assert torch.equal(lost[name], before[name]) == waits
    sent, _ = with_feedback(update, lost, study=study, ranks=(2, 3), round=2)
    assert all(torch.equal(sent[name], update[name] + lost[name]) for name in update)


def test_an_update_that_is_not_finite_is_neither_sent_nor_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_with_pictures(tmp_path, INT8)
    monkeypatch.setattr(SiteState, "remember", lambda *_: pytest.fail("remembered"))
    monkeypatch.setattr(
        "client.trainer.tensors_of", lambda network: {n: p.detach() * torch.nan for n, p in network.named_parameters()}
    )
    with pytest.raises(WireError) as caught:
        run_round(site, first_round(INT8))
    assert caught.value.reason == "not_finite"
