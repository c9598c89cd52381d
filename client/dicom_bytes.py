"""DICOM files as bytes, before pydicom sees them: what begins like one, what would unfold without end."""

import zlib
from typing import BinaryIO, Literal, NamedTuple

from unimiss_core.errors import ScanError

DEFLATED = "1.2.840.10008.1.2.1.99"
_MAX_INFLATION = 64 * 2**20
"""A deflated header and its pixels may unfold to at least this, and to 32 times their size."""
_PIXEL_DATA = (0x0008, 0x0009, 0x0010)
"""Elements of group 7FE0 that hold pixels: float, double, integer."""


class PixelRoom(NamedTuple):
    """Bytes of pixel data in a file, and whether a codec packed them."""

    size: int
    encoded: bool = False


def looks_like_dicom(start: bytes) -> bool:
    """Whether a file that begins with `start` (132 bytes or more) may be DICOM, with preamble or without."""
    if start[128:132] == b"DICM":
        return True
    # Without preamble: a data element of group 2 or 8 in little endian, or 8 in big endian, with a known beginning.
    group = start[:2]
    if group in (b"\x02\x00", b"\x08\x00"):
        element = int.from_bytes(start[2:4], "little")
    elif group == b"\x00\x08":
        element = int.from_bytes(start[2:4], "big")
    else:
        return False
    return len(start) >= 16 and element <= 0x0070 and (start[4:6].isalpha() or start[6:8] == b"\x00\x00")


def check_inflation(file: BinaryIO, size: int) -> None:
    """Refuse a deflated file that unfolds to more than it may, before anything holds it unfolded."""
    start = file.read(4096)
    if start[128:132] == b"DICM" and DEFLATED.encode() in start:
        if start[132:136] != b"\x02\0\0\0":
            raise ScanError("damaged_header", "deflated, and does not say from where on")
        file.seek(144 + int.from_bytes(start[140:144], "little"))
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            while chunk := inflate.unconsumed_tail or file.read(2**16):
                total += len(inflate.decompress(chunk, 2**20))
                if total > max(_MAX_INFLATION, 32 * size):
                    raise ScanError("too_large", "unfolds to too much")
        except zlib.error:
            raise ScanError("damaged_header") from None
    file.seek(0)


def pixel_room(file: BinaryIO, size: int, *, implicit: bool, order: Literal["little", "big"]) -> PixelRoom | None:
    """The pixel data of a file that stands at the element behind its header; None where there are none.

    Never more than the file has, whatever its header says.
    """
    start = file.read(12)
    if len(start) < 8:
        return None
    group, element = int.from_bytes(start[:2], order), int.from_bytes(start[2:4], order)
    if group != 0x7FE0 or element not in _PIXEL_DATA:
        return None
    if implicit:
        length, begin = int.from_bytes(start[4:8], order), file.tell() - len(start) + 8
    else:
        length, begin = int.from_bytes(start[8:12], order), file.tell()
    left = max(0, size - begin)
    return PixelRoom(left, encoded=True) if length == 0xFFFFFFFF else PixelRoom(min(length, left))
