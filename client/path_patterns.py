"""Patterns of paths below a folder, as a site file gives them: `sub-*/**/anat/*_T1w.nii.gz`.

*      any characters of one name       **     any folders, also none; at the end, all below
?      one character                    [ab]   one of these, [!ab] one of all others
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated

from pydantic import AfterValidator

_WAY_OUT = "give a path below the folder, as in 'sub-*/**/anat/*_T1w.nii.gz'"


def _possible(pattern: str) -> str:
    """Raises ValueError: no path below a folder can be of this pattern."""
    names = pattern.split("/")
    if pattern.startswith("/") or ".." in names:
        raise ValueError(f"'{pattern}' leaves the folder; {_WAY_OUT}")
    if pattern.endswith("/"):
        raise ValueError(f"'{pattern}' names a folder; write '{pattern}**' for all below it")
    if "" in names or "." in names:
        raise ValueError(f"'{pattern}' has a part without a name; {_WAY_OUT}")
    if "\\" in pattern:
        raise ValueError(f"'{pattern}' has a backslash; folders are parted by '/'")
    if any("**" in name and name != "**" for name in names):
        raise ValueError(f"'{pattern}': '**' stands for whole folders, between two '/'")
    if any(_part(name) is None for name in names):
        raise ValueError(f"'{pattern}': a '[' is not closed, or holds no characters in their order; write '[[]' for it")
    return pattern


PathPattern = Annotated[str, AfterValidator(_possible)]


@cache
def whether_of(pattern: str) -> Callable[[str], object]:
    """Says of a path below the folder, with '/', whether it is of the pattern."""
    *folders, last = pattern.split("/")
    before = "".join("(?:[^/]+/)*" if name == "**" else f"{_part(name)}/" for name in folders)
    return re.compile(f"(?s:{before}{'.+' if last == '**' else _part(last)})").fullmatch


def is_of_any(patterns: Sequence[str], path: str) -> bool:
    return any(whether_of(pattern)(path) for pattern in patterns)


def _part(name: str) -> str | None:
    """One name's regular expression; None where there is none."""
    written, rest = "", name
    while rest:
        if rest[0] == "[":
            found = re.match(r"\[(!?)(\]?[^\]/]*)\]", rest)
            if found is None or not found[2]:
                return None
            kept = re.sub(r"([\\\[\]^&~|])", r"\\\1", found[2])
            written += f"(?!/)[{'^' if found[1] else ''}{kept}]"
            rest = rest[found.end() :]
        else:
            written += {"*": "[^/]*", "?": "[^/]"}.get(rest[0]) or re.escape(rest[0])
            rest = rest[1:]
    try:
        re.compile(written)
    except re.error:  # [b-a]
        return None
    return written
