"""Nothing is changed in, taken from or added to a log unnoticed; what a crash leaves is told from damage."""

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from unimiss_core import durable
from unimiss_core.chain import BEGINNING, Head
from unimiss_core.chained_log import LONGEST_LINE, ChainedLog, Link
from unimiss_core.errors import ConfigError, LedgerError


class Word(Link):
    word: str


def log_in(folder: Path) -> ChainedLog[Word]:
    return ChainedLog(
        folder / "words.jsonl", Word.model_validate_json, damaged=LedgerError, way_out="docs/privacy.md says what to do"
    )


def append(folder: Path, *words: str) -> None:
    """As `write`, of a log whose end alone is looked at."""
    for word in words:
        log_in(folder).append(partial(Word, word=word))


def write(folder: Path, *words: str) -> None:
    for word in words:
        with log_in(folder).writing() as log:
            log.append(partial(Word, word=word))


def words(folder: Path) -> list[str]:
    return [entry.word for entry in log_in(folder).read().entries]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "one", "two", "three", "four")
    return tmp_path


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "words.jsonl").read_bytes().splitlines(keepends=True)


def put(folder: Path, lines: list[bytes]) -> None:
    (folder / "words.jsonl").write_bytes(b"".join(lines))


def test_lines_bear_the_digest_of_the_line_before(folder: Path) -> None:
    """By hand: JSON, sha256 over the bytes of the line before."""
    before = "0" * 64
    for number, line in enumerate(lines_of(folder), start=1):
        entry = json.loads(line)
        assert (entry["seq"], entry["previous"]) == (number, before)
        before = hashlib.sha256(line.rstrip(b"\n")).hexdigest()
    assert words(folder) == ["one", "two", "three", "four"]
    assert log_in(folder).read().head == Head(4, before)
    assert json.loads((folder / "words.head").read_text()) == {"seq": 4, "sha256": before}


def test_a_log_without_lines_is_at_its_beginning(tmp_path: Path) -> None:
    assert log_in(tmp_path / "new").read().head == BEGINNING
    assert not (tmp_path / "new").exists()  # somebody only looked


def test_each_changed_byte_is_refused(folder: Path) -> None:
    path, whole = folder / "words.jsonl", (folder / "words.jsonl").read_bytes()
    starts = [sum(map(len, lines_of(folder)[:n])) for n in range(5)]
    for place, byte in enumerate(whole):
        for other in (byte ^ 1, byte ^ 0x20, ord("\n"), 0):
            if other == byte:
                continue
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            with pytest.raises(LedgerError, match=r"line [1-4] of 'words.jsonl' is damaged.*docs/privacy.md") as told:
                log_in(folder).read()
            line = next(n for n in range(1, 5) if place < starts[n])
            assert any(f"line {n} of" in str(told.value) for n in (line, line + 1)), (place, str(told.value))
    path.write_bytes(whole)
    assert words(folder) == ["one", "two", "three", "four"]


def test_each_byte_taken_out_is_refused_and_nothing_is_mended(folder: Path) -> None:
    path, whole = folder / "words.jsonl", (folder / "words.jsonl").read_bytes()
    for place in range(len(whole)):
        path.write_bytes(damaged := whole[:place] + whole[place + 1 :])
        for use in (log_in(folder).read, partial(write, folder, "five")):
            with pytest.raises(LedgerError):
                use()
        assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "order", [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (1, 0, 2, 3), (0, 1, 3, 2), (0, 0, 1, 2), ()]
)
def test_missing_repeated_and_reordered_lines_are_refused(folder: Path, order: tuple[int, ...]) -> None:
    lines = lines_of(folder)
    put(folder, [lines[n] for n in order])
    for use in (log_in(folder).read, partial(write, folder, "five")):
        with pytest.raises(LedgerError, match="damaged"):
            use()
    assert lines_of(folder) == [lines[n] for n in order]


def test_a_log_that_was_deleted_is_missed(folder: Path) -> None:
    (folder / "words.jsonl").unlink()
    with pytest.raises(LedgerError, match=r"line 1 .* missing: 'words.head' counts 4"):
        log_in(folder).read()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"seq": 4}\n', b'{"seq": 4, "sha256": "beef"}\n'])
