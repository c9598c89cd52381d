"""The coordinator's loop over the in-process grid, with stub sites: rounds, refusals, quorum, resume."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from server.coordinator_config import CoordinatorConfig
from server.global_state import GlobalState
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.federation import Answer, StubSite, good_answer, metric_rows, reply_with, small_study, stub_app
from unimiss_core import checkpoint, progress
from unimiss_core.errors import ConfigError, RoundError, WireError
from unimiss_core.groups import group_of
from unimiss_core.schedule import teacher_retention
from unimiss_core.study import StudyConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import Refusal, TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")


def federate(
    out: Path,
    sites: list[StubSite],
    study: StudyConfig | None = None,
    *,
    resume: bool = False,
    min_replies: int = 1,
    deadline_s: float = 60.0,
    workers: int = 1,
) -> GlobalState:
    nodes = {site.name: {"name": site.name} for site in sites}
    config = CoordinatorConfig(
        study=Path("unused"),
        out=out,
        min_sites=min_replies,
        min_replies=min_replies,
        wait_s=0.1,
        deadline_s=deadline_s,
        retry_s=0.0,
    )
    app = stub_app({site.name: site for site in sites})
    with LocalGrid(app, nodes, run_config={}, workers=workers) as grid:
        return Federation(grid, study or small_study(), config).run(resume=resume)


def xray(name: str = "xray", answer: Answer | None = None) -> StubSite:
    return StubSite(name, {2: 10}, answer)


def ct(name: str = "ct", answer: Answer | None = None) -> StubSite:
    return StubSite(name, {3: 6}, answer)


@pytest.fixture(scope="module")
def ct_alone(tmp_path_factory: pytest.TempPathFactory) -> GlobalState:
    """What two rounds come to of a site that nobody joins."""
    return federate(tmp_path_factory.mktemp("alone"), [ct()])


def test_two_rounds_give_the_model_that_the_formula_gives(tmp_path: Path) -> None:
    study = small_study(rounds=2, wire={"dtype": "fp32"})
    a, b = xray(), ct()
    state = federate(tmp_path, [a, b], study)
    initial = checkpoint.load(tmp_path / "checkpoints" / "round-0000").student
    sent = [
        [good_answer(dataclasses.replace(a.requests[0], round=round), site).update for site in (a, b)]
        for round in (1, 2)
    ]
    for name, tensor in state.student.items():
        expected = initial[name].double()
        for updates in sent:
            trained = [update[name].double() for update in updates if name in update]
            expected = expected + sum(trained) / len(trained)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_site_can_rebuild_the_teacher_it_is_not_sent(tmp_path: Path) -> None:
    """Round 2 brings no teacher: what a site holds, moved by the momentum it is told, is the coordinator's."""
    study = small_study(rounds=3)
    a, b = xray(), ct()
    state = federate(tmp_path, [a, b], study)
    assert [request.teacher is None for request in b.requests] == [True, True, True]
    teacher = dict(b.requests[0].student)
    for request in b.requests[1:]:
        teacher = advance_teacher(
            teacher, request.student, {name: request.teacher_retention[group_of(name)] for name in teacher}
        )
    last = {name: tensor.bfloat16().float() for name, tensor in state.student.items()}
    teacher = advance_teacher(teacher, last, {name: state.retention[group_of(name)] for name in teacher})
    assert all(torch.equal(teacher[name], state.teacher[name]) for name in teacher)


def test_teacher_retention_is_what_the_local_steps_amount_to(tmp_path: Path) -> None:
    study = small_study(rounds=1)
    state = federate(tmp_path, [xray()], study)
    assert state.retention["shared"] == teacher_retention(study, frozenset({2}), 1)["shared"]
    assert state.retention["3d"] == 1.0


def test_group_that_nobody_trained_keeps_student_and_teacher_bit_for_bit(tmp_path: Path) -> None:
    state = federate(tmp_path, [xray("a"), xray("b")])
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0000")
    for name in state.student:
        same = torch.equal(state.student[name], start.student[name])
        assert same == ("3d" in name.split(".")), name
        assert torch.equal(state.teacher[name], start.teacher[name]) or not same


def test_skipped_batches_are_told_and_stand_in_the_metrics(tmp_path: Path) -> None:
    def skipping(request: TrainRequest, site: StubSite) -> TrainReply:
        return dataclasses.replace(good_answer(request, site), diagnostics={"skipped_batches": 2.0})

    notes: list[progress.Event] = []
    with progress.listen(notes.append):
        federate(tmp_path, [xray(answer=skipping), ct()], small_study(rounds=1))
    assert progress.Note("xray: 2 batches gave NaN or infinity and were skipped") in notes
    assert metric_rows(tmp_path)[0]["sites"]["xray"]["diagnostics"] == {"skipped_batches": 2.0}


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    federate(tmp_path, [xray(), ct()])
    first, second = metric_rows(tmp_path)
    assert (first["round"], second["round"]) == (1, 2)
    line = first["sites"]["xray"]
    assert line["status"] == "ok"
    assert line["scans"] == {"2d": 10, "3d": 0}
    assert line["steps"] == 2
    assert line["losses"] == {"image": 2.0}
    values = sum(spec.size for specs in xray().layout.values() for spec in specs)
    assert line["bytes_up"] == line["bytes_down"] == 2 * values
    assert first["sites"]["ct"]["bytes_up"] > line["bytes_up"]
    assert all(value > 0 for value in first["global"]["update_norm"].values())


