"""Scans that do not say what they are: CT among them is prepared otherwise than any CT that a model was trained on."""

from collections.abc import Iterable, Sequence

from unimiss_core import progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.scan import Modality


def tell_of_unnamed_channels(channels: Sequence[str], scans: Iterable[Sequence[Modality]], way_out: str) -> None:
    """Report of which channels nothing says what they are, neither their names nor files, and of how many scans. scans:
    as each one's channels were read."""
    unnamed = [[name for name, one in zip(channels, scan, strict=True) if one == "OT"] for scan in scans]
    if which := [name for name in channels if any(name in scan for scan in unnamed)]:
        told = f"nothing says what {', '.join(map(on_one_line, which))} of {sum(map(bool, unnamed))} scan(s) are"
        progress.report(progress.Note(f"{told}; {way_out}, for CT is read in Hounsfield units"))


def tell_of_unnamed(modalities: Iterable[Modality], way_out: str = "--modality CT") -> None:
    """Report how many there are, if any. modalities: as scans were read, where nobody said what they are. way_out: the
    option or setting that says it."""
    if unnamed := sum(one == "OT" for one in modalities):
        told = f"{unnamed} scan(s) do not say what they are; where they are CT, say so: with {way_out} they are"
        progress.report(progress.Note(f"{told} read in Hounsfield units, as training read CT"))
