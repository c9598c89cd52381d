import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from client import cache, cache_journal, cache_room
from client import looking as look_module
from client.cache import open_library, open_private_library
from client.cache_room import prepared_bytes
from client.catalogue import catalogue, read
from client.pictures import write_png
from client.reading import read_scans
from client.site_config import DataSource, SiteConfig
from tests.series_files import pattern, write_radiograph, write_series
from unimiss_core import progress
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError, UnknownPatientError
from unimiss_core.plan import prepare
from unimiss_core.study import PlanConfig

PLAN = PlanConfig()


def picture(path: Path, seed: int) -> None:
    write_png(path, np.random.default_rng(seed).integers(0, 65535, (33, 21)).astype(np.uint16))


@pytest.fixture
def site(tmp_path) -> SiteConfig:
    folder = tmp_path / "scans"
    write_series(folder / "ct", pattern(7, 20, 30), attributes={"PatientID": "one"})
    picture(folder / "a.png", 0)
    picture(folder / "b.png", 1)
    return SiteConfig(name="north", data=(DataSource(folder=folder),), state=tmp_path / "state")


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """Names of what is read and prepared, as it happens."""
    names: list[str] = []
    really = cache.build

    def build(task):
        names.append(task.candidate.files[0])
        return really(task)

    monkeypatch.setattr(cache, "build", build)
    return names