def test_the_loss_that_people_watch_is_the_mean_cross_entropy_of_sites_that_tell_one(tmp_path: Path) -> None:
    told = {
        "a": {"image": 4.0, "image_reconstruction": 0.1},
        "b": {"volume": 3.0, "radiograph_to_volume": 5.0, "slices_to_volume": 7.0, "volume_reconstruction": 0.2},
        "c": {"image_reconstruction": 0.3},
        "d": {},
    }

    def answer(request: TrainRequest, site: StubSite) -> TrainReply:
        return dataclasses.replace(good_answer(request, site), losses=told[site.name])

    events: list[progress.Event] = []
    with progress.listen(events.append):
        federate(tmp_path, [StubSite(name, {2: 10}, answer) for name in told], small_study(rounds=1))
    (done,) = [event for event in events if isinstance(event, progress.RoundDone)]
    assert done.losses == {"a": 4.0, "b": 5.0}


def broken(_: TrainRequest, __: StubSite) -> TrainReply:
    raise RuntimeError("patient /archive/P123 is broken")


def not_finite(request: TrainRequest, site: StubSite) -> TrainReply:
    reply = good_answer(request, site)
    next(iter(reply.update.values())).fill_(float("nan"))
    return reply


def huge(request: TrainRequest, site: StubSite) -> TrainReply:
    return reply_with({n: 1e6 * t for n, t in good_answer(request, site).update.items()}, request, site)


def stale(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), round=request.round - 1)


def another_run(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), run="f" * 16)


def another_study(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), study_digest="0" * 64)


def too_many_scans(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), scans={2: 10**9, 3: 0})


def scans_of_another_rank(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), scans={2: 10, 3: 1})


def endless(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), seconds=float("inf"))


def numbers_too_large_for_a_float(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), losses={"image": 10**400})


def a_figure_with_words(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), losses={"patient JANE DOE P123": 1.0})


def no_scans(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), scans={2: 0, 3: 0})


def in_anothers_name(request: TrainRequest, site: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, site), site="ct")


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (broken, "error", "failed"),
        (not_finite, "refused", "not_finite"),
        (huge, "refused", "too_large"),
        (stale, "refused", "stale_round"),
        (another_run, "refused", "wrong_run"),
        (another_study, "refused", "wrong_study"),
        (too_many_scans, "refused", "counts"),
        (scans_of_another_rank, "refused", "counts"),
        (endless, "refused", "malformed"),
        (numbers_too_large_for_a_float, "refused", "malformed"),
        (a_figure_with_words, "refused", "malformed"),
        (no_scans, "refused", "counts"),
        (in_anothers_name, "refused", "wrong_site"),
    ],
)
def test_a_bad_reply_costs_its_site_alone(
    tmp_path: Path, ct_alone: GlobalState, answer: Answer, status: str, reason: str
) -> None:
    state = federate(tmp_path, [xray(answer=answer), ct()])
    assert all(torch.equal(state.student[name], ct_alone.student[name]) for name in state.student)
    for row in metric_rows(tmp_path):
        assert (row["sites"]["xray"]["status"], row["sites"]["xray"]["reason"]) == (status, reason)
        assert row["sites"]["ct"]["status"] == "ok"
    assert "P123" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_update_that_is_too_large_is_told_with_its_norm_and_the_study_may_be_at_fault(tmp_path: Path) -> None:
    heard: list[progress.Event] = []
    with (
        progress.listen(heard.append),
        pytest.raises(RoundError, match=r"Mend the sites - or, .* a lower optimiser\.lr or"),
    ):
        federate(tmp_path, [xray(answer=huge)])
    told = [event.text for event in heard if isinstance(event, progress.Note) and event.text.startswith("xray: ")]
    assert re.fullmatch(r"xray: the update's norm \S+ is above the study's max_update_norm 1000", told[0])


