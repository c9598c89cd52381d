"""PNG, JPEG and TIFF in, PNG out: the one file that knows Pillow."""

import logging
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.reasons import reason_of
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan

logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # it quotes tags of the file

_FORMATS = ("PNG", "JPEG", "TIFF")
MAX_PIXELS = 2**27
_MAX_PIXELS_PER_BYTE = 8192
"""An honest picture of one colour compresses about so far; a header that claims more lies."""


def looks_like_picture(start: bytes) -> bool:
    """Whether a file that begins with `start` is PNG, JPEG or TIFF."""
    return start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"))


def check_header(path: Path) -> tuple[int, int]:
    """(H, W) without decoding a pixel. Raises ScanError."""
    with _open(path) as image:
        return image.height, image.width


def read_picture(path: Path, modality: Modality) -> Scan:
    """A grey picture, or a coloured one whose channels agree, as (1, H, W). Raises ScanError: `colour_image`, ..."""
    with _open(path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = _grey(image)
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged files
            raise ScanError(reason_of(error, "cannot_decode")) from None
    # Dots per inch in a picture speak of screens and printers, not of the patient.
    return Scan(values[None], (1.0, 1.0), modality, spacing_known=False, is_calibrated=False)


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise ScanError("too_large") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ScanError(reason_of(error, "damaged_header")) from None
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        image.close()
        raise ScanError("too_large")
    if pixels > path.stat().st_size * _MAX_PIXELS_PER_BYTE:
        image.close()
        raise ScanError("truncated_pixels")
    return image


def _grey(image: Image.Image) -> NDArray[np.float32]:
    """(H, W) of the first picture in the file; black is low."""
    if image.mode == "1":
        raise ScanError("binary_image")
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if image.mode in ("LA", "La"):
        values = values[..., 0]
    elif values.ndim == 3:
        values = _grey_of_colour(values[..., :3])
    if image.mode not in ("P", "RGB") and _white_is_low(image):
        values = values.max() - values.astype(np.float64)
    return np.ascontiguousarray(values, dtype=np.float32)


def _grey_of_colour(colour: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean of channels that agree to 2% of the range on average: a grey picture behind a colour JPEG."""
    wide = colour.astype(np.float64)
    if float(np.ptp(wide, axis=2).mean()) > 0.02 * 255:
        raise ScanError("colour_image")
    return np.asarray(wide.mean(axis=2))


def _white_is_low(image: Image.Image) -> bool:
    """TIFF may say that 0 is white; Pillow turns 8 bits over by itself, not 16."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I") and tags.get(262) == 0


def write_png(path: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    """Write grey (H, W) of 8 or 16 bit, or colour (H, W, 3) of 8 bit, as PNG, whole or not at all."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise AssertionError(f"pixels of {pixels.dtype}")
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
