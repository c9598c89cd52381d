"""What reaches the sites of the global student: rounded weights, or steps that leave every site with the same bits."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.global_state import GlobalState
from server.release import Release
from tests.federation import StubSite, good_answer, metric_rows, random_tensors, small_study, whole_layout
from tests.test_rounds import ct, federate, xray
from unimiss_core import checkpoint
from unimiss_core.codec import num_bytes, released, unpack
from unimiss_core.errors import WireError
from unimiss_core.groups import group_of
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")

LAYOUT = {group: specs[:3] for group, specs in whole_layout().items()}
INT8 = {"dtype": "int8"}


def changed_by(seed: int, size: float) -> dict[str, Tensor]:
    return {name: size * tensor for name, tensor in random_tensors(LAYOUT, seed).items()}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in b) ** 0.5


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_are_released_rounded_and_whole(dtype: str, kind: torch.dtype) -> None:
    student, after = random_tensors(LAYOUT, 0), random_tensors(LAYOUT, 1)
    for release in (first := Release.first(student, layout=LAYOUT, dtype=dtype), first.after(after)):
        assert not release.is_step
        assert release.before is None
        assert same(release.held(), {name: tensor.to(kind).float() for name, tensor in release.student.items()})
    assert release.student is after


def test_the_first_release_of_steps_is_the_student_itself() -> None:
    student = random_tensors(LAYOUT, 0)
    assert same(Release.first(student, layout=LAYOUT, dtype="int8").held(), student)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
def test_what_sites_are_told_gives_what_they_are_taken_to_hold(dtype: str) -> None:
    first = random_tensors(LAYOUT, 0)
    release = Release.first(first, layout=LAYOUT, dtype=dtype).after(random_tensors(LAYOUT, 1))
    seen = {group: unpack(release.payloads[group], specs, dtype) for group, specs in LAYOUT.items()}
    told = {name: tensor for tensors in seen.values() for name, tensor in tensors.items()}
    if release.is_step:
        told = {name: first[name] + step for name, step in told.items()}
    assert same(told, release.held())


def test_released_steps_never_stray_further_than_one_rounding() -> None:
    """As far off after 25 rounds as after one; whoever adds up the steps, or knows the last release, has its bits."""
    master = random_tensors(LAYOUT, 0)
    release = Release.first(master, layout=LAYOUT, dtype="int8")
    site, off = dict(master), []
    for round in range(25):
        change = changed_by(round + 1, 1e-3)
        master = {name: tensor + change[name] for name, tensor in master.items()}
        release = release.after(master)
        assert release.before is not None
        step = {name: master[name] - before for name, before in release.before.items()}
        received = released(step, LAYOUT, "int8")
        site = {name: tensor + received[name] for name, tensor in site.items()}
        assert same(site, release.held())
        assert same(Release(master, release.before, LAYOUT, "int8").held(), site)
        off.append(distance(site, master))
    assert max(off) < 1.05 * off[0]
    assert off[0] < 0.01 * distance(changed_by(1, 1e-3), changed_by(1, 0))


def test_in_int8_a_site_receives_steps_and_ends_with_the_bits_of_the_coordinator(tmp_path: Path) -> None:
    study = small_study(rounds=4, wire=INT8)
    a, b = xray(), ct()
    state = federate(tmp_path, [a, b], study)
    for site in (a, b):
        first, *later = site.requests
        assert first.student is not None
        assert all(request.student is request.teacher is None for request in later)
        student = teacher = dict(first.student)
        for request in later:
            student, teacher = advanced(student, teacher, request.student_step, request.teacher_retention)
        step = {
            n: t
            for g, specs in site.layout.items()
            for n, t in unpack(state.release.payloads[g], specs, "int8").items()
        }
        student, teacher = advanced(student, teacher, step, state.retention)
        held = state.release.held()
        assert all(torch.equal(student[name], held[name]) for name in student)
        assert all(torch.equal(teacher[name], state.teacher[name]) for name in teacher)


def advanced(student, teacher, step, retention):  # type: ignore[no-untyped-def]
    student = {name: tensor + step[name] for name, tensor in student.items()}
    return student, advance_teacher(teacher, student, {name: retention[group_of(name)] for name in teacher})


def test_metrics_carry_the_exact_bytes_of_int8(tmp_path: Path) -> None:
    a, b = xray(), ct()
    federate(tmp_path, [a, b], small_study(rounds=3, wire=INT8))
    for site in (a, b):
        whole, steps = num_bytes(site.layout, "fp32"), num_bytes(site.layout, "int8")
        lines = [row["sites"][site.name] for row in metric_rows(tmp_path)]
        assert [line["bytes_down"] for line in lines] == [whole, steps, steps]
        assert [line["bytes_up"] for line in lines] == [steps] * 3


def test_a_site_that_lost_its_memory_is_sent_whole_tensors_in_the_same_round(tmp_path: Path) -> None:
    def forgetful(request: TrainRequest, site: StubSite) -> TrainReply:
        if request.round == 3 and request.student is None:
            raise WireError("needs_whole", "the disk is new")
        return good_answer(request, site)

    site, faithful = ct(answer=forgetful), ct("other")
    state = federate(tmp_path, [site, faithful], small_study(rounds=4, wire=INT8))
    assert [request.student is None for request in site.requests] == [False, True, True, False, True]
    assert [request.teacher is None for request in site.requests] == [True, True, True, False, True]
    student = faithful.requests[0].student
    for request in faithful.requests[1:3]:
        student = {name: tensor + request.student_step[name] for name, tensor in student.items()}  # type: ignore[union-attr,index]
    assert all(torch.equal(site.requests[3].student[name], student[name]) for name in student)  # type: ignore[index,union-attr]
    assert all(row["sites"]["ct"]["status"] == "ok" for row in metric_rows(tmp_path))
    line = metric_rows(tmp_path)[2]["sites"]["ct"]
    assert line["bytes_down"] == num_bytes(site.layout, "int8") + 2 * num_bytes(site.layout, "fp32")
    assert state.taught == {"ct": 4, "other": 4}


def test_a_site_that_is_never_content_costs_itself_the_round_and_is_not_asked_for_ever(tmp_path: Path) -> None:
    def never_content(request: TrainRequest, site: StubSite) -> TrainReply:
        if request.round == 2:
            raise WireError("needs_whole", "so it says")
        return good_answer(request, site)

    site = ct(answer=never_content)
    federate(tmp_path, [site, xray()], small_study(rounds=2, wire=INT8))
    assert [request.round for request in site.requests] == [1, 2, 2]
    line = metric_rows(tmp_path)[1]["sites"]["ct"]
    assert (line["status"], line["reason"]) == ("refused", "needs_whole")


def test_a_site_whose_reply_did_not_count_is_sent_whole_tensors_next_time(tmp_path: Path) -> None:
    def stale(request: TrainRequest, site: StubSite) -> TrainReply:
        reply = good_answer(request, site)
        return dataclasses.replace(reply, round=1) if request.round == 2 else reply

    site = xray(answer=stale)
    federate(tmp_path, [site, ct()], small_study(rounds=4, wire=INT8))
    assert [request.student is None for request in site.requests] == [False, True, False, True]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_resumed_run_of_steps_sends_and_ends_with_the_same_bits(tmp_path: Path, cut: int) -> None:
    study = small_study(rounds=3, wire=INT8)
    unbroken, broken = ct(), ct()
    expected = federate(tmp_path / "a", [xray(), unbroken], study)
    save = GlobalState.save

    class Cut(Exception):  # noqa: N818
        pass

    def save_until_cut(self: GlobalState, *where: object, **named: object) -> None:
        if self.round == cut + 1:
            raise Cut
        save(self, *where, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlobalState, "save", save_until_cut)
        with pytest.raises(Cut):
            federate(tmp_path / "b", [xray(), broken], study)
    state = federate(tmp_path / "b", [xray(), broken], study, resume=True)
    asked_twice = broken.requests[cut], broken.requests[cut + 1]
    for ours, theirs in ((asked_twice), (broken.requests[-1], unbroken.requests[-1])):
        for part in ("student", "student_step"):
            assert (getattr(ours, part) is None) == (getattr(theirs, part) is None)
            assert same(getattr(ours, part) or {}, getattr(theirs, part) or {})
    assert same(state.student, expected.student)
    assert same(state.teacher, expected.teacher)
    assert same(state.release.held(), expected.release.held())


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", False), ("fp32", False), ("int8", True)])
def test_only_a_format_that_carries_over_keeps_more_in_the_checkpoint(tmp_path: Path, dtype: str, kept: bool) -> None:
    federate(tmp_path, [ct()], small_study(rounds=1, wire={"dtype": dtype}))
    assert bool(checkpoint.load(tmp_path / "checkpoints" / "round-0001", to_resume=True).server_tensors) == kept
