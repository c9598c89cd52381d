"""What a step sees of scans: views of them in pretraining, a view and its label in fine-tuning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from client.cache import CachedScan
from client.site_labels import LabelledScan
from client.training_views import crop_of, window_of
from unimiss_core.labelled_views import with_mask, with_shares
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import ClassificationConfig, SupervisionConfig
from unimiss_core.views import draw_batch, split


def draw_views(
    scans: Sequence[CachedScan],
    study: StudyConfig,
    generator: torch.Generator,
    device: torch.device,
    *,
    part: slice | None = None,
) -> Tensor:
    """(B, V, C, *S) on `device`; in fine-tuning (B, 1, C + 1, *S), as `unimiss_core.labelled_views` has them.

    part: as of `draw_batch`.

    On a GPU they are drawn on a stream of their own: on the one of a step that is being taken, what is copied there
    would come after the whole of it, and nothing would be drawn ahead. They must be kept until whoever reads them on
    another stream has waited for the device, as a step does: their memory goes back to that stream.
    """
    with _done_on(_stream_of(device)):
        return _drawn(scans, study, generator, device, part)


def _drawn(
    scans: Sequence[CachedScan],
    study: StudyConfig,
    generator: torch.Generator,
    device: torch.device,
    part: slice | None,
) -> Tensor:
    if study.finetune is None:
        return draw_batch(scans, study.views, generator, device, part=part)
    size = study.size_of(study.finetune.task.rank)
    generators = [split(generator) for _ in scans]  # of all scans: a place in the batch keeps its own
    wanted = part or slice(None)
    views = [
        labelled_view(scan, study.finetune, size, own)
        for scan, own in zip(scans[wanted], generators[wanted], strict=True)
    ]
    return torch.stack(views)[:, None].to(device)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """One for each GPU, whoever draws: cuBLAS keeps memory for every stream that it has met."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def _done_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work within is done on this stream, and over at the end."""
    if stream is None:
        yield
        return
    # The device, too: when a stream of another one ends, torch would make that of this thread current, cuda:0 mostly,
    # and so begin to use a card that may be somebody else's.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
        stream.synchronize()


def labelled_view(
    scan: CachedScan, asked: SupervisionConfig, size: Sequence[int], generator: torch.Generator
) -> Tensor:
    """A random crop of a whole scan with its class, or a window of it with its mask: (C + 1, *size)."""
    assert isinstance(scan, LabelledScan), "a study of fine-tuning opens labelled scans"
    task, apart = asked.task, asked.task.channels is not None
    if not isinstance(task, ClassificationConfig):
        about = asked.foreground
        return with_mask(*window_of(scan, size, asked.augmentation, generator, foreground=about, shades_apart=apart))
    view = crop_of(scan, size, asked.augmentation, generator, shades_apart=apart)
    if task.kind == "multi_label":
        return with_shares(view, scan.target)
    return with_shares(view, [float(number == scan.target[0]) for number in range(task.outputs)])
