"""Whatever is wrong with JSON is one kind of error."""

from pathlib import Path

import pytest

from unimiss_core.json_text import object_in, read_object, read_value, value_in

DEEP = "[" * 50_000


@pytest.mark.parametrize("text", ["", "{", "nul", b"\xff\xfe", DEEP, DEEP.encode(), '{"a":' * 50_000, "9" * 5_000])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    for read in (value_in, object_in):
        with pytest.raises(ValueError, match=r"."):
            read(text)


@pytest.mark.parametrize("text", ["[1]", "null", "3", '"a"'])
def test_another_value_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_value(tmp_path / "x.json") == value_in(text)
    for read in (lambda: object_in(text), lambda: read_object(tmp_path / "x.json")):
        with pytest.raises(ValueError, match="expected an object"):
            read()


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "x.json")
