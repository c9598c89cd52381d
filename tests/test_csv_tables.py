"""Tables whose cells are parted by commas or by tabs: the header line alone says which."""

from pathlib import Path, PurePosixPath

import pytest

from client.csv_tables import rows_of
from client.patients import read_column, read_table
from client.site_config import TableConfig
from unimiss_core.errors import ConfigError


def read(tmp_path: Path, text: str, name: str = "t.csv") -> tuple[tuple[str, ...], list[dict[str, str]]]:
    (tmp_path / name).write_bytes(text.encode())
    columns, rows = rows_of(tmp_path / name, named=name)
    return columns, [dict(row.cells) for row in rows]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("file\tage", ("file", "age")),
        ("\ufefffile\tage", ("file", "age")),
        ('"file, of all"\tage', ("file, of all", "age")),
        ("file,age", ("file", "age")),
        ('file,"age\tof who"', ("file", "age\tof who")),
        ("file\tof all,age", ("file\tof all", "age")),
        ("file", ("file",)),
        ('"file\tage"', ("file\tage",)),
    ],
    ids=["tabs", "mark", "quoted comma", "commas", "quoted tab", "both", "one column", "one in quotes"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_the_header_line_says_what_parts_cells(
    tmp_path: Path, header: str, columns: tuple[str, ...], end: str, name: str
) -> None:
    found, _ = read(tmp_path, f"{header}{end}x{end}", name)
    assert found == columns


def test_commas_below_a_header_with_tabs_are_text_and_tabs_below_commas_too(tmp_path: Path) -> None:
    assert read(tmp_path, "file\tnote\na.png\tlung, left\n")[1] == [{"file": "a.png", "note": "lung, left"}]
    assert read(tmp_path, "file,note\na.png,lung\tleft\n")[1] == [{"file": "a.png", "note": "lung\tleft"}]
    assert read(tmp_path, 'file\tnote\na.png\t"lung\tleft"\n')[1] == [{"file": "a.png", "note": "lung\tleft"}]


def test_a_sites_table_may_be_the_tsv_of_a_bids_folder(tmp_path: Path) -> None:
    (tmp_path / "scans.tsv").write_text("filename\tgroup\nanat/a.nii.gz\tpatient\nfunc/b.nii.gz\tn/a\n")
    table = TableConfig(path=tmp_path / "scans.tsv", file="filename", where={"group": ("patient",)})
    assert list(read_table(table)) == [PurePosixPath("anat/a.nii.gz")]
    assert read_column(table, "group") == {PurePosixPath("anat/a.nii.gz"): "patient"}


def test_a_cell_too_many_is_told_of_a_table_with_tabs(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("file\tnote\na.png\tlung\tleft\n")
    with pytest.raises(ConfigError, match=r"line 2: has more cells than the header line; .* holds a comma, or a tab"):
        read_table(TableConfig(path=tmp_path / "t.tsv"))
