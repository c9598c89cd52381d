"""What crosses the wire comes out as it went in, and anything odd is refused by a fixed code."""

import dataclasses
import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ConfigRecord, RecordDict

from client.app import REASONS as SITE_REASONS
from tests.federation import RUN, layout_for, random_tensors, small_study, whole_layout
from unimiss_core.codec import num_bytes as num_bytes_of
from unimiss_core.codec import released
from unimiss_core.errors import WireError
from unimiss_core.groups import Group
from unimiss_core.reasons import REASONS
from unimiss_core.wire import PROTOCOL, Hello, Introduction, Refusal, TrainReply, TrainRequest, num_bytes, run_of

ROOT = Path(__file__).parents[1]
STUDY = small_study(rounds=9, wire={"dtype": "fp32"})
RETENTION: dict[Group, float] = {"shared": 0.9, "2d": 0.9, "3d": 1.0, "head": 0.9}


def reply(layout=None) -> TrainReply:  # type: ignore[no-untyped-def]
    return TrainReply(
        site="north",
        run=RUN,
        round=3,
        study_digest=STUDY.digest(),
        update=random_tensors(layout or whole_layout(), 5),
        scans={2: 4, 3: 0},
        steps=2,
        seconds=1.5,
        losses={"image": 6.0},
        diagnostics={"grad_norm": 1.0},
    )


def with_facts(content: RecordDict, **facts: object) -> RecordDict:
    record = ConfigRecord({**content.config_records["facts"], **facts})  # type: ignore[dict-item]
    return RecordDict({"facts": record, **content.array_records})


def refused(content: RecordDict, layout=None) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(WireError) as caught:
        TrainReply.unpack(content, layout or whole_layout(), "fp32")
    return caught.value.reason


def test_hello_and_introduction_round_trip() -> None:
    assert Hello.unpack(Hello(STUDY, RUN).pack()) == Hello(STUDY, RUN)
    introduction = Introduction("north", {2: 5, 3: 0})
    assert Introduction.unpack(introduction.pack()) == introduction
    assert introduction.ranks == frozenset({2})


@pytest.mark.parametrize("with_teacher", [True, False])
def test_request_round_trip(with_teacher: bool) -> None:
    layout = layout_for(frozenset({2}))
    student, teacher = random_tensors(layout, 0), random_tensors(layout, 1)
    sent = TrainRequest(STUDY, RUN, 4, student, teacher if with_teacher else None, RETENTION)
    got = TrainRequest.unpack(sent.pack(layout), layout)
    assert (got.study, got.run, got.round, got.teacher_retention) == (STUDY, RUN, 4, RETENTION)
    assert all(torch.equal(got.student[name], student[name]) for name in student)
    assert (got.teacher is not None) == with_teacher


@pytest.mark.parametrize("with_step", [True, False])
def test_request_of_a_format_that_carries_over_holds_exact_tensors_or_a_step(with_step: bool) -> None:
    layout, study = layout_for(frozenset({2})), small_study(rounds=9, wire={"dtype": "int8"})
    student, teacher = random_tensors(layout, 0), random_tensors(layout, 1)
    sent = TrainRequest(study, RUN, 4, None if with_step else student, None if with_step else teacher, RETENTION)
    sent = dataclasses.replace(sent, student_step=student if with_step else None)
    content = sent.pack(layout)
    got = TrainRequest.unpack(content, layout)
    assert num_bytes(content) == (num_bytes_of(layout, "int8") if with_step else 2 * num_bytes_of(layout, "fp32"))
    if with_step:
        assert got.student is got.teacher is None
        seen = released(student, layout, "int8")
        assert all(torch.equal(got.student_step[name], seen[name]) for name in student)
    else:
        assert got.student_step is None
        assert all(torch.equal(got.student[name], student[name]) for name in student)
        assert all(torch.equal(got.teacher[name], teacher[name]) for name in student)


