"""Fixtures that several files of tests ask for. What they need is imported when one does."""

import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.joined_site import Joined
    from unimiss_core.checkpoint import Checkpoint


os.environ.setdefault("OMP_NUM_THREADS", "1")
"""As `make test` has it, and before torch is imported: bits hang on how many threads share a sum."""

LONGEST = (
    "test_federation_of_processes",
    "test_transports",
    "test_superlink",
    "test_execution",
)
"""Files of minutes, begun first, so that no process is left with one of them when the others have ended."""


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Commands set variables for their children (`server.server_command`), and a process of tests goes on."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != before.get(name):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What was imported stays: Python's collector looks at it once, and not again while tests run."""
    gc.collect()
    gc.freeze()
    if rounds := sys.modules.get("server.rounds"):
        rounds.check_adaptation = each_start_once(rounds.check_adaptation)


def each_start_once(check: "Callable[[Checkpoint], None]") -> "Callable[[Checkpoint], None]":
    """`check` of what a run starts from, but for what it found good before: it builds four models, in as long as a
    small federation takes for a round, and most of all runs in these tests start from the same weights. A test that
    makes the check fail by anything but weights must bring the real one back, as test_adaptation does."""
    good = set()

    def checked(found: "Checkpoint") -> None:
        digest = hashlib.sha256(found.manifest.model.model_dump_json().encode())
        for name, tensor in sorted(found.teacher.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
        if digest.digest() not in good:
            check(found)
            good.add(digest.digest())

    return checked


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one of loopback, to which no proxy is asked the way."""
    from tests.flower_deployment import free_port

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return free_port()


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads foreign files starts a process for each core, of half a second; a test's few files need one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def pair(tmp_path: Path, port: int) -> "Joined":
    """A site that has joined a coordinator at `port`."""
    from tests.joined_site import joined

    return joined(tmp_path, address=f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """A nano of few numbers for all tests of a file, and for what its fixtures keep."""
    from tests.federation import NARROW
    from unimiss_core.model import ARCHITECTURES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "nano", NARROW)
        yield


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks in all, of a fine, of the coarsest and of the last grid: the compiler's time goes by blocks."""
    from unimiss_core.model import ARCHITECTURES

    few = replace(ARCHITECTURES["nano"], encoder_depths=(1, 0, 0, 1), decoder_depths=(0, 0, 1))
    monkeypatch.setitem(ARCHITECTURES, "nano", few)