def test_a_damaged_head_is_refused(folder: Path, content: bytes) -> None:
    (folder / "words.head").write_bytes(content)
    with pytest.raises(LedgerError, match=r"'words.head' is damaged"):
        log_in(folder).read()


def test_each_changed_byte_of_the_head_is_refused(folder: Path) -> None:
    path, whole = folder / "words.head", (folder / "words.head").read_bytes()
    for place, byte in enumerate(whole):
        path.write_bytes(whole[:place] + bytes([byte ^ 1]) + whole[place + 1 :])
        with pytest.raises(LedgerError):
            log_in(folder).read()


def test_an_older_head_beside_a_newer_log_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", "two")
    older = (tmp_path / "words.head").read_bytes()
    write(tmp_path, "three", "four")
    (tmp_path / "words.head").write_bytes(older)
    with pytest.raises(LedgerError, match=r"line 4 of 'words.jsonl' should not be there"):
        log_in(tmp_path).read()


def test_an_older_log_beside_a_newer_head_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", "two")
    older = (tmp_path / "words.jsonl").read_bytes()
    write(tmp_path, "three")
    (tmp_path / "words.jsonl").write_bytes(older)
    with pytest.raises(LedgerError, match=r"line 3 of 'words.jsonl' is damaged or missing"):
        log_in(tmp_path).read()


