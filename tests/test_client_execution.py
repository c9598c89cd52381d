"""From a site file to a learner: what it says, what is found to fit, and what is remembered of that."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from client import execution
from client.execution import MEMORY, _found, is_slow_in_bf16, largest_that_fits, learner_for, look_over
from client.site_config import SiteConfig
from tests.federation import Placed
from tests.test_execution import Backend, Tight
from tests.test_learner import images, study
from unimiss_core import durable, progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.execution import PLAIN, Execution
from unimiss_core.learner import Learner
from unimiss_core.network import empty_network, tensors_of
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.team import Alone

STUDY = study()


def site(tmp_path: Path, **settings: object) -> SiteConfig:
    raw = {"name": "north", "data": [{"folder": str(tmp_path)}], "state": str(tmp_path), "devices": "cpu", **settings}
    return parse(SiteConfig, raw, where="site.yaml")


def made(config: SiteConfig, study: StudyConfig, ranks: set[Rank]) -> Learner:
    return learner_for(config, study, ranks, device=torch.device("cpu"), team=Alone())


def test_a_site_file_without_these_settings_computes_plainly(tmp_path: Path) -> None:
    learner = made(site(tmp_path), STUDY, {2, 3})
    assert learner.execution == PLAIN
    assert learner.micro_batch == {}  # auto on a CPU: the batch as a whole
    assert not list(tmp_path.iterdir())


def test_what_the_site_file_says_is_what_the_learner_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimiss_core.execution.COMPILER", "eager")
    settings = {"micro_batch": {"images": 3, "volumes": None}, "activation_checkpointing": True, "compile": True}
    learner = made(site(tmp_path, **settings), STUDY, {2, 3})
    assert learner.micro_batch == {2: 3}
    assert learner.execution.activation_checkpointing
    assert made(site(tmp_path, views_in_turn=True), STUDY, {2, 3}).execution == Execution(views_in_turn=True)
    assert learner.execution.compile
    assert not made(site(tmp_path, cuda_graphs=False), STUDY, {2, 3}).execution.cuda_graphs
    assert tensors_of(learner.student).keys() == tensors_of(empty_network(STUDY.model)).keys()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "all"])
def test_a_micro_batch_that_is_none_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"micro_batch\.images"):
        site(tmp_path, micro_batch={"images": wrong})


@pytest.mark.parametrize("slow", [True, False])
def test_a_processor_that_emulates_bfloat16_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(execution, "is_slow_in_bf16", lambda _: slow)
    assert made(site(tmp_path, precision="bf16"), STUDY, {2}).execution.precision == "bf16"
    heard: list[progress.Event] = []
    with progress.listen(heard.append):
        look_over(site(tmp_path, precision="bf16"))
        look_over(site(tmp_path))
    told = "north: precision: bf16 is slow on this processor, which has no such products; fp32 is faster here"
    assert heard == [progress.Note(told)] * slow


def test_a_device_that_is_not_there_is_told_by_site_and_key_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = "site 'north': key 'devices': device cuda:1, cuda:7 is not on this machine, which has cpu, cuda:0"
    with pytest.raises(ConfigError, match=f"^{told}$"):
        look_over(site(tmp_path, devices=["cuda:0", "cuda:1", "cuda:7"]))


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ("gpu", "'gpu' is no device's name; give auto, cpu, cuda, or cuda: and a number"),
        (["cpu:0", "cpu:1"], "'cpu:0' is no device's name"),
        (["auto", "cpu"], "auto, cpu: auto stands alone"),
        (["cuda", "cuda:0"], "cuda, cuda:0: give each GPU once and no CPU beside it"),
        (["cpu", "cuda:1"], "cpu, cuda:1: give each GPU once and no CPU beside it"),
    ],
)
def test_devices_that_no_machine_has_are_refused_with_the_file(tmp_path: Path, devices: object, told: str) -> None:
    with pytest.raises(ConfigError, match=f"'devices': {told}"):
        site(tmp_path, devices=devices)


def test_compilation_is_told_before_it_begins_and_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimiss_core.execution.COMPILER", Backend(fails="compiling"))
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(event.text if isinstance(event, progress.Note) else "")):
        learner = made(site(tmp_path, compile=True), STUDY, {2})
        assert heard == ["north: compile: the first steps take minutes each, while the network is compiled"]
        learner.step(images(), step=0)
    assert len(heard) == 2
    assert heard[1].startswith("north: compilation failed, going on without it: ")


def test_no_gpu_is_called_slow_in_bfloat16() -> None:
    assert not is_slow_in_bf16(torch.device("cuda"))


@pytest.mark.parametrize("whole", [1, 2, 7, 16, 24])
def test_the_fewest_equal_parts_that_fit_are_found_in_few_trials(whole: int) -> None:
    for limit in range(whole + 3):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        found = largest_that_fits(fits, whole)
        sizes = [size for size in range(1, whole + 1) if size <= limit]
        passes = min((-(-whole // size) for size in sizes), default=0)
        assert found == min((size for size in sizes if -(-whole // size) == passes), default=0)
        assert len(tried) == len(set(tried)) <= 2 * whole.bit_length()


def card(name: str = "Card", gigabytes: int = 8) -> SimpleNamespace:
    return SimpleNamespace(name=name, total_memory=gigabytes * 2**30)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> tuple[Learner, Tight]:
    """A learner on a card that holds three scans of the study's 16 images or 2 volumes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card())
    learner = Learner(STUDY, ranks={2, 3})
    learner.objective = objective = Tight(learner, scans=3)
    return learner, objective