def test_a_request_holds_either_a_student_or_its_step() -> None:
    layout, study = layout_for(frozenset({2})), small_study(rounds=9, wire={"dtype": "int8"})
    student = random_tensors(layout, 0)
    for request in (
        TrainRequest(study, RUN, 4, None, None, RETENTION),
        TrainRequest(study, RUN, 4, student, None, RETENTION, student_step=student),
    ):
        with pytest.raises(WireError, match="either a student or its step"):
            TrainRequest.unpack(request.pack(layout), layout)
    bf16 = dataclasses.replace(request, study=STUDY, student_step=None).pack(layout)
    bf16["student_step"] = bf16.array_records.pop("student")
    with pytest.raises(WireError, match="either a student or its step"):
        TrainRequest.unpack(bf16, layout)


def test_an_int8_reply_with_a_hostile_scale_is_refused() -> None:
    content = reply().pack(whole_layout(), "int8")
    held = content.array_records["update"]["2d"]
    for scale, reason in ((b"\xc0\x7f", "not_finite"), (b"\x80\xbf", "malformed"), (b"\0\0", "malformed")):
        data = held.data[:6] + scale + held.data[8:]
        content.array_records["update"]["2d"] = Array(dtype="int8", shape=held.shape, stype="unimiss", data=data)
        with pytest.raises(WireError) as caught:
            TrainReply.unpack(content, whole_layout(), "int8")
        assert caught.value.reason == reason


def test_reply_round_trip() -> None:
    got = TrainReply.unpack(reply().pack(whole_layout(), "fp32"), whole_layout(), "fp32")
    for field in dataclasses.fields(TrainReply):
        if field.name != "update":
            assert getattr(got, field.name) == getattr(reply(), field.name)
    assert all(torch.equal(got.update[name], tensor) for name, tensor in reply().update.items())


def test_messages_that_were_read_are_freed_at_once() -> None:
    """Not when Python's collector comes by: each is as large as the model."""
    request = TrainRequest(
        small_study(), RUN, 1, released(random_tensors(whole_layout(), 0), whole_layout(), "bf16"), None, {}
    ).pack(whole_layout())
    answer = reply().pack(whole_layout(), "bf16")
    arrays = [weakref.ref(request["student"]), weakref.ref(answer["update"])]
    gc.disable()
    try:
        TrainRequest.unpack(request, whole_layout())
        assert Refusal.found_in(answer) is None
        assert num_bytes(answer) > 0
        TrainReply.unpack(answer, whole_layout(), "bf16")
        del request, answer
        assert [array() for array in arrays] == [None, None]
    finally:
        gc.enable()


def test_two_dimensional_site_sends_no_byte_of_a_three_dimensional_tensor() -> None:
    layout = layout_for(frozenset({2}))
    content = reply(layout).pack(layout, "bf16")
    assert num_bytes(content) == 2 * sum(spec.size for specs in layout.values() for spec in specs)
    assert "3d" not in content.array_records["update"]


def test_other_protocol_is_told_before_the_content_is_looked_at() -> None:
    with pytest.raises(WireError, match=f"speaks wire protocol 99, this side {PROTOCOL}"):
        TrainReply.unpack(RecordDict({"facts": ConfigRecord({"protocol": 99})}), whole_layout(), "fp32")


def test_refusal_is_recognised() -> None:
    assert Refusal.found_in(Refusal("no_usable_scans").pack()) == Refusal("no_usable_scans")
    assert Refusal.found_in(reply().pack(whole_layout(), "fp32")) is None


def test_odd_replies_are_refused_by_code() -> None:
    good = reply().pack(whole_layout(), "fp32")
    assert refused(RecordDict({})) == "malformed"
    assert refused(RecordDict({"facts": good["facts"]})) == "malformed"
    assert refused(with_facts(good, round="3")) == "malformed"
    assert refused(with_facts(good, steps=True)) == "malformed"
    assert refused(with_facts(good, scans_2d=-1)) == "counts"
    for name in ("patient_smith_john_19500101", "image_to_p123", "grad_norm"):
        assert refused(with_facts(good, losses=json.dumps({name: 1.0}))) == "malformed"
    assert refused(with_facts(good, diagnostics=json.dumps({"image": 1.0}))) == "malformed"
    assert refused(with_facts(good, losses="[1]")) == "malformed"
    assert refused(with_facts(good, losses=json.dumps({"image": float("nan")}))) == "not_finite"
    assert refused(good, layout_for(frozenset({2}))) == "wrong_names"
    assert refused(reply(layout_for(frozenset({2}))).pack(layout_for(frozenset({2})), "fp32")) == "wrong_names"
    assert refused(reply().pack(whole_layout(), "bf16")) == "wrong_dtype"


