"""Scans that do not say what they are: CT among them is prepared otherwise than any CT that a model was trained on."""

from collections.abc import Iterable

from unimiss_core import progress
from unimiss_core.scan import Modality


def tell_of_unnamed(modalities: Iterable[Modality], way_out: str = "--modality CT") -> None:
    """Report how many there are, if any. modalities: as scans were read, where nobody said what they are. way_out: the
    option or setting that says it."""
    if unnamed := sum(one == "OT" for one in modalities):
        told = f"{unnamed} scan(s) do not say what they are; where they are CT, say so: with {way_out} they are"
        progress.report(progress.Note(f"{told} read in Hounsfield units, as training read CT"))