def test_a_refusal_in_free_words_becomes_a_code(tmp_path: Path) -> None:
    app = stub_app({"a": xray("a"), "b": ct("b")})

    @app.query("spoken")
    def spoken(message: Message, _: Context) -> Message:
        return Message(Refusal("patient JANE DOE\n\x1b[31m/archive/x").pack(), reply_to=message)

    app._registered_funcs["query.default"] = _either(app._registered_funcs["query.default"], spoken)
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1)
    with LocalGrid(app, {"a": {"name": "a"}, "b": {"name": "b"}}, run_config={}) as grid:
        Federation(grid, small_study(rounds=1), config).run()
    assert {name: line["reason"] for name, line in metric_rows(tmp_path)[0]["sites"].items()} == {
        "a": "malformed",
        "b": "",
    }


def _either(honest: Callable[..., Message], spoken: Callable[..., Message]) -> Callable[..., Message]:
    return lambda message, context: (spoken if context.node_config["name"] == "a" else honest)(message, context)


def test_two_nodes_of_one_name_do_not_share_a_line(tmp_path: Path, ct_alone: GlobalState) -> None:
    """The second is not asked to train: neither may speak, or fail, in the other's name."""
    honest, impostor = ct("ct"), ct("ct", answer=huge)
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1)
    app = stub_app({"1": honest, "2": impostor})
    with LocalGrid(app, {"first": {"name": "1"}, "second": {"name": "2"}}, run_config={}) as grid:
        state = Federation(grid, small_study(), config).run()
    assert all(torch.equal(state.student[name], ct_alone.student[name]) for name in state.student)
    assert not impostor.requests
    assert metric_rows(tmp_path)[0]["sites"]["second"]["reason"] == "name_taken"
    assert metric_rows(tmp_path)[0]["sites"]["ct"]["status"] == "ok"


def test_a_site_that_lost_its_memory_is_sent_the_teacher_in_the_same_round(tmp_path: Path) -> None:
    def forgetful(request: TrainRequest, site: StubSite) -> TrainReply:
        if request.round == 2 and request.teacher is None:
            raise WireError("needs_whole", "the disk is new")
        return good_answer(request, site)

    site = ct(answer=forgetful)
    federate(tmp_path, [site, xray()], small_study(rounds=3))
    assert [request.teacher is None for request in site.requests] == [True, True, False, True]
    assert [row["sites"]["ct"]["status"] for row in metric_rows(tmp_path)] == ["ok", "ok", "ok"]


def test_a_silent_node_delays_only_the_first_round(tmp_path: Path) -> None:
    app = stub_app({"ct": ct()})
    honest = app._registered_funcs["query.default"]

    def hang(message: Message, context: Context) -> Message:
        if context.node_config["name"] == "silent":
            time.sleep(1.5)
            raise RuntimeError
        return honest(message, context)

    app._registered_funcs["query.default"] = hang
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, introduction_s=0.5)
    with LocalGrid(app, {"silent": {"name": "silent"}, "ct": {"name": "ct"}}, run_config={}, workers=2) as grid:
        Federation(grid, small_study(rounds=2), config).run()
    assert metric_rows(tmp_path)[0]["sites"]["silent"]["status"] == "absent"
    assert [row["sites"]["ct"]["status"] for row in metric_rows(tmp_path)] == ["ok", "ok"]


def test_an_update_of_zeros_is_welcome(tmp_path: Path) -> None:
    def zeros(request: TrainRequest, site: StubSite) -> TrainReply:
        return reply_with({n: torch.zeros_like(t) for n, t in request.student.items()}, request, site)

    state = federate(tmp_path, [xray(answer=zeros)])
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0000").student
    assert all(torch.equal(state.student[name], start[name]) for name in start)


def test_a_site_past_the_deadline_is_absent_and_the_round_goes_on(tmp_path: Path) -> None:
    release = threading.Event()

    def hang(request: TrainRequest, site: StubSite) -> TrainReply:
        release.wait(2.5)
        return good_answer(request, site)

    try:
        federate(tmp_path, [xray(answer=hang), ct()], small_study(rounds=1), deadline_s=1.0, workers=2)
    finally:
        release.set()
    assert metric_rows(tmp_path)[0]["sites"]["xray"]["status"] == "absent"
    assert metric_rows(tmp_path)[0]["sites"]["ct"]["status"] == "ok"


def test_too_few_replies_end_the_run_with_what_was_finished_saved(tmp_path: Path) -> None:
    def fails_in_round_2(request: TrainRequest, site: StubSite) -> TrainReply:
        return good_answer(request, site) if request.round == 1 else broken(request, site)

    sites = [xray(answer=fails_in_round_2), ct()]
    with pytest.raises(RoundError, match=r"(?s)round 2 could not be completed: 1 of at least 2.*xray: error failed"):
        federate(tmp_path, sites, min_replies=2)
    assert RunFolder(tmp_path).checkpoint_of(1).is_dir()
    assert [row["round"] for row in metric_rows(tmp_path)] == [1]
    state = federate(tmp_path, [xray(), ct()], min_replies=2, resume=True)
    assert state.round == 2


