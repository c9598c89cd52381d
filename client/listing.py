"""Which files of a site's folder are looked at: all of them, or those that its table, `include` and `exclude` leave."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from client.path_patterns import is_of_any, whether_of
from client.patients import Listed, read_table
from client.site_config import DataSource, TableConfig
from unimiss_core.errors import ConfigError


def files_of(source: DataSource) -> dict[str, Listed | None]:
    """Files to look at, below the folder, in order; folders that are links or may not be listed count as one file each.
    Raises ConfigError: a wrong table."""
    if not source.include and not source.exclude:
        return {file: listed for file, listed, _ in _all(source)}
    return {file: listed for file, listed, is_file in _all(source) if _is_taken(source, file, is_file)}


def oddities(sources: Sequence[DataSource]) -> Iterator[str]:
    """What `sources` say that can hardly be meant, a line for each. Raises ConfigError: a wrong table."""
    for number, source in enumerate(sources):
        for pattern in _idle_patterns(source):
            yield f"'data.{number}': no file is of the pattern '{pattern}', which counts from the source's folder"
        if source.table is not None:
            yield from _mostly_missing(number, source, source.table)


def _mostly_missing(number: int, source: DataSource, table: TableConfig) -> Iterator[str]:
    """Where most paths of the table are of nothing, how many, and the likely cause. No path is told, but the folder's
    own name."""
    listed = list(read_table(table))
    missing = [below for below in listed if not os.path.lexists(source.folder / below)]
    if 2 * len(missing) <= len(listed):
        return
    told = f"'data.{number}': of {len(missing)} of the {len(listed)} paths in column '{table.file}' there is no file"
    name = source.folder.resolve().name
    if all(below.parts[0] == name for below in missing):
        yield f"{told}; they begin with '{name}', the folder's own name: let `folder` be the one above it"
    else:
        yield f"{told}; they must count from `folder`, with all endings of the names"


def _idle_patterns(source: DataSource) -> list[str]:
    """Those of `include` and `exclude` that no file of the folder, or of the table, is of."""
    idle = list(dict.fromkeys((*source.include, *source.exclude)))
    for file, _, _ in _all(source) if idle else ():
        idle = [pattern for pattern in idle if not whether_of(pattern)(file)]
    return idle


def _is_taken(source: DataSource, file: str, is_file: bool) -> bool:
    """What a closed folder would hold nobody can say: it stays in the account, unless it is excluded."""
    included = not source.include or not is_file or is_of_any(source.include, file)
    return included and not is_of_any(source.exclude, file)


def _all(source: DataSource) -> Iterator[tuple[str, Listed | None, bool]]:
    """Each file, what the table says of it, and whether it may be one: a folder that is not looked into is none."""
    if source.table is None:
        for file, is_file in _walk(source.folder):
            yield file, None, is_file
        return
    found: dict[str, Listed | None] = {}
    for below, listed in read_table(source.table).items():
        path = source.folder / below
        is_series = is_folder(path)  # a row may name its folder
        files = [((below / name).as_posix(), is_file) for name, is_file in _walk(path)] if is_series else []
        for file, is_file in files if is_series else [(below.as_posix(), True)]:
            if file not in found:
                yield file, listed, is_file
            if found.setdefault(file, listed) != listed:
                raise ConfigError(
                    f"table {source.table.path}: lists a file both by itself and by its folder, with another patient "
                    "or modality"
                )


def is_folder(path: Path) -> bool:
    """False where nobody can say, as below a folder that this user may not enter: then it is a file with a reason."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Files below the folder, and those folders that are links or that may not be listed; which of the two it is."""
    closed: list[str] = []
    for current, folders, names in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        folders.sort()
        links = {name for name in folders if os.path.islink(f"{current}/{name}")}  # noqa: PTH114
        below = Path(current).relative_to(folder).as_posix()
        for name in sorted([*names, *links]):
            yield (name if below == "." else f"{below}/{name}"), name not in links
    yield from ((Path(path).relative_to(folder).as_posix(), False) for path in sorted(closed))