def test_a_crop_is_the_prepared_scan_to_16_bits(site):
    library = open_library(site, PLAN)
    assert library.ranks == {2, 3}
    found = catalogue(site.data, b"s" * 32)
    for scan, candidate in zip(library.scans, found.candidates, strict=True):
        values, spacing = prepare(read(candidate), PLAN)
        assert scan.shape == values.shape
        assert scan.spacing_mm == spacing
        whole = scan.crop(tuple(slice(None) for _ in scan.shape[1:]))
        assert whole.dtype == np.float32
        assert np.abs(whole - values).max() <= 0.5 / 65535 + 1e-7
        box = tuple(slice(length // 4, length // 2 + 1) for length in scan.shape[1:])
        np.testing.assert_array_equal(scan.crop(box), whole[(slice(None), *box)])


def test_a_second_opening_reads_nothing_and_gives_the_same(site, built):
    first = open_library(site, PLAN)
    assert len(built) == 3
    assert open_library(site, PLAN) == first
    assert len(built) == 3


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """Files whose headers were looked at."""
    found: list[str] = []
    really = look_module.look_at

    def look_at(folder, file, secret):
        found.append(file)
        return really(folder, file, secret)

    monkeypatch.setattr(look_module, "look_at", look_at)
    return found


def test_unchanged_folders_open_without_a_look_at_a_header(site, looked):
    events: list[progress.Event] = []
    first = open_library(site, PLAN)
    assert len(looked) == 9
    with progress.listen(events.append):
        assert open_library(site, PLAN) == first
    assert len(looked) == 9
    assert not events
    picture(site.data[0].folder / "c.png", 3)
    assert len(open_library(site, PLAN).scans) == 4
    (site.data[0].folder / "c.png").unlink()
    looked.clear()
    assert open_library(site, PLAN).scans == first.scans
    assert len(looked) == 9
    pattern_source = site.data[0].model_copy(update={"patient_pattern": "^(?P<patient>.)"})
    looked.clear()
    open_library(site.model_copy(update={"data": (pattern_source,)}), PLAN)
    assert looked


def test_what_may_pass_is_tried_again(site, monkeypatch):
    times_out = ScanError("timed_out")
    monkeypatch.setattr(cache, "_outcomes", lambda tasks, _: enumerate([times_out, *map(cache.build, tasks[1:])]))
    assert open_library(site, PLAN).left_out == {"timed_out": 1}
    monkeypatch.undo()
    monkeypatch.setattr(cache.time, "time", later := Clock(61))
    assert len(open_library(site, PLAN).scans) == 3
    assert later.asked


class Clock:
    """So many seconds ahead of the machine's."""

    def __init__(self, ahead_s: float) -> None:
        self._began, self.asked = time.time() + ahead_s, 0

    def __call__(self) -> float:
        self.asked += 1
        return self._began


def test_what_does_not_pass_is_not_looked_for_with_each_message(site, looked, monkeypatch):
    """Each is a process of its own, which would look at every header of the archive again."""
    (site.data[0].folder / "dangling").symlink_to("nowhere")
    first = open_library(site, PLAN)
    assert first.left_out == {"cannot_open": 1}
    looked.clear()
    assert open_library(site, PLAN) == first
    assert not looked
    (site.data[0].folder / "dangling").unlink()  # what changes is seen at once
    assert not open_library(site, PLAN).left_out
    looked.clear()
    monkeypatch.setattr(cache.time, "time", Clock(-3600))  # nor is a clock that was put back waited for
    (site.data[0].folder / "dangling").symlink_to("nowhere")
    open_library(site, PLAN)
    looked.clear()
    monkeypatch.setattr(cache.time, "time", Clock(-7200))
    open_library(site, PLAN)
    assert looked


def test_another_decoder_is_given_what_could_not_be_decoded(site, monkeypatch):
    cannot = ScanError("needs_extra_jpeg12")
    monkeypatch.setattr(cache, "_outcomes", lambda tasks, _: enumerate([cannot, *map(cache.build, tasks[1:])]))
    assert open_library(site, PLAN).left_out == {"needs_extra_jpeg12": 1}
    monkeypatch.undo()
    assert open_library(site, PLAN).left_out == {"needs_extra_jpeg12": 1}
    monkeypatch.setattr(cache, "decoders", lambda: "pylibjpeg-libjpeg 2.3.0")
    assert len(open_library(site, PLAN).scans) == 3


def test_a_change_rebuilds_just_what_changed(site, built):
    first = open_library(site, PLAN)
    built.clear()
    picture(site.data[0].folder / "b.png", 2)
    second = open_library(site, PLAN)
    assert built == ["b.png"]
    assert len({scan.key for scan in first.scans} & {scan.key for scan in second.scans}) == 2
    built.clear()
    open_library(site, PlanConfig(percentiles=(1.0, 99.0)))
    assert len(built) == 3


def test_a_file_that_only_moved_keeps_its_cached_content(site):
    first = open_library(site, PLAN)
    folder = site.data[0].folder
    (folder / "a.png").rename(folder / "z.png")
    assert {scan.key for scan in open_library(site, PLAN).scans} == {scan.key for scan in first.scans}


def test_an_interrupted_build_goes_on_where_it_stopped(site, built):
    def stop(event):
        if isinstance(event, progress.Preparing) and event.total and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress.listen(stop):
        open_library(site, PLAN)
    # The crash also cut the journal's last line.
    journal = site.cache_folder / "built.jsonl"
    journal.write_text(journal.read_text() + '{"stamp": "cut o')
    built.clear()
    assert len(open_library(site, PLAN).scans) == 3
    assert len(built) == 1
    built.clear()
    open_library(site, PLAN)
    assert not built


def test_a_lost_cache_file_is_built_again(site, built):
    library = open_library(site, PLAN)
    library.scans[0].path.unlink()
    built.clear()
    assert open_library(site, PLAN) == library
    assert len(built) == 1


def test_a_cache_file_that_was_cut_is_built_again(site, built):
    """A disk that failed; found in mid-round it would cost the round, each time that the scan is drawn."""
    library = open_library(site, PLAN)
    whole = library.scans[0].path.read_bytes()
    library.scans[0].path.write_bytes(whole[:-1])
    built.clear()
    assert open_library(site, PLAN) == library
    assert len(built) == 1
    assert library.scans[0].path.read_bytes() == whole


def test_the_same_picture_twice_counts_once_for_a_patient(site, tmp_path):
    folder = tmp_path / "twins"
    folder.mkdir()
    for name in ("1_a.png", "1_b.png", "2_a.png"):
        picture(folder / name, 0)
    source = DataSource(folder=folder, patient_pattern="^(?P<patient>.)_")
    library = open_library(site.model_copy(update={"data": (source,)}), PLAN)
    assert len(library.scans) == 2
    assert library.left_out == {"duplicate": 1}


def test_left_out_scans_are_remembered(site, built):
    write_radiograph(site.data[0].folder / "blank", np.full((9, 9), 7, np.uint8))
    assert open_library(site, PLAN).left_out == {"blank": 1}
    built.clear()
    assert open_library(site, PLAN).left_out == {"blank": 1}
    assert not built


def test_a_cache_that_would_grow_too_large_is_refused_in_words(site):
    small = site.model_copy(update={"cache_limit_gb": 1e-6})
    with pytest.raises(ConfigError, match="cache_limit_gb=1e-06; raise it"):
        open_library(small, PLAN)
    assert not list(site.cache_folder.glob("*.npy"))


def test_scans_that_are_no_longer_wanted_make_room(site):
    first = open_library(site, PLAN)
    used = sum(scan.path.stat().st_size for scan in first.scans)
    tight = site.model_copy(update={"cache_limit_gb": 1.3 * used / 1e9})
    second = open_library(tight, PlanConfig(percentiles=(1.0, 99.0)))
    assert len(second.scans) == 3
    assert sum(path.stat().st_size for path in site.cache_folder.glob("*.npy")) <= 1.3 * used


def test_a_plan_for_which_there_is_no_room_at_all_drops_nothing(site):
    """Or whoever asks for it would end the rounds of other studies."""
    held = open_library(site, PLAN)
    with pytest.raises(ConfigError, match="needs about"):
        open_library(site, PlanConfig(volume_spacing_mm=(0.001, 0.001, 0.001)))
    assert all(scan.path.exists() for scan in held.scans)


@pytest.mark.parametrize("spacing", [(100.0, 0.1, 0.1), (0.5, 100.0, 0.5), (3.0, 1.0, 1.0), (2.0, 0.3, 40.0)])
def test_a_prepared_scan_takes_no_more_room_than_was_reckoned_with(site, spacing):
    """Whatever a study asks for, and however little is left along an axis."""
    plan = PlanConfig(volume_spacing_mm=spacing)
    for candidate in catalogue(site.data, b"s" * 32).candidates:
        assert 2 * prepare(read(candidate), plan)[0].size <= prepared_bytes(candidate, plan)


def test_what_unfolds_beyond_this_process_is_read_by_others(site, monkeypatch):
    """Where the limit of memory is every scan's own, however few there are."""
    elsewhere: list[int] = []

    def run(_, tasks, **__):
        elsewhere.append(len(tasks))
        return enumerate([ScanError("out_of_memory")] * len(tasks))

    monkeypatch.setattr(cache.workers, "run", run)
    monkeypatch.setattr(cache, "make_room", lambda *_, **__: None)
    with pytest.raises(NoUsableScanError, match="3 out_of_memory"):
        open_library(site, PlanConfig(volume_spacing_mm=(0.01, 0.05, 0.05)))
    assert elsewhere == [3]


def test_a_nearly_full_disk_is_left_to_the_ledger(site, monkeypatch):
    usage = shutil.disk_usage(site.state.parent)
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda _: usage._replace(free=2**28))
    monkeypatch.setattr(cache, "make_room", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="its disk is full"):
        open_library(site, PLAN)
    assert not list(site.cache_folder.glob("*.npy"))


def test_an_empty_site_says_what_was_left_out(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "Zzyzx.txt").write_text("no scan")
    site = SiteConfig(name="north", data=(DataSource(folder=tmp_path / "scans"),), state=tmp_path / "state")
    with pytest.raises(NoUsableScanError, match="1 not_an_image") as error:
        open_library(site, PLAN)
    assert "Zzyzx" not in str(error.value)


def test_progress_counts_to_the_end(site):
    events = []
    with progress.listen(events.append):
        open_library(site, PLAN)
    assert [event.done for event in events if event.total] == [0, 1, 2, 3]
    assert {event.site for event in events} == {"north"}


def test_nothing_in_the_cache_names_a_patient_or_file(tmp_path):
    folder = tmp_path / "scans" / "Zzyzx-folder"
    write_series(folder, pattern(5, 9, 7), attributes={"PatientID": "Zzyzx", "PatientName": "Zzyzx"})
    site = SiteConfig(name="north", data=(DataSource(folder=tmp_path / "scans"),), state=tmp_path / "state")
    open_library(site, PLAN)
    for path in site.state.rglob("*"):
        assert "Zzyzx" not in path.name
        assert not path.is_file() or b"Zzyzx" not in path.read_bytes()
    assert site.cache_folder.stat().st_mode & 0o077 == 0


def test_many_files_are_built_in_other_processes_with_the_same_result(site, monkeypatch):
    here = open_library(site, PLAN)
    monkeypatch.setattr(cache, "safe_here", lambda _: False)
    there = open_library(site.model_copy(update={"cache": site.state / "other", "workers": 2}), PLAN)
    assert [scan.key for scan in there.scans] == [scan.key for scan in here.scans]
    for one, other in zip(here.scans, there.scans, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_scans_read_for_labels_say_where_they_came_from(site):
    (site.data[0].folder / "notes.txt").write_text("no scan")
    notes = []
    with progress.listen(notes.append):
        pairs = list(read_scans(site.data))
    assert [origin.files[0] for origin, _ in pairs] == ["a.png", "b.png", "ct/file000"]
    assert [scan.rank for _, scan in pairs] == [2, 2, 3]
    assert notes == [progress.Note("left out: 1 not_an_image")]


def test_a_record_is_one_line_of_json(site):
    open_library(site, PLAN)
    lines = (site.cache_folder / "built.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line]
    assert len(records) == 3
    assert set(records[0]) == {"stamp", "key", "shape", "spacing_mm", "offset", "reason", "decoders", "plan"}


def journal_of(site: SiteConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in (site.cache_folder / "built.jsonl").read_text().splitlines() if line]


def plans(count: int) -> list[PlanConfig]:
    return [PlanConfig(image_longest_side=64 + number) for number in range(count)]


@pytest.mark.parametrize("opened", [open_library, open_private_library])
def test_what_plans_left_that_were_not_used_for_long_goes(site, built, opened):
    """The plan at hand and one that was used since stay; so do prepared scans, which `cache_limit_gb` bounds."""
    write_radiograph(site.data[0].folder / "blank", np.full((9, 9), 7, np.uint8), attributes={"PatientID": "two"})
    site = site.model_copy(update={"data": (DataSource(folder=site.data[0].folder, patient_pattern="(?P<patient>.)"),)})
    old, used, now, late = plans(4)
    for plan in (old, used, now):
        opened(site, plan)
    for file in (files := [*site.cache_folder.glob("library-*"), *site.cache_folder.glob("private-*")]):
        os.utime(file, (time.time() - 91 * 86_400,) * 2)
    assert len(files) == 3
    opened(site, used)
    opened(site, late)
    kept = {cache_journal.plan_digest(plan) for plan in (used, late)}
    assert {file.stem.partition("-")[2] for file in site.cache_folder.glob("*-*.json")} == kept
    assert len(list(site.cache_folder.glob("*.npy"))) == 4 * 3
    for scan in site.cache_folder.glob("*.npy"):
        scan.unlink()
    built.clear()
    opened(site, late)
    assert len(built) == 3  # the left-out one is remembered
    assert {line["plan"] for line in journal_of(site) if line["reason"]} == kept


def test_the_journal_does_not_grow_with_each_scan_that_went_and_came(site):
    """Two plans, of which the room bears one, take turns; then all files are touched, as a copying job may do."""
    used = sum(scan.path.stat().st_size for scan in open_library(site, PLAN).scans)
    tight = site.model_copy(update={"cache_limit_gb": 1.3 * used / 1e9})
    for number in range(12):
        open_library(tight, PLAN if number % 2 else PlanConfig(percentiles=(1.0, 99.0)))
        assert len(journal_of(site)) <= 3 * 5
    for number in range(12):
        for file in site.data[0].folder.rglob("*.png"):
            os.utime(file, (number, number))
        open_library(site, PLAN)
        assert len(journal_of(site)) <= 3 * 5


def test_a_journal_that_another_process_writes_is_not_tidied(tmp_path):
    """Nor does one lose what a process wrote of a plan whose library is still to come, or a version without plans."""
    journal = tmp_path / "built.jsonl"
    journal.write_text("".join(reason(f"gone {number}", "gone").line() for number in range(9)))
    with cache_journal.open_journal(tmp_path) as other:
        other.note(reason("first", "other"))
        cache_journal.tidy(tmp_path, "mine", [])
        other.note(reason("second", "other"))
        with cache_journal.open_journal(tmp_path) as mine:  # two may write
            mine.note(reason("third", "mine"))
            other.note(reason("before plans", ""))
            assert {"first", "second"} < mine.records.keys()
    with cache_journal.open_journal(tmp_path) as after:
        assert len(after.records) == 9 + 4
    (tmp_path / "library-other.json").touch()
    (tmp_path / "library-mine.json").touch()
    cache_journal.tidy(tmp_path, "mine", ["gone 3"])
    with cache_journal.open_journal(tmp_path) as after:
        assert list(after.records) == ["gone 3", "first", "second", "before plans"]


def reason(stamp: str, plan: str) -> cache_journal.Record:
    return cache_journal.Record(stamp, reason="blank", plan=plan)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_is_said_and_costs_no_scan(site, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(cache.npy, "write_array_header_1_0", full_disk)
        with pytest.raises(ConfigError, match=r"site 'north': .* cannot be used: No space left on device"):
            open_library(site, PLAN)
    assert not list(site.cache_folder.glob("*.npy"))
    assert not list(site.cache_folder.glob(".*.partial"))
    assert len(open_library(site, PLAN).scans) == 3


def test_the_journal_and_the_memory_on_a_full_disk_are_told_like_the_scans(site, monkeypatch):
    monkeypatch.setattr(cache.durable, "write_text", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        open_library(site, PLAN)


def test_what_a_crash_left_half_written_is_removed_once_it_is_old(site):
    site.cache_folder.mkdir(parents=True)
    old, fresh = (site.cache_folder / f".{name}.npy.00.partial" for name in ("old", "fresh"))
    old.touch()
    fresh.touch()
    os.utime(old, (time.time() - 2 * cache_room._STALE_S,) * 2)
    open_library(site, PLAN)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_journal_that_a_power_failure_damaged_costs_only_its_damaged_lines(site, built):
    open_library(site, PLAN)
    count = len(built)
    journal = site.cache_folder / "built.jsonl"
    journal.write_bytes(b"\xff\xfe\x00 5\n[]\n" + b"[" * 99_999 + b"\n" + journal.read_bytes())
    next(site.cache_folder.glob("library-*")).write_bytes(b"[" * 99_999)
    assert len(open_library(site, PLAN).scans) == 3
    assert len(built) == count


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_private_library_takes_no_guess_for_a_patient_nor_one_that_is_remembered(site, built, opened_before):
    if opened_before:
        open_library(site, PLAN)
    done = len(built)
    with pytest.raises(UnknownPatientError, match=r"2 of 'data\.0' \("):
        open_private_library(site, PLAN)
    assert len(built) == done


def test_what_is_remembered_of_a_plain_library_is_none_of_a_private_one(tmp_path):
    """One patient's volume decides about another's slice in the one, and not in the other."""
    for who, depth in (("a", 7), ("b", 1)):
        write_series(tmp_path / "scans" / who, pattern(depth, 20, 30), attributes={"PatientID": who})
    site = SiteConfig(name="north", data=(DataSource(folder=tmp_path / "scans"),), state=tmp_path / "state")
    for _ in range(2):  # made, and remembered
        assert [len(kind(site, PLAN).scans) for kind in (open_library, open_private_library)] == [1, 2]


def test_a_private_library_may_be_empty(tmp_path):
    (tmp_path / "scans").mkdir()
    write_png(tmp_path / "scans" / "a.png", np.zeros((33, 21), np.uint16))
    source = DataSource(folder=tmp_path / "scans", file_is_patient=True)
    site = SiteConfig(name="north", data=(source,), state=tmp_path / "state")
    for _ in range(2):  # made, and remembered
        library = open_private_library(site, PLAN)
        assert (library.scans, library.left_out, library.ranks) == ((), {"blank": 1}, frozenset())
        with pytest.raises(NoUsableScanError, match="1 blank"):
            open_library(site, PLAN)
