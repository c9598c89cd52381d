"""Lines that are only ever added, each bearing the digest of the one before: no entry is changed or lost unnoticed.

Beside `NAME.jsonl` lies `NAME.head`, the number and digest of the last line that counts. A line is written and brought
to the disk (fsync), then the head is, and only then is anything done that the line is a record of. So:

* lines up to the head must be whole and each continue the one before, or the log is refused;
* after it there may be one more, of a process that ended between the two writes. If whole, it counts from now on (it
  may only have cost too much); if torn, it is cut away, for nothing was done upon it;
* a head that is not among the lines tells that lines at the end are missing, or were put back to an older state.

Who can write to the folder can make up a chain that is whole. What such a person cannot change is a head that somebody
else keeps.
"""

from typing import NamedTuple


class Head(NamedTuple):
    """The last line of a log: its number, from 1, and the sha256 of its bytes without the line's end, in hex."""

    seq: int
    sha256: str


BEGINNING = Head(0, "0" * 64)
"""Of a log without lines."""