def test_too_few_sites_are_told(tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="1 of at least 2 sites are there"):
        federate(tmp_path, [ct()], min_replies=2)


ROBUST = {"rule": "median", "server_optimiser": {"name": "fedadam"}}


@pytest.mark.parametrize(("cut", "aggregation"), [(0, {}), (1, ROBUST), (2, ROBUST)])
def test_resumed_run_ends_bit_identical_to_an_unbroken_one(
    tmp_path: Path, cut: int, aggregation: dict[str, object]
) -> None:
    study = small_study(rounds=3, aggregation=aggregation)

    class Cut(Exception):  # noqa: N818
        pass

    unbroken = federate(tmp_path / "a", [xray(), ct()], study)

    rename = Path.rename

    def rename_until_cut(path: Path, name: Path) -> Path:
        if name.name == checkpoint.folder_name(cut + 1):
            raise Cut  # metrics of this round are written, its checkpoint is not there yet
        return rename(path, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename_until_cut)
        with pytest.raises(Cut):
            federate(tmp_path / "b", [xray(), ct()], study)
    resumed = federate(tmp_path / "b", [xray(), ct()], study, resume=True)
    assert resumed.round == 3
    for part in ("student", "teacher", "optimiser"):
        ours, theirs = getattr(resumed, part), getattr(unbroken, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["round"] for row in metric_rows(tmp_path / "b")] == [1, 2, 3]


def test_who_replies_first_does_not_show(tmp_path: Path) -> None:
    """To the last bit: with weights and updates whose sums float64 would round."""
    study = small_study(rounds=2, aggregation={"weighting": "sqrt"}, wire={"dtype": "fp32"})

    def late(seconds: float) -> Answer:
        def answer(request: TrainRequest, site: StubSite) -> TrainReply:
            time.sleep(seconds)
            return good_answer(request, site)

        return answer

    delays = {"a": 0.0, "b": 0.3, "c": 0.6}
    forth, back = (
        federate(
            tmp_path / name,
            [StubSite(site, {2: 7 + ord(site)}, late(sign * (delay - 0.3) + 0.3)) for site, delay in delays.items()],
            study,
            workers=3,
        )
        for name, sign in (("forth", 1), ("back", -1))
    )
    assert all(torch.equal(back.student[name], tensor) for name, tensor in forth.student.items())
    assert all(torch.equal(back.teacher[name], tensor) for name, tensor in forth.teacher.items())


def test_updates_that_a_crash_left_on_disk_are_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    federate(tmp_path, [ct()], small_study(rounds=1, aggregation={"rule": "median"}))
    left = RunFolder(tmp_path).scratch
    assert not left.exists()
    left.mkdir()
    (left / "head-0000.f32").touch()
    federate(tmp_path, [ct()], small_study(rounds=1, aggregation={"rule": "median"}), resume=True)
    assert not left.exists()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    federate(tmp_path, [ct()])
    with pytest.raises(ConfigError, match="holds a run already; resume it"):
        federate(tmp_path, [ct()])


def test_resuming_with_another_study_names_the_difference(tmp_path: Path) -> None:
    federate(tmp_path, [ct()])
    with pytest.raises(ConfigError, match=r"another study \(different: schedule.rounds\)"):
        federate(tmp_path, [ct()], small_study(rounds=9), resume=True)


def test_a_site_that_joins_late_receives_the_teacher(tmp_path: Path) -> None:
    study = small_study(rounds=3)
    federate(tmp_path, [ct()], small_study(rounds=3))
    assert RunFolder(tmp_path).checkpoint_of(3).is_dir()
    late = xray()
    for round in (3, 2):  # back to round 1, as if the coordinator had been killed there
        folder = RunFolder(tmp_path).checkpoint_of(round)
        folder.rename(tmp_path / folder.name)
    old = checkpoint.load(RunFolder(tmp_path).checkpoint_of(1))
    state = federate(tmp_path, [ct(), late], study, resume=True)
    assert state.round == 3
    teacher = late.requests[0].teacher
    assert teacher is not None
    assert all(torch.equal(teacher[name], old.teacher[name]) for name in teacher)
    assert late.requests[1].teacher is None


def test_a_mixed_site_without_a_volume_step_has_no_weight_in_the_3d_group(tmp_path: Path) -> None:
    """It sends zeros for 3D tensors then; they must not shrink the step of those who trained them."""
    study = small_study(rounds=1, schedule={"rounds": 1, "local_steps": 2, "alternate": [2, 2]})
    mixed = StubSite("mixed", {2: 5, 3: 5})
    state = federate(tmp_path / "both", [ct(), mixed], study)
    alone = federate(tmp_path / "alone", [ct()], study)
    for name in state.student:
        assert torch.equal(state.student[name], alone.student[name]) == ("3d" in name.split(".")), name