def test_what_fits_is_tried_once_and_remembered(tmp_path: Path, tight: tuple[Learner, Tight]) -> None:
    learner, objective = tight
    memory = tmp_path / "state" / MEMORY
    assert dict(_found(learner, [2, 3], memory)) == {2: 3, 3: 2}
    assert objective.sizes
    objective.sizes.clear()
    assert dict(_found(learner, [2, 3], memory)) == {2: 3, 3: 2}
    assert not objective.sizes


@pytest.mark.parametrize("place", [0, 1])
def test_of_a_team_each_tries_out_its_part_and_the_first_remembers(
    tmp_path: Path, tight: tuple[Learner, Tight], place: int
) -> None:
    learner, objective = tight
    learner.team = Placed(place, size=8)
    assert dict(_found(learner, [2, 3], tmp_path / MEMORY)) == {2: 2, 3: 1}
    assert max(objective.sizes) == 2
    assert (tmp_path / MEMORY).exists() == (place == 0)
    learner.team = Alone()
    assert dict(_found(learner, [2], tmp_path / MEMORY)) == {2: 3}


def test_a_disk_without_room_for_the_memory_does_not_cost_the_round(
    tmp_path: Path, tight: tuple[Learner, Tight], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "write_text", full)
    assert dict(_found(tight[0], [3], tmp_path / MEMORY)) == {3: 2}
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": 0}'])
def test_a_damaged_memory_is_found_anew(tmp_path: Path, tight: tuple[Learner, Tight], content: str) -> None:
    (tmp_path / MEMORY).write_text(content)
    assert dict(_found(tight[0], [3], tmp_path / MEMORY)) == {3: 2}
    assert list(json.loads((tmp_path / MEMORY).read_text()).values()) == [2]


def test_another_card_or_another_study_is_tried_anew(
    tmp_path: Path, tight: tuple[Learner, Tight], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, objective = tight
    dict(_found(learner, [3], tmp_path / MEMORY))
    for other in (card(gigabytes=4), card(name="Another")):
        objective.sizes.clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, other=other: other)
        dict(_found(learner, [3], tmp_path / MEMORY))
        assert objective.sizes
    objective.sizes.clear()
    learner.study = study(freeze_prototypes_steps=1)
    dict(_found(learner, [3], tmp_path / MEMORY))
    assert not objective.sizes  # nothing that memory depends on
    learner.study = STUDY.model_copy(update={"batch": STUDY.batch.model_copy(update={"volumes": 1})})
    dict(_found(learner, [3], tmp_path / MEMORY))
    assert objective.sizes
    assert len(json.loads((tmp_path / MEMORY).read_text())) == 4


def test_where_not_even_one_scan_fits_the_step_says_so_and_nothing_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card())
    learner = Learner(STUDY, ranks={2})
    learner.objective = Tight(learner, scans=0)
    assert dict(_found(learner, [2], tmp_path / MEMORY)) == {2: 1}
    assert not list(tmp_path.iterdir())
