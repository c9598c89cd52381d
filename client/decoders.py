"""Which decoders of compressed pixels are installed here: what one cannot read, another may."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "python-gdcm",
    "pyjpegls",
    "pillow",
)


@cache
def decoders() -> str:
    """Names and versions of those that are there, in one line."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