def test_a_group_of_another_size_is_refused_even_if_it_would_broadcast() -> None:
    content = reply().pack(whole_layout(), "fp32")
    content.array_records["update"]["2d"] = Array(dtype="fp32", shape=(1,), stype="unimiss", data=b"\0" * 4)
    assert refused(content) == "wrong_size"


def test_an_array_that_claims_another_serialisation_is_refused() -> None:
    content = reply().pack(whole_layout(), "fp32")
    held = content.array_records["update"]["2d"]
    content.array_records["update"]["2d"] = Array(dtype="fp32", shape=held.shape, stype="pickle", data=held.data)
    assert refused(content) == "wrong_dtype"


def test_a_name_that_could_forge_a_line_or_a_path_is_refused() -> None:
    for name in ("../../etc", "JANE DOE", "a\nb", "", "x" * 65):
        with pytest.raises(WireError, match="agreed form"):
            Introduction.unpack(Introduction(name, {2: 1, 3: 0}).pack())


@pytest.mark.parametrize(
    "run", ["", "0123456789ABCDEF", "../../../secrets1", "0123456789abcde", "0123456789abcdef0", 7]
)
def test_a_run_whose_name_could_be_a_path_is_refused_by_both(run: object) -> None:
    """It becomes a folder on the site's disk."""
    layout = layout_for(frozenset({2}))
    request = TrainRequest(STUDY, RUN, 1, random_tensors(layout, 0), None, RETENTION).pack(layout)
    assert run_of(request) == RUN
    forged = with_facts(request, run=run)
    with pytest.raises(WireError, match="run"):
        run_of(forged)
    with pytest.raises(WireError, match="run"):
        TrainRequest.unpack(forged, layout)
    with pytest.raises(WireError, match="run"):
        Hello.unpack(with_facts(Hello(STUDY, RUN).pack(), run=run))
    assert refused(with_facts(reply().pack(whole_layout(), "fp32"), run=run)) == "malformed"


def test_every_reason_that_the_program_gives_is_one_of_the_fixed_set() -> None:
    sources = [path for package in ("unimiss_core", "client", "server") for path in (ROOT / package).glob("*.py")]
    given = {reason for path in sources for reason in re.findall(r'WireError\(\s*"(\w+)"', path.read_text())}
    assert given
    assert given | set(SITE_REASONS.values()) <= set(REASONS)


def test_hostile_texts_are_refused_and_crash_nothing() -> None:
    good = reply().pack(whole_layout(), "fp32")
    for text in ("[" * 200_000, '{"a": ' + "9" * 400 + "}", '{"a": 1' + "0" * 20_000 + "}", '{"A b": 1}', "null", "7"):
        assert refused(with_facts(good, losses=text)) in {"malformed", "not_finite"}
    assert refused(with_facts(good, seconds=float("nan"))) == "malformed"
    assert refused(with_facts(good, seconds=-1.0)) == "malformed"


def test_a_student_that_is_not_finite_is_refused_by_the_site() -> None:
    layout = layout_for(frozenset({2}))
    student = random_tensors(layout, 0)
    next(iter(student.values())).view(-1)[0] = float("inf")
    with pytest.raises(WireError, match="not a finite number"):
        TrainRequest.unpack(TrainRequest(STUDY, RUN, 1, student, None, RETENTION).pack(layout), layout)


@pytest.mark.parametrize("round", [0, -1, 10, 10**9])
def test_a_request_for_a_round_that_the_study_does_not_have_is_refused(round: int) -> None:
    layout = layout_for(frozenset({2}))
    sent = TrainRequest(STUDY, RUN, round, random_tensors(layout, 0), None, RETENTION)
    with pytest.raises(WireError, match="malformed"):
        TrainRequest.unpack(sent.pack(layout), layout)
