"""A site's ledger: what was charged outlives every crash, a charge is for one release, and no limit is overspent.

Epsilon here is a sum that can be done by hand: steps times rate over noise, of all releases.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from client import accounting
from client.ledger import Asked, Ledger
from client.site_config import PatientLimits
from client.site_state import SiteState
from tests.federation import RUN, small_study
from tests.test_site_state import after
from unimiss_core.chain import BEGINNING, Head
from unimiss_core.errors import ConfigError, LedgerError, PrivacyBudgetError
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.study import StudyConfig

OTHER_RUN = "f" * 16
ROUND_COST = 2 * 0.25 / 2
"""Of `releases`: two steps at rate 1/4 with noise 2."""


def by_hand(history: Sequence[Mechanism], delta: float) -> float:
    assert delta > 0
    return sum(each.steps * each.sampling_rate / each.noise_multiplier for each in history)


def ledger_in(folder: Path, max_epsilon: float | None = None, **limits: object) -> Ledger:
    return Ledger(folder, PatientLimits.model_validate({"max_epsilon": max_epsilon, **limits}), by_hand)


def private(name: str = "toy", *, max_epsilon: float = 100.0, rounds: int = 9, **changes: object) -> StudyConfig:
    privacy = {"mode": "patient", "max_epsilon": max_epsilon, "noise_multiplier": 2.0, **changes}
    sized = {"batch": {"images": 256, "volumes": 256}, "aggregation": {"weighting": "uniform"}}
    return small_study(rounds, name=name, privacy=privacy, **sized)


def asked(round: int = 1, request: str = "a", *, run: str = RUN, study: StudyConfig | None = None) -> Asked:
    return Asked(study or private(), run, round, request * 64)


def releases(noise: float = 2.0) -> list[Mechanism]:
    return [Mechanism(noise, 0.25, 2)]


def charge(ledger: Ledger, what: Asked, of: Sequence[Mechanism] = tuple(releases())) -> None:
    with ledger.alone(what.run):
        ledger.reserve(what, of)


def go_through(ledger: Ledger, what: Asked, reply: bytes = b"update") -> bytes:
    """A round as a site takes it: what leaves."""
    with ledger.alone(what.run):
        if (sent := ledger.reply_of(what)) is not None:
            return sent
        reservation = ledger.reserve(what, releases())
        ledger.record_reply(reservation, reply)
    return reply


def spent(folder: Path) -> float:
    return ledger_in(folder).site_account().spent


def rounds_charged(folder: Path) -> int:
    return ledger_in(folder).site_account().rounds


def test_a_round_asked_for_twice_is_charged_once_and_sent_the_same_bytes(tmp_path: Path) -> None:
    for attempt in (b"first", b"second"):
        assert go_through(ledger_in(tmp_path), asked(), attempt) == b"first"
    assert spent(tmp_path) == ROUND_COST


def test_a_round_that_crashed_goes_on_under_its_charge(tmp_path: Path) -> None:
    for _ in range(3):
        charge(ledger_in(tmp_path), asked())
    assert (spent(tmp_path), rounds_charged(tmp_path)) == (ROUND_COST, 1)
    assert ledger_in(tmp_path).reply_of(asked()) is None
    assert go_through(ledger_in(tmp_path), asked(), b"x") == b"x"
    assert rounds_charged(tmp_path) == 1


@pytest.mark.parametrize(
    "other",
    [
        asked(request="b"),
        asked(2),
        asked(run=OTHER_RUN),
        asked(study=private(clip_norm=2.0)),
    ],
    ids=["student", "round", "run", "study"],
)
@pytest.mark.parametrize("released", [True, False])
def test_whatever_else_is_asked_for_is_charged_anew(tmp_path: Path, other: Asked, released: bool) -> None:
    if released:
        go_through(ledger_in(tmp_path), asked())
    else:
        charge(ledger_in(tmp_path), asked())
    assert ledger_in(tmp_path).reply_of(other) is None
    go_through(ledger_in(tmp_path), other, b"y")
    assert spent(tmp_path) == 2 * ROUND_COST


def test_other_releases_for_the_same_request_are_charged_anew(tmp_path: Path) -> None:
    """The site has gained volumes since, say."""
    charge(ledger_in(tmp_path), asked())
    charge(ledger_in(tmp_path), asked(), [*releases(), Mechanism(2.0, 0.5, 1)])
    assert rounds_charged(tmp_path) == 2


@pytest.mark.parametrize("between", [asked(2), asked(request="b")], ids=["later round", "same round"])
def test_a_reservation_is_given_up_when_its_run_goes_on(tmp_path: Path, between: Asked) -> None:
    """What the round's first attempt left in the site's memory may be in the later release: another is a second."""
    charge(ledger_in(tmp_path), asked())
    go_through(ledger_in(tmp_path), between)
    charge(ledger_in(tmp_path), asked())
    assert rounds_charged(tmp_path) == 3


def test_another_run_does_not_take_a_reservation(tmp_path: Path) -> None:
    """Two runs share no memory."""
    charge(ledger_in(tmp_path), asked())
    go_through(ledger_in(tmp_path), asked(run=OTHER_RUN))
    charge(ledger_in(tmp_path), asked())
    assert rounds_charged(tmp_path) == 2


def test_a_reply_that_is_no_longer_kept_is_paid_for_again(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        go_through(ledger_in(tmp_path), asked(round), b"%d" % round)
    assert [ledger_in(tmp_path).reply_of(asked(round)) for round in (1, 2, 3)] == [None, b"2", b"3"]
    assert go_through(ledger_in(tmp_path), asked(1), b"again") == b"again"
    assert rounds_charged(tmp_path) == 4


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"updat")])
def test_a_damaged_reply_is_not_sent(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    go_through(ledger_in(tmp_path), asked())
    (kept,) = tmp_path.rglob("reply-*")
    damage(kept)
    assert ledger_in(tmp_path).reply_of(asked()) is None
    go_through(ledger_in(tmp_path), asked())
    assert rounds_charged(tmp_path) == 2


def test_what_a_site_remembers_and_its_replies_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    memory = SiteState(tmp_path, run=RUN, study_digest="a" * 64)
    for round in (1, 2, 3):
        go_through(ledger_in(tmp_path), asked(round))
        memory.remember(after(round))
    assert {path.name for path in (tmp_path / "runs" / RUN).iterdir()} == {
        "round-0002.safetensors",
        "round-0003.safetensors",
        "reply-0002.bin",
        "reply-0003.bin",
    }


def test_a_reply_is_recorded_once_and_for_the_newest_reservation(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    with ledger.alone(RUN):
        first = ledger.reserve(asked(1), releases())
        second = ledger.reserve(asked(2), releases())
        with pytest.raises(ValueError, match="used or given up"):
            ledger.record_reply(first, b"1")
        ledger.record_reply(second, b"2")
        with pytest.raises(ValueError, match="used or given up"):
            ledger.record_reply(second, b"2")
    assert ledger.reply_of(asked(1)) is None
    assert ledger.reply_of(asked(2)) == b"2"


def test_mistakes_of_the_program_are_refused(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    with pytest.raises(ValueError, match="alone"):
        ledger.reserve(asked(), releases())
    with ledger.alone(RUN):
        with pytest.raises(ValueError, match="alone"):
            ledger.reserve(asked(run=OTHER_RUN), releases())
        with pytest.raises(ValueError, match="without releases"):
            ledger.reserve(asked(), [Mechanism(2.0, 0.25, 0)])
        with pytest.raises(ValueError, match="mode is none"):
            ledger.reserve(asked(study=small_study()), releases())
    assert ledger.head == BEGINNING


# --- limits


def test_the_studys_own_limit_is_kept(tmp_path: Path) -> None:
    study = private(max_epsilon=3 * ROUND_COST)
    for round in (1, 2, 3):
        go_through(ledger_in(tmp_path), asked(round, study=study))
    head = ledger_in(tmp_path).head
    with pytest.raises(PrivacyBudgetError, match=r"round 4 of study 'toy'.*epsilon 1 at delta 1e-05, above 0\.75 that"):
        charge(ledger_in(tmp_path), asked(4, study=study))
    assert ledger_in(tmp_path).head == head
    assert go_through(ledger_in(tmp_path), asked(3, study=study), b"another") == b"update"
    go_through(ledger_in(tmp_path), asked(1, study=private("other"), run=OTHER_RUN))


def test_a_study_that_runs_again_spends_the_same_limit(tmp_path: Path) -> None:
    study = private(max_epsilon=1.5 * ROUND_COST)
    go_through(ledger_in(tmp_path), asked(study=study))
    with pytest.raises(PrivacyBudgetError, match="the study promises"):
        charge(ledger_in(tmp_path), asked(study=study, run=OTHER_RUN))


def test_an_edited_study_goes_on_with_what_it_cost_and_another_name_begins_anew(tmp_path: Path) -> None:
    first = private(max_epsilon=2.5 * ROUND_COST)
    edited = first.model_copy(update={"seed": first.seed + 1})
    assert edited.digest() != first.digest()
    go_through(ledger_in(tmp_path), asked(study=first))
    go_through(ledger_in(tmp_path), asked(study=edited, run=OTHER_RUN))
    for study in (first, edited):
        with pytest.raises(PrivacyBudgetError, match=r"epsilon 0\.75 .* above 0\.625 that the study promises"):
            charge(ledger_in(tmp_path), asked(2, study=study))
    assert list(ledger_in(tmp_path).study_accounts()) == [("toy", edited.digest())]
    assert ledger_in(tmp_path).study_accounts()["toy", edited.digest()].spent == 2 * ROUND_COST
    go_through(ledger_in(tmp_path), asked(study=private("renamed", max_epsilon=2.5 * ROUND_COST)))


def test_the_sites_own_limit_is_over_all_studies(tmp_path: Path) -> None:
    for number in range(4):
        charge(ledger_in(tmp_path, 4 * ROUND_COST), asked(study=private(f"study-{number}"), run=f"{number:016x}"))
    with pytest.raises(PrivacyBudgetError, match=r"epsilon 1\.25 at delta 1e-05, above 1 that this site allows"):
        charge(ledger_in(tmp_path, 4 * ROUND_COST), asked(study=private("study-5")))
    charge(ledger_in(tmp_path), asked(study=private("study-5")))


def test_a_limit_that_was_lowered_holds_for_a_round_that_goes_on(tmp_path: Path) -> None:
    charge(ledger_in(tmp_path), asked())
    with pytest.raises(PrivacyBudgetError, match="this site allows"):
        charge(ledger_in(tmp_path, ROUND_COST / 2), asked())
    charge(ledger_in(tmp_path, ROUND_COST), asked())
    assert rounds_charged(tmp_path) == 1


def test_less_noise_than_the_site_asks_for_is_refused(tmp_path: Path) -> None:
    charge(ledger_in(tmp_path, least_noise_multiplier=2.0), asked())
    with pytest.raises(PrivacyBudgetError, match=r"is 1\.999, and this site asks for at least 2 "):
        charge(ledger_in(tmp_path, least_noise_multiplier=2.0), asked(2), [*releases(), Mechanism(1.999, 0.01, 1)])
    assert rounds_charged(tmp_path) == 1


def test_what_cannot_be_told_is_too_much(tmp_path: Path) -> None:
    def beyond(*_: object) -> float:
        raise ConfigError("above 100")

    ledger = Ledger(tmp_path, PatientLimits(), beyond)
    with pytest.raises(PrivacyBudgetError, match=r"cannot be told \(above 100\), so it is above epsilon 100"):
        charge(ledger, asked())
    assert ledger.head == BEGINNING
    assert ledger.site_account().spent == float("inf")


def test_each_delta_is_its_own(tmp_path: Path) -> None:
    seen = []

    def noted(history: Sequence[Mechanism], delta: float) -> float:
        seen.append(delta)
        return by_hand(history, delta)

    charge(Ledger(tmp_path, PatientLimits(max_epsilon=9, delta=1e-6), noted), asked(study=private(delta=1e-4)))
    assert sorted(seen) == [1e-6, 1e-4]


def test_accounts_say_what_is_spent_and_left(tmp_path: Path) -> None:
    small, large = private("small", max_epsilon=1.0), private("large", max_epsilon=2.0, delta=1e-6)
    for round in (1, 2):
        go_through(ledger_in(tmp_path), asked(round, study=small))
    charge(ledger_in(tmp_path), asked(1, study=large, run=OTHER_RUN))
    ledger = ledger_in(tmp_path, 3.0)
    accounts = ledger.study_accounts()
    assert list(accounts) == [("small", small.digest()), ("large", large.digest())]
    told = [(a.spent, a.limit, a.left, a.delta, a.rounds) for a in [*accounts.values(), ledger.site_account()]]
    assert told == [(0.5, 1.0, 0.5, 1e-5, 2), (0.25, 2.0, 1.75, 1e-6, 1), (0.75, 3.0, 2.25, 1e-5, 3)]
    assert ledger_in(tmp_path).site_account().left == float("inf")


@pytest.mark.parametrize("ranks", [frozenset({2}), frozenset({2, 3})])
def test_rounds_left_are_those_that_can_be_charged(tmp_path: Path, ranks: frozenset[int]) -> None:
    study = private(max_epsilon=0.21, rounds=9)

    def go_on(round: int) -> None:
        charge(ledger_in(tmp_path), asked(round, study=study), mechanisms(study, ranks, [round]))  # type: ignore[arg-type]

    go_on(1)
    assert ledger_in(tmp_path).newest_charge(study) == asked(1, study=study).as_charged
    anew = ledger_in(tmp_path).rounds_left(study, ranks)  # type: ignore[arg-type]
    left = ledger_in(tmp_path).rounds_left(study, ranks, after=1)  # type: ignore[arg-type]
    assert 1 <= left < 8
    assert anew == left  # the limit ends both, and a round costs the same in each
    for round in range(2, 2 + left):
        go_on(round)
    with pytest.raises(PrivacyBudgetError):
        go_on(2 + left)
    assert ledger_in(tmp_path).rounds_left(study, ranks, after=1 + left) == 0  # type: ignore[arg-type]
    assert ledger_in(tmp_path, 0.01).rounds_left(private("new"), ranks) == 0  # type: ignore[arg-type]
    assert ledger_in(tmp_path).rounds_left(private("new"), ranks) == 9  # type: ignore[arg-type]
    assert ledger_in(tmp_path).newest_charge(private("new")) is None


def test_a_study_whose_noise_keeps_its_limit_can_be_gone_through(tmp_path: Path) -> None:
    """With the accountant itself: the ledger's sum over rounds is the epsilon of the plan."""
    study = private(rounds=3)
    planned = accounting.study_epsilon(study)
    study = private(max_epsilon=planned * 1.0001, rounds=3)
    ledger = Ledger(tmp_path, PatientLimits(), accounting.epsilon)
    assert ledger.rounds_left(study, {2, 3}) == 3
    for round in (1, 2, 3):
        charge(ledger, asked(round, study=study), mechanisms(study, {2, 3}, [round]))
    of_both = accounting.epsilon(accounting.study_history(study, frozenset({2, 3})), 1e-5)
    assert ledger.site_account().spent == pytest.approx(of_both, rel=1e-6)
    with pytest.raises(PrivacyBudgetError):
        charge(ledger, asked(3, "b", study=study), mechanisms(study, {2, 3}, [3]))


