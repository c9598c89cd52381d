"""Where a chain of entries stands: how a peer notices, later, that entries of it were lost.

A site's ledger (`client.ledger`) tells its head, the coordinator keeps the highest that it was told, and sends it back.
"""

import re
from typing import NamedTuple, Self

_TEXT = re.compile(r"([0-9]{1,12}):([0-9a-f]{64})")


class Head(NamedTuple):
    """The last line of a log: its number, from 1, and the sha256 of its bytes without the line's end, in hex."""

    seq: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.sha256}"

    @classmethod
    def of(cls, text: str) -> Self:
        """From `str`. Raises ValueError."""
        if (match := _TEXT.fullmatch(text)) is None:
            raise ValueError("not the head of a log")
        return cls(int(match[1]), match[2])


BEGINNING = Head(0, "0" * 64)
"""Of a log without lines."""