def test_another_log_of_as_many_lines_is_refused(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", "one", "two", "three", "fou")
    put(folder, lines_of(tmp_path / "other"))
    with pytest.raises(LedgerError, match=r"line 4 of 'words.jsonl' is damaged"):
        log_in(folder).read()


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_that_a_crash_tore_is_cut_away(folder: Path, kept: int) -> None:
    """It was written and its head was not, so nothing was done upon it. Whoever only looks leaves it where it is."""
    head, before = (folder / "words.head").read_bytes(), lines_of(folder)
    write(folder, "five")
    torn = lines_of(folder)[4][:kept]
    (folder / "words.head").write_bytes(head)
    put(folder, [*before, torn])
    assert words(folder) == ["one", "two", "three", "four"]
    assert lines_of(folder) == [*before, torn]
    write(folder, "six")
    assert words(folder) == ["one", "two", "three", "four", "six"]


@pytest.mark.parametrize("torn", [b"\0" * 90, b"\0" * 90 + b"\n", b"\n", b'{"seq":5}\n'])
def test_what_a_disk_may_leave_of_a_line_that_never_counted_is_cut_away(folder: Path, torn: bytes) -> None:
    put(folder, [*lines_of(folder), torn])
    write(folder, "five")
    assert words(folder) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize("more", [b"\0\n\0\n", b"{}\n{}\n", b"x\ny"])
def test_more_than_one_line_that_never_counted_is_no_crash(folder: Path, more: bytes) -> None:
    put(folder, [*lines_of(folder), more])
    with pytest.raises(LedgerError, match=r"line 5 of 'words.jsonl' is damaged"):
        log_in(folder).read()


def test_a_whole_line_counts_from_the_next_start_on(folder: Path) -> None:
    head = (folder / "words.head").read_bytes()
    write(folder, "five")
    (folder / "words.head").write_bytes(head)
    assert words(folder) == ["one", "two", "three", "four", "five"]
    with log_in(folder).writing():
        pass
    assert json.loads((folder / "words.head").read_text())["seq"] == 5


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_is_told_and_leaves_what_was_there(
    folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/archive/DOE^JANE")

    before = lines_of(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, fails, refuse)
        with pytest.raises(ConfigError, match="No space left on device; make room") as told:
            write(folder, "five")
    assert "DOE" not in str(told.value)
    assert lines_of(folder) == before
    write(folder, "five")
    assert words(folder)[-1] == "five"


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, calls = os.write, []

    def half(descriptor: int, payload: bytes) -> int:
        calls.append(len(payload))
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "full")
        return really(descriptor, payload[: len(payload) // 2])

    with (tmp_path / "file").open("a+b", buffering=0) as file:
        durable.append(file, b"first")
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", half)
            with pytest.raises(OSError, match="full"):
                durable.append(file, b"0123456789")
        assert calls == [10, 5, 3]
        durable.append(file, b" second")
    assert (tmp_path / "file").read_bytes() == b"first second"


def test_two_writers_take_turns(tmp_path: Path) -> None:
    """Each with a log of its own, as two processes: lines of both, in one chain."""
    for turn in range(3):
        write(tmp_path, f"a{turn}")
        write(tmp_path, f"b{turn}")
    assert words(tmp_path) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_ten_thousand_lines_are_read(tmp_path: Path) -> None:
    lines, before = [], BEGINNING
    for seq in range(1, 10_001):
        line = Word(seq=seq, previous=before.sha256, word="w" * 400).canonical().encode()
        lines.append(line + b"\n")
        before = Head(seq, hashlib.sha256(line).hexdigest())
    put(tmp_path, lines)
    (tmp_path / "words.head").write_text(json.dumps(before._asdict()) + "\n")
    assert log_in(tmp_path).read().head == before


# -- appending, which looks at the end of the log alone --------------------------------------------------------------


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A log that is several times as long as what `append` looks at."""
    append(tmp_path, *(f"{number} {'w' * 1000}" for number in range(80)))
    return tmp_path


def test_appended_lines_are_those_that_writing_makes(tmp_path: Path) -> None:
    write(tmp_path / "written", *"abcdef")
    append(tmp_path / "appended", *"abc")
    write(tmp_path / "appended", *"de")
    append(tmp_path / "appended", "f")
    for name in ("words.jsonl", "words.head"):
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "appended" / name).read_bytes()


def test_a_long_log_is_whole_after_each_append(long: Path) -> None:
    assert [word.split()[0] for word in words(long)] == [str(number) for number in range(80)]


@pytest.mark.parametrize("line", [-1, -2, -5])
def test_appending_refuses_a_damaged_end(long: Path, line: int) -> None:
    lines = lines_of(long)
    lines[line] = lines[line].replace(b"www", b"wxw", 1)
    put(long, lines)
    with pytest.raises(LedgerError, match="damaged"):
        append(long, "more")
    assert lines_of(long) == lines


@pytest.mark.parametrize("cut", [1, 2, 30, 80])
def test_appending_refuses_a_log_that_was_cut(long: Path, cut: int) -> None:
    put(long, lines_of(long)[:-cut])
    with pytest.raises(LedgerError, match="missing"):
        append(long, "more")


def test_appending_refuses_a_log_without_its_head(long: Path) -> None:
    (long / "words.head").unlink()
    with pytest.raises(LedgerError, match=r"should not be there|damaged"):
        append(long, "more")


def test_what_appending_does_not_look_at_reading_does(long: Path) -> None:
    lines = lines_of(long)
    lines[3] = lines[3].replace(b"www", b"wxw", 1)
    put(long, lines)
    append(long, "more")
    with pytest.raises(LedgerError, match=r"line 5 of 'words.jsonl' is damaged"):
        words(long)


@pytest.mark.parametrize("torn", [b'{"half', b"\0" * 500, b"\0" * 500 + b"\n", b"x" * (LONGEST_LINE - 1)])
def test_appending_cuts_away_what_a_crash_left(long: Path, torn: bytes) -> None:
    put(long, [*lines_of(long), torn])
    append(long, "more")
    assert words(long)[79:] == [f"79 {'w' * 1000}", "more"]


def test_appending_lets_a_whole_line_count(long: Path) -> None:
    head = (long / "words.head").read_bytes()
    append(long, "written and not counted")
    (long / "words.head").write_bytes(head)
    append(long, "more")
    assert words(long)[80:] == ["written and not counted", "more"]


def test_writers_of_several_threads_and_of_either_kind_make_one_chain(tmp_path: Path) -> None:
    with ThreadPoolExecutor(max_workers=4) as writers:
        jobs = [writers.submit(append if n % 3 else write, tmp_path, str(n)) for n in range(60)]
        for job in jobs:
            job.result()
    assert sorted(words(tmp_path), key=int) == [str(n) for n in range(60)]


def test_a_line_that_would_hide_the_end_is_not_appended(tmp_path: Path) -> None:
    append(tmp_path, "one")
    with pytest.raises(ValueError, match="too long"):
        append(tmp_path, "w" * LONGEST_LINE)
    append(tmp_path, "two")
    assert words(tmp_path) == ["one", "two"]
