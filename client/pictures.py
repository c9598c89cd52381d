"""PNG, JPEG and TIFF in, PNG out: the one file that knows Pillow."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.dicom_values import grey_of
from client.reasons import reason_of
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan

logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # it quotes tags of the file

_PNG = b"\x89PNG\r\n\x1a\n"
_FORMATS = ("PNG", "JPEG", "TIFF")
_EXIF_ORIENTATION = 274
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Of TIFF."""
_SEGMENTS = frozenset((0xC0, 0xC1, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
"""Of a JPEG that is not progressive, before its pixels: frame, tables, restarts, what programs add, comment."""
MAX_PIXELS = 2**27
_MAX_PIXELS_PER_BYTE = 8192
"""An honest picture of one colour compresses about so far; a header that claims more lies."""


def looks_like_picture(start: bytes) -> bool:
    """Whether a file that begins with `start` is PNG, JPEG or TIFF."""
    return start.startswith((_PNG, b"\xff\xd8\xff", b"II*\0", b"MM\0*"))


def check_header(path: Path) -> tuple[int, int]:
    """(H, W), as it is shown, without decoding a pixel. Raises ScanError."""
    with _opened(path) as image:
        # Pillow says of a TIFF how large it is when it has been turned.
        return (image.width, image.height) if _orientation(image) > 4 else (image.height, image.width)


def is_stored_turned(path: Path) -> bool:
    """Whether the file is a picture that says that it is shown otherwise than it is stored."""
    try:
        with path.open("rb") as file:
            if not looks_like_picture(file.read(8)):
                return False
        with _opened(path) as image:
            return _stated_orientation(image) != 1
    except (ScanError, OSError):
        return False


def may_take_long(path: Path) -> bool:
    """Whether a small file may ask for work without end: a JPEG of several scans, as progressive ones are, which all go
    over its pixels, or a TIFF, which may name its strips again and again."""
    with path.open("rb") as file:
        if file.read(len(_PNG)) == _PNG:
            return False
        file.seek(0)
        return file.read(2) != b"\xff\xd8" or not _has_one_scan(file)


def _has_one_scan(file: BinaryIO) -> bool:
    """Of a JPEG that stands behind its first two bytes. What is not as encoders write it counts as several."""
    components = b""
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        length = int.from_bytes(head[2:], "big") - 2
        if head[1] == 0xDA:
            return components == file.read(1)
        if length < 0 or head[1] not in _SEGMENTS:
            return False
        content = file.read(length)
        if head[1] in (0xC0, 0xC1):
            components = content[5:6]
    return False


def read_picture(path: Path, modality: Modality) -> Scan:
    """A grey picture, or a coloured one whose channels agree, as (1, H, W), turned as it is shown.

    Raises ScanError: `colour_image`, ...
    """
    with _opened(path) as image:
        try:
            orientation = _orientation(image)
            values = _turned(_grey(image, path), orientation)
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged files
            raise ScanError(reason_of(error, "cannot_decode")) from None
    # Dots per inch in a picture speak of screens and printers, not of the patient.
    return Scan(values[None], (1.0, 1.0), modality, spacing_known=False, is_calibrated=False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """As a stream: an uncompressed TIFF that Pillow opens by its name is mapped, and scrambled where it is turned."""
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = stack.enter_context(Image.open(stack.enter_context(path.open("rb")), formats=_FORMATS))
        except Image.DecompressionBombError:
            raise ScanError("too_large") from None
        except MemoryError:
            raise
        except Exception as error:
            raise ScanError(reason_of(error, "damaged_header")) from None
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ScanError("too_large")
        if pixels > path.stat().st_size * _MAX_PIXELS_PER_BYTE:
            raise ScanError("truncated_pixels")
        yield image


def _orientation(image: Image.Image) -> int:
    """How it is to be turned, from 1 to 8, as EXIF numbers it; 1 of a TIFF, which Pillow turns by itself."""
    return 1 if image.format == "TIFF" else _stated_orientation(image)


def _stated_orientation(image: Image.Image) -> int:
    """What a file whose pixels were not read yet says of it; 1 where it says nothing."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.format != "TIFF":
        tags = exif = Image.Exif()
        with contextlib.suppress(Exception):  # a damaged EXIF says nothing
            if "exif" in image.info:
                exif.load(image.info["exif"])
    found = tags.get(_EXIF_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _turned(stored: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """(H, W) -> as it is shown."""
    turned = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored.T[::-1],
    }
    return np.ascontiguousarray(turned.get(orientation, stored))


def _grey(image: Image.Image, path: Path) -> NDArray[np.float32]:
    """(H, W) of the first picture in the file; black is low."""
    if image.mode == "1":
        raise ScanError("binary_image")
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    values = _deep_samples(path, image.size)
    if values is None:
        values = _as_written(np.asarray(image), image.mode, tags)
        if image.mode in ("LA", "La"):
            values = values[..., 0]
    if values.ndim == 3:
        values = grey_of(values)
        if 16 in tags.get(_BITS_PER_SAMPLE, ()):  # of which Pillow keeps 8
            raise ScanError("cannot_decode")
    # TIFF may say that 0 is white; Pillow turns 8 bits over by itself, and nothing else.
    if image.mode.startswith(("I", "F")) and tags.get(_PHOTOMETRIC) == 0:
        values = np.nanmax(values) - values.astype(np.float64)
    return np.ascontiguousarray(values, dtype=np.float32)


def _as_written(values: NDArray[Any], mode: str, tags: Mapping[int, Any]) -> NDArray[Any]:
    """The same bits as the numbers that a TIFF says they are: Pillow has no signed bytes and no words without sign."""
    kind = {("L", 2): np.int8, ("I", 1): np.uint32}.get((mode, *tags.get(_SAMPLE_FORMAT, (1,))[:1]))
    return values.view(kind) if tags and kind else values


def _deep_samples(path: Path, size: tuple[int, int]) -> NDArray[Any] | None:
    """(H, W), or (H, W, C) of colours, of a PNG with several samples of 16 bit a pixel, of which Pillow keeps 8; None
    of any other file.

    Pillow's decoder is asked for the upper bytes and for the lower ones. Grey with alpha is as long as four bytes.
    """
    with path.open("rb") as file:
        start = file.read(29)
        if not start.startswith(_PNG) or start[24] != 16 or start[25] not in (2, 4, 6):
            return None
        packed = b"".join(_pixel_chunks(start + file.read()))

    def unpacked(mode: str, bytes_of: str) -> NDArray[Any]:
        return np.asarray(Image.frombytes(mode, size, packed, "zip", bytes_of, start[28])).astype(np.uint16)

    if start[25] == 4:
        four = unpacked("RGBA", "RGBA")
        upper, lower = four[..., 0], four[..., 1]
    else:
        mode = "RGB" if start[25] == 2 else "RGBA"
        upper, lower = unpacked(mode, f"{mode};16B"), unpacked(mode, f"{mode};16L")
    return np.asarray(upper << 8 | lower)


def _pixel_chunks(content: bytes) -> Iterator[bytes]:
    """What a PNG file holds of its packed pixels."""
    at = len(_PNG)
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == b"IDAT":
            yield content[at + 8 : at + 8 + length]
        at += 12 + length


def write_png(path: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write grey (H, W) of 8 or 16 bit, or colour (H, W, 3) of 8 bit, as PNG, whole or not at all."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise AssertionError(f"pixels of {pixels.dtype}")
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
