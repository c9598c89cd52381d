"""What a site's own file allows holds against any study, before a scan is read or memory taken for it."""

import re
import resource
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from client import policy as policies
from client import site as sites
from client.health import read_refused
from client.policy import beyond, check_groups, in_words
from client.site_config import SitePolicy, load_site
from tests.federation import RUN, layout_for, random_tensors, small_study
from tests.test_audit import lines
from tests.test_private_rounds import Hospital, facts_of, private_study, quick_accountant, request  # noqa: F401
from unimiss_core import progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError, PolicyError
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply, TrainRequest

STUDY = small_study()
QUIET = small_study(wire={"losses": False})


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")  # which the site answers with `failed`

    for name in ("open_library", "open_private_library"):
        monkeypatch.setattr(sites, name, read)


def asked(hospital: Hospital, study: StudyConfig) -> tuple[list[Refusal | None], str]:
    """What it answers to an introduction and to a round, and what its own screen says."""
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        found = [Refusal.found_in(ask(Hello(study, RUN).pack(), "query"))]
        found.append(Refusal.found_in(ask(request(study), "train")))
    return found, "\n".join(event.text for event in heard if isinstance(event, progress.Note))


BEYOND: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no study yet": ({"studies": []}, {}, r"not in policy\.studies; add '[0-9a-f]{64}' to allow it exactly"),
    "another name": ({"studies": ["toy"]}, {"name": "toys"}, r"or 'toys' to allow whatever"),
    "another digest": ({"studies": [STUDY.digest()]}, {"seed": 1}, r"not in policy\.studies"),
    "called like a digest": ({"studies": [STUDY.digest()]}, {"name": STUDY.digest(), "seed": 1}, "not in"),
    "losses": ({"losses_may_leave": False}, {}, r"policy\.losses_may_leave is false"),
    "rounds": ({"most_rounds": 3}, {"rounds": 4}, r"4 rounds, above policy\.most_rounds: 3"),
    "steps": ({"most_steps": 1}, {}, r"2 steps in a round, above policy\.most_steps: 1"),
    "a wide network": ({}, {"model": {"size": "small", "prototypes": 2**20}}, r"policy\.most_parameters: 200,000,000"),
    "huge tables": ({}, {"model": {"prototypes": 16, "volume_size": [4096, 4096, 4096]}}, r"policy\.most_parameters"),
    "huge batches": ({}, {"batch": {"images": 10**9}}, r"voxels in a step, above policy\.most_voxels"),
    "huge views": ({}, {"views": {"volume_size": [4096, 4096, 4096]}}, r"policy\.most_voxels"),
    "fine grids": ({}, {"plan": {"volume_spacing_mm": [1.0, 1.0, 0.001]}}, r"0\.001 mm, below policy\.finest_spacing"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("what", BEYOND)
def test_what_the_policy_does_not_allow_is_refused_before_anything_is_read(tmp_path: Path, what: str) -> None:
    policy, changes, told = BEYOND[what]
    study = small_study(**changes)
    refused, said = asked(Hospital(tmp_path, policy=policy), study)
    assert refused == [Refusal("policy")] * 2
    assert re.search(told, said), said
    reasons = [line.get("reason") for line in lines(tmp_path / "state") if line["kind"] == "refusal"]
    assert reasons == ["policy"] * 2


@pytest.mark.parametrize(
    "policy",
    [{}, {"studies": ["toy"]}, {"studies": [QUIET.digest()]}, {"studies": ["other", "toy"], "losses_may_leave": False}],
)
def test_what_it_allows_takes_part(tmp_path: Path, policy: dict[str, Any]) -> None:
    assert asked(Hospital(tmp_path, policy=policy), QUIET)[0] == [None, None]


def test_the_site_keeps_in_words_what_it_last_refused_until_it_answers(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, policy={"studies": []})
    asked(hospital, QUIET)
    refused = read_refused(tmp_path / "state")
    assert refused is not None
    assert refused.reason == "policy"
    assert f"add '{QUIET.digest()}' to allow it" in refused.words
    file = tmp_path / "site.yaml"
    file.write_text(file.read_text().replace("studies: []", f"studies: [{QUIET.digest()}]"))
    asked(hospital, QUIET)
    assert read_refused(tmp_path / "state") is None


def test_every_breach_is_told_at_once() -> None:
    study = small_study(batch={"images": 10**9}, plan={"volume_spacing_mm": [1.0, 1.0, 0.001]})
    assert len(list(beyond(SitePolicy(studies=(), most_rounds=1, most_steps=1, losses_may_leave=False), study))) == 6


def test_huge_studies_take_no_memory_to_refuse() -> None:
    """A table of 4096^3 / 2^24 patches and more would be gigabytes; it is told from its shape alone."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = small_study(
        model={"size": "small", "prototypes": 2**20, "volume_size": [4096] * 3, "image_size": [4096] * 2}
    )
    assert any("most_parameters" in line for line in beyond(SitePolicy(), huge))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_published_settings_are_well_within_the_bounds(size: str) -> None:
    published = {
        "model": {"size": size, "image_size": [224, 224], "volume_size": [16, 96, 96], "prototypes": 65_536},
        "views": {"image_size": [224, 224], "volume_size": [16, 96, 96]},
        "batch": {"images": 512, "volumes": 64},
        "schedule": {"rounds": 1000, "local_steps": 2000},
    }
    assert list(beyond(SitePolicy(), small_study(**published))) == []


# -- what may leave ---------------------------------------------------------------------------------------------------


def test_a_study_without_losses_is_sent_none(tmp_path: Path) -> None:
    with Hospital(tmp_path, policy={"losses_may_leave": False}).asked() as ask:
        ask(Hello(QUIET, RUN).pack(), "query")
        reply = ask(request(QUIET), "train")
    assert (facts_of(reply)["losses"], facts_of(reply)["diagnostics"]) == ("{}", "{}")
    assert lines(tmp_path / "state")[-1]["figures"] == 0
    assert "losses" in QUIET.model_dump()["wire"]
    assert small_study().digest() == small_study(wire={"losses": True}).digest() != QUIET.digest()


def test_a_private_study_tells_no_losses_anyway(tmp_path: Path) -> None:
    refused, _ = asked(Hospital(tmp_path, policy={"losses_may_leave": False}), private_study())
    assert refused == [None, None]


def volumes_request(study: StudyConfig) -> RecordDict:
    layout = layout_for(frozenset({2, 3}))
    return TrainRequest(study, RUN, 1, random_tensors(layout, 0), None, {}).pack(layout)


@pytest.mark.usefixtures("unread")
def test_a_request_for_a_group_that_may_not_leave_is_refused_before_a_scan_is_read(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, policy={"groups_may_leave": ["shared", "2d", "head"]})
    with hospital.asked() as ask:
        assert Refusal.found_in(ask(volumes_request(STUDY), "train")) == Refusal("policy")


def test_a_site_whose_images_alone_may_leave_takes_part_with_them(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, policy={"groups_may_leave": ["shared", "2d", "head"]})
    assert asked(hospital, STUDY)[0] == [None, None]
    with pytest.raises(PolicyError, match="group 3d would leave"):
        check_groups(load_site(tmp_path / "site.yaml"), ("shared", "3d"))


def test_groups_without_which_nothing_can_be_trained_must_be_allowed() -> None:
    with pytest.raises(ConfigError, match=r"without 2d, head no site can train.*studies: \[\]"):
        parse(SitePolicy, {"groups_may_leave": ["shared", "3d"]}, where="site")


# -- disk -------------------------------------------------------------------------------------------------------------


def test_a_coordinator_cannot_fill_the_disk_with_runs(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, policy={"runs_limit_gb": 0.5})
    (tmp_path / "state" / "runs" / ("a" * 16)).mkdir(parents=True)
    with (tmp_path / "state" / "runs" / ("a" * 16) / "round-0001.safetensors").open("wb") as file:
        file.truncate(500_000_000)
    refused, said = asked(hospital, STUDY)
    assert refused == [Refusal("policy")] * 2
    assert "above policy.runs_limit_gb: 0.5; delete what is not needed below 'runs'" in said
    (tmp_path / "state" / "runs" / ("a" * 16)).rename(tmp_path / "state" / "models")  # a site's own heads count as well
    (tmp_path / "state" / "runs").rmdir()
    assert asked(hospital, STUDY)[0] == [Refusal("policy")] * 2
    (tmp_path / "state" / "runs").mkdir()
    (tmp_path / "state" / "runs" / RUN).mkdir()  # a run that has begun goes on
    assert asked(hospital, STUDY)[0] == [None, None]


def test_what_a_run_is_counted_for_is_what_it_takes(tmp_path: Path) -> None:
    study = small_study(rounds=3)
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        for number in (1, 2):
            ask(request(study, number), "train")
    taken = sum(path.stat().st_size for path in (tmp_path / "state" / "runs" / RUN).iterdir())
    assert taken <= policies.REMEMBERED_BYTES * policies._parameters(study)


# -- what a hostile coordinator may send ------------------------------------------------------------------------------


def with_array(content: RecordDict, **changes: Any) -> RecordDict:
    """The request with one of its arrays changed."""
    record = content["student"]
    assert isinstance(record, ArrayRecord)
    held = record["2d"]
    settings = {"dtype": held.dtype, "shape": held.shape, "stype": held.stype, "data": held.data, **changes}
    return RecordDict({**content, "student": ArrayRecord({**record, "2d": Array(**settings)})})


def test_a_claim_of_five_gigabytes_costs_nothing_and_is_measured_by_what_came(tmp_path: Path) -> None:
    """The header of an array is never believed: bytes are counted, by the study's own network."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
        claimed = with_array(request(STUDY), shape=(2_500_000_000,), data=b"\0" * 64)
        assert Refusal.found_in(ask(claimed, "train")) == Refusal("wrong_size")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert lines(tmp_path / "state")[-2]["bytes"] < 2_000_000  # what came, not what was claimed


@pytest.mark.parametrize("text", ["[" * 60_000, "[" * 10**7, '{"name": "' + "x" * 10**7 + '"}', "null", "{}"])
def test_a_study_that_is_none_is_refused_by_a_code(tmp_path: Path, text: str) -> None:
    content = Hello(STUDY, RUN).pack()
    content["facts"]["study"] = text  # type: ignore[index]
    with Hospital(tmp_path).asked() as ask:
        assert Refusal.found_in(ask(content, "query")) == Refusal("study")


def test_a_study_whose_noise_was_lowered_is_another_study(tmp_path: Path) -> None:
    """A digest that a site allows holds every setting, whatever the run configuration says."""
    agreed, privacy = private_study(), private_study().model_dump(mode="json")["privacy"]
    lowered = private_study(privacy={**privacy, "noise_multiplier": 0.5})
    renamed = private_study(name="toy2")
    hospital = Hospital(tmp_path, policy={"studies": [agreed.digest()]})
    for study in (lowered, renamed):
        assert asked(hospital, study)[0] == [Refusal("policy")] * 2
    with hospital.asked() as ask:
        assert Introduction.unpack(ask(Hello(agreed, RUN).pack(), "query")).site == "north"


def test_a_policy_in_words_names_what_may_come_and_leave() -> None:
    assert "none yet" in next(in_words(SitePolicy(studies=())))
    told = "\n".join(in_words(SitePolicy(studies=("ward",), losses_may_leave=False, bundles=("a" * 64,))))
    for words in ("ward (policy.studies)", "losses: no.", "and 1 more"):
        assert words in told


def test_a_simulation_may_try_a_policy() -> None:
    from server.simulate import SimulatedSite

    raw = {"name": "north", "phantom": {"kind": "cr", "patients": 2}, "policy": {"studies": ["ward"]}}
    assert parse(SimulatedSite, raw, where="").policy.studies == ("ward",)


def test_an_update_is_as_large_as_its_site_may_send(tmp_path: Path) -> None:
    """Nothing but what the request's groups are: a policy that was obeyed at the beginning is obeyed at the end."""
    with Hospital(tmp_path).asked() as ask:
        ask(Hello(STUDY, RUN).pack(), "query")
        reply = ask(request(STUDY), "train")
    assert TrainReply.unpack(reply, layout_for(frozenset({2})), STUDY.wire.dtype).site == "north"
    assert set(lines(tmp_path / "state")[-1]["groups"]) == {"shared", "2d", "head"}