# --- what the disk holds


def test_nothing_of_patients_or_places_stands_in_it(tmp_path: Path) -> None:
    go_through(ledger_in(tmp_path / "DOE^JANE"), asked(), b"an update")
    for path in (tmp_path / "DOE^JANE").glob("ledger.*"):
        text = path.read_text()
        assert "DOE" not in text
        assert "update" not in text
    assert len(list((tmp_path / "DOE^JANE").glob("ledger.*"))) == 2


def test_a_ledger_that_was_put_back_is_known_by_the_head_that_a_coordinator_keeps(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    heads, copies = [ledger.head], []
    for round in (1, 2, 3):
        go_through(ledger, asked(round))
        heads.append(ledger.head)
        copies.append({path: path.read_bytes() for path in tmp_path.glob("ledger.*")})
    assert [head.seq for head in heads] == [0, 2, 4, 6]
    for head in heads:
        ledger.check_known(head)
    for path, content in copies[0].items():  # log and head both, as a backup has them
        path.write_bytes(content)
    ledger.check_known(heads[0])
    ledger.check_known(heads[1])
    for head in (heads[2], heads[3], Head(2, "0" * 64), Head(-1, "0" * 64)):
        with pytest.raises(LedgerError, match=rf"has seen entry {head.seq} .*docs/privacy.md"):
            ledger.check_known(head)
    go_through(ledger, asked(2, "c"))
    with pytest.raises(LedgerError, match="put back"):
        ledger.check_known(heads[2])


@pytest.mark.parametrize(
    "change", [(b'"round":1', b'"round":2'), (b'"reserved"', b'"replied"'), (b"2.0,0.25,2", b"9.0,0.25,2")]
)
def test_a_damaged_ledger_lets_nothing_happen(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    go_through(ledger_in(tmp_path), asked())
    path = tmp_path / "ledger.jsonl"
    assert change[0] in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(*change, 1))
    ledger = ledger_in(tmp_path)
    uses: list[Callable[[], object]] = [
        lambda: charge(ledger, asked(2)),
        lambda: ledger.reply_of(asked()),
        lambda: ledger.head,
        lambda: ledger.check_known(BEGINNING),
        ledger.site_account,
        ledger.study_accounts,
    ]
    for use in uses:
        with pytest.raises(LedgerError, match=r"line [12] of 'ledger.jsonl' is damaged"):
            use()


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_is_told_and_nothing_may_be_sent(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/archive/DOE^JANE")

    ledger, owner = ledger_in(tmp_path), Path if fails == "replace" else os
    go_through(ledger, asked(1))
    with monkeypatch.context() as patched, ledger.alone(RUN):
        patched.setattr(owner, fails, refuse)
        with pytest.raises(ConfigError, match="No space left on device; make room") as told:
            ledger.reserve(asked(2), releases())
        assert "DOE" not in str(told.value)
    with ledger.alone(RUN):
        reservation = ledger.reserve(asked(2), releases())
        with monkeypatch.context() as patched:
            patched.setattr(owner, fails, refuse)
            with pytest.raises(ConfigError, match="No space left on device; make room") as told:
                ledger.record_reply(reservation, b"2")
        assert "DOE" not in str(told.value)
        assert ledger.reply_of(asked(2)) is None
        ledger.record_reply(reservation, b"again")
    assert ledger.reply_of(asked(2)) == b"again"
    assert rounds_charged(tmp_path) == 2


def test_a_reply_is_sent_again_only_once_its_entry_counts(tmp_path: Path) -> None:
    """A process was killed between the entry and the head; by then another reads an entry that the disk may lack."""
    charge(ledger_in(tmp_path), asked())
    head = (tmp_path / "ledger.head").read_bytes()
    go_through(ledger_in(tmp_path), asked())
    counted = (tmp_path / "ledger.head").read_bytes()
    for use in (lambda: ledger_in(tmp_path).reply_of(asked()), lambda: ledger_in(tmp_path).head):
        (tmp_path / "ledger.head").write_bytes(head)
        assert use()
        assert (tmp_path / "ledger.head").read_bytes() == counted
