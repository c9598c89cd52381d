"""What a hostile site may send for an update: it costs that site its round, is written down, and runs nothing."""

import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tests.federation import StubSite
from tests.test_audit import federation, lines
from unimiss_core.codec import num_bytes
from unimiss_core.wire import arrays_in


class Bomb:
    """Writes a file where somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def with_group(content: RecordDict, **changes: Any) -> RecordDict:
    held = arrays_in(content)["update"]["2d"]
    settings = {"dtype": held.dtype, "shape": held.shape, "stype": held.stype, "data": held.data, **changes}
    return RecordDict({**content, "update": ArrayRecord({**arrays_in(content)["update"], "2d": Array(**settings)})})


def refused_as(out: Path, tamper: Any) -> list[str]:
    """Reasons, by round, of a site that tampers; beside it an honest one, whose rounds go on."""
    good, bad = StubSite("good", {2: 3}), StubSite("bad", {2: 3})
    bad.tamper = tamper
    federation(out, [good, bad])()
    found = lines(out)
    assert [line["round"] for line in found if line["kind"] == "counted" and line["site"] == "good"] == [1, 2]
    assert not [line for line in found if line["kind"] == "counted" and line["site"] == "bad" and line["round"] == 2]
    return [line["reason"] for line in found if line["kind"] == "refused"]


@pytest.mark.parametrize("padded", [False, True], ids=["as it is", "as long as the update"])
@pytest.mark.parametrize(
    ("claimed", "reasons"),
    [("numpy.ndarray", {"wrong_dtype"}), ("unimiss", {"wrong_size", "not_finite", "too_large"})],
)
def test_a_pickle_in_an_update_is_never_opened(tmp_path: Path, claimed: str, reasons: set[str], padded: bool) -> None:
    trap = tmp_path / "opened"
    bomb = pickle.dumps(Bomb(trap))
    pickle.loads(bomb)
    assert trap.exists()  # it works
    trap.unlink()

    def tamper(content: RecordDict, _: int) -> RecordDict:
        size = len(arrays_in(content)["update"]["2d"].data)
        return with_group(content, stype=claimed, data=bomb + b"\x7f" * (size - len(bomb)) if padded else bomb)

    assert set(refused_as(tmp_path / "out", tamper)) <= reasons
    assert not trap.exists()


def test_a_claim_of_five_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def tamper(content: RecordDict, _: int) -> RecordDict:
        return with_group(content, shape=(2_500_000_000,), data=b"\0" * 10)

    assert refused_as(tmp_path / "out", tamper) == ["wrong_size"] * 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


def test_an_update_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    kept: dict[int, RecordDict] = {}

    def replay(content: RecordDict, round: int) -> RecordDict:
        return kept.setdefault(1, content) if round == 2 else kept.setdefault(round, content)

    assert refused_as(tmp_path / "out", replay) == ["stale_round"]


def test_an_update_of_another_run_does_not_count(tmp_path: Path) -> None:
    def of_another(content: RecordDict, _: int) -> RecordDict:
        return RecordDict({**content, "facts": ConfigRecord({**content["facts"], "run": "f" * 16})})

    assert refused_as(tmp_path / "out", of_another) == ["wrong_run"] * 2


def test_what_came_is_written_down_by_its_real_size(tmp_path: Path) -> None:
    site = StubSite("bad", {2: 3})
    good = StubSite("good", {2: 3})
    site.tamper = lambda content, _: with_group(content, data=b"\0" * 10)
    federation(tmp_path / "out", [good, site])()
    sizes = {line["site"]: line["bytes"] for line in lines(tmp_path / "out") if line["kind"] in ("counted", "refused")}
    assert sizes["good"] == num_bytes(good.layout, "bf16")
    assert sizes["bad"] < sizes["good"]
