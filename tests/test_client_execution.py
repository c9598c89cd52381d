"""From a site file to a learner: what it says, what is found to fit, and what is remembered of that."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from client import execution
from client.execution import MEMORY, is_slow_in_bf16, largest_that_fits, learner_for, look_over
from client.site_config import SiteConfig
from client.telling import tell
from tests.federation import Placed
from tests.test_execution import Backend, Tight
from tests.test_learner import images, study
from tests.test_private_rounds import private_study
from unimiss_core import durable, progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.execution import PLAIN, Execution
from unimiss_core.learner import Learner
from unimiss_core.network import empty_network, tensors_of
from unimiss_core.optimiser_config import MomentumSGDConfig
from unimiss_core.scan import Rank
from unimiss_core.study import LocalConfig, StudyConfig
from unimiss_core.team import Alone

STUDY = study()


@contextmanager
def heard() -> Iterator[list[str]]:
    told: list[str] = []
    with progress.listen(lambda event: told.append(event.text if isinstance(event, progress.Note) else "")):
        yield told


def _found(learner: Learner, ranks: Sequence[Rank], memory: Path) -> Iterator[tuple[Rank, int]]:
    return execution._found(learner, ranks, memory, tell=partial(tell, "north"))


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
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


@pytest.mark.parametrize(("capability", "slow"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_that_emulates_bfloat16_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], slow: bool
) -> None:
    monkeypatch.setattr(execution, "devices_of", lambda _: [torch.device("cuda", 1)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert is_slow_in_bf16(torch.device("cuda", 1)) == slow
    with heard() as told:
        look_over(site(tmp_path, precision="bf16", devices="cuda:1"))
    words = "bf16 is slow on cuda:1, which emulates its products (GPUs have them from compute capability 8.0 on)"
    assert told == [f"north: precision: {words}; fp32 is faster there, if it fits"] * slow


def test_gpus_that_auto_leaves_unused_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with heard() as told:
        look_over(site(tmp_path, devices="auto"))
        look_over(site(tmp_path, devices="cpu"))
    (said,) = told
    assert said.startswith("north: devices: auto leaves cuda:0 unused: CUDA does not start")


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


def with_free(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    """On a card of 8 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gigabytes * 2**30), 8 * 2**30))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> tuple[Learner, Tight]:
    """A learner on a card that holds three scans of the study's 16 images or 2 volumes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card())
    with_free(monkeypatch, 7)
    learner = Learner(STUDY, ranks={2, 3})
    learner.objective = objective = Tight(learner, scans=3)
    return learner, objective


def test_what_fits_is_tried_once_and_remembered(tmp_path: Path, tight: tuple[Learner, Tight]) -> None:
    learner, objective = tight
    memory = tmp_path / "state" / MEMORY
    with heard() as told:
        assert dict(_found(learner, [2, 3], memory)) == {2: 3, 3: 2}
    assert objective.sizes
    where = "at a time to fit on cpu, where 7.5 of 8.6 GB are free"
    assert told == [
        f"north: micro_batch.images: auto found 3 of 16 2D scans {where}",
        f"north: micro_batch.volumes: auto found 2 of 2 3D scans {where}",
    ]
    objective.sizes.clear()
    with heard() as told:
        assert dict(_found(learner, [2, 3], memory)) == {2: 3, 3: 2}
    assert not objective.sizes
    assert not told


def test_where_clearly_more_is_free_than_at_the_trial_it_is_tried_again(
    tmp_path: Path, tight: tuple[Learner, Tight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other work held half of the card on one afternoon."""
    learner, objective = tight
    for gigabytes, scans, finds, tries in [
        (4.0, 1, 1, True),
        (4.5, 3, 1, False),
        (3.0, 3, 1, False),
        (7.0, 3, 3, True),
        (4.0, 1, 3, False),  # a step that finds no room halves its parts by itself
        (7.0, 3, 3, False),
    ]:
        with_free(monkeypatch, gigabytes)
        objective._scans = scans
        objective.sizes.clear()
        assert dict(_found(learner, [2], tmp_path / MEMORY)) == {2: finds}
        assert bool(objective.sizes) == tries


def test_what_an_older_version_kept_is_found_again(tmp_path: Path, tight: tuple[Learner, Tight]) -> None:
    (tmp_path / MEMORY).write_text(json.dumps({execution._circumstances(tight[0], 2): 1}))
    assert dict(_found(tight[0], [2], tmp_path / MEMORY)) == {2: 3}
    (kept,) = json.loads((tmp_path / MEMORY).read_text()).values()
    assert kept == {"scans": 3, "free": 7 * 2**30}


def test_what_a_steps_memory_follows_from_is_told_apart(tight: tuple[Learner, Tight]) -> None:
    learner, _ = tight
    plain = execution._circumstances(learner, 2)
    for changed in (
        {"local": LocalConfig(proximal=0.1)},
        {"optimiser": MomentumSGDConfig()},
        {"privacy": private_study().privacy},
    ):
        learner.study = STUDY.model_copy(update=changed)
        assert execution._circumstances(learner, 2) != plain
    learner.study = STUDY
    learner.execution = Execution(cuda_graphs=False)
    assert execution._circumstances(learner, 2) != plain


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


DEEP = pytest.param("[" * 50_000, id="deep")


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": 0}', '{"a": {"scans": 0, "free": 1}}', DEEP])
def test_a_damaged_memory_is_found_anew(tmp_path: Path, tight: tuple[Learner, Tight], content: str) -> None:
    (tmp_path / MEMORY).write_text(content)
    assert dict(_found(tight[0], [3], tmp_path / MEMORY)) == {3: 2}
    (kept,) = json.loads((tmp_path / MEMORY).read_text()).values()
    assert kept["scans"] == 2


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
    with_free(monkeypatch, 7)
    learner = Learner(STUDY, ranks={2})
    learner.objective = Tight(learner, scans=0)
    assert dict(_found(learner, [2], tmp_path / MEMORY)) == {2: 1}
    assert not list(tmp_path.iterdir())
