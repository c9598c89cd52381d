"""A reply that is announced and never comes whole: how long Flower's grid waits for it."""

import time

import pytest
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid import http_grid

from server import uploads
from server.exchange import GRACE


@pytest.fixture(autouse=True)
def as_flower_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)
    monkeypatch.setattr(http_grid, "inflate_object_from_contents", inflate_object_from_contents)


def never_there(_object_id: str) -> bytes:
    raise ObjectUnavailableError("to be sent yet")


def test_a_reply_that_never_comes_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LEAST_S", 0.1)
    uploads.bound(0.8)
    began = time.monotonic()
    with pytest.raises(ObjectPullError):
        http_grid.pull_objects(["a" * 64, "b" * 64], never_there)
    assert time.monotonic() - began < 5.0  # Flower looks again after a second; without a bound, for two hours


def test_the_wait_leaves_time_for_the_other_replies() -> None:
    assert uploads.longest_upload_s(3600.0) == 450.0 < 3600.0 * GRACE
    assert uploads.longest_upload_s(10.0) == uploads.LEAST_S


def test_flowers_grid_asks_by_the_name_that_is_replaced() -> None:
    assert {"pull_objects", "inflate_object_from_contents"} <= set(http_grid.HttpGrid.pull_messages.__code__.co_names)
    uploads.bound(3600.0)
    uploads.bound(7200.0)  # another run in the same process
    assert http_grid.pull_objects.func is pull_objects
    assert http_grid.pull_objects.keywords == {"max_time": 900.0}
    assert http_grid.inflate_object_from_contents is uploads.joined
