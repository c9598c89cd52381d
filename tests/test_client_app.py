"""What a site answers when it is asked, and what it says on its own screen meanwhile."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Message, RecordDict

from client import site as sites
from client.app import app
from client.pictures import write_png
from server.local_grid import LocalGrid
from tests.federation import RUN, small_study
from unimiss_core import progress
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction, Refusal


def introduced(folder: Path, study: StudyConfig, **settings: object) -> tuple[RecordDict, list[str]]:
    """(the answer of a site with two pictures, what it said)."""
    (folder / "scans").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (41, 35)).astype(np.uint8)
        write_png(folder / "scans" / f"{number}.png", pixels)
    raw: dict[str, Any] = {"name": "north", "data": [{"folder": "scans"}], "state": "state", "devices": "cpu"}
    (folder / "site.yaml").write_text(yaml.safe_dump({**raw, **settings}))
    heard: list[progress.Event] = []
    nodes: dict[str, Any] = {"node": {"site": str(folder / "site.yaml")}}
    with progress.listen(heard.append), LocalGrid(app, nodes, run_config={}) as grid:
        (node,) = grid.get_nodes()
        sent = grid.push_messages([Message(Hello(study, RUN).pack(), node.node_id, "query")])
        until = time.monotonic() + 60
        while not (replies := grid.pull_messages(sent)):
            assert time.monotonic() < until
            time.sleep(0.01)
    (reply,) = replies
    return reply.content, [event.text for event in heard if isinstance(event, progress.Note)]


def test_a_site_with_fewer_scans_than_a_batch_says_so_and_takes_part(tmp_path: Path) -> None:
    content, said = introduced(tmp_path, small_study(batch={"images": 3}))
    assert Introduction.unpack(content).scans == {2: 2, 3: 0}
    assert said == ["north: each 2D batch of 3 is drawn from 2 scans: some stand in it repeatedly"]


def test_a_device_that_is_not_there_is_told_before_scans_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sites, "open_library", lambda *_: pytest.fail("read"))
    content, said = introduced(tmp_path, small_study(), devices="cuda:0")
    assert Refusal.found_in(content) == Refusal("site_setup")
    assert said == ["north: key 'devices': device cuda:0 is not on this machine, which has cpu"]


def test_mistakes_of_a_site_file_are_a_line_each(tmp_path: Path) -> None:
    content, said = introduced(tmp_path, small_study(), micro_batch={"images": 0}, devices="gpu")
    assert Refusal.found_in(content) == Refusal("site_setup")
    assert [line.split(": ")[0] for line in said] == ["this site"] * 3
    assert "'devices': 'gpu' is no device's name" in said[1]
    assert "'micro_batch.images': expected auto, an integer above 0 and at most 1000000 or null, got 0" in said[2]


def test_a_folder_that_is_gone_is_told_under_the_sites_name(tmp_path: Path) -> None:
    _, said = introduced(tmp_path, small_study(), data=[{"folder": "gone"}])
    assert said == [
        "north: its file names what is not there",
        f"north: - 'data.0.folder': {tmp_path / 'gone'} is not a folder",
    ]


def test_the_state_folder_is_for_the_site_alone(tmp_path: Path) -> None:
    introduced(tmp_path, small_study())
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
