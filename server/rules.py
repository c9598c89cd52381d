"""Which rule a study means, ready for one round."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from server.aggregation import Aggregate, WeightedMean, largest_product
from server.exact_sum import SpareMemory
from server.robust import MedianBoundedMean, NormBoundedMean, Trimmed, median_cut, trimmed_cut
from server.site_level import SiteLevelMean
from server.spill import Spill
from unimiss_core.codec import Layout
from unimiss_core.noise import GaussianNoise
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.study import MeanConfig, MedianConfig, StudyConfig, TrimmedMeanConfig


@contextmanager
def opened_aggregate(
    study: StudyConfig, layout: Layout, scratch: Path, spare: SpareMemory | None = None
) -> Iterator[Aggregate]:
    """The study's rule. scratch: a folder for what it must keep until the round ends; it is gone afterwards. spare: of
    the rounds before."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield build_aggregate(study, layout, Spill(scratch, layout), spare)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_aggregate(study: StudyConfig, layout: Layout, spill: Spill, spare: SpareMemory | None) -> Aggregate:
    if isinstance(study.privacy, SitePrivacyConfig):
        return SiteLevelMean(layout, study.privacy, GaussianNoise(torch.device("cpu")), spare)
    rule = study.aggregation.rule
    if isinstance(rule, MedianConfig):
        return Trimmed(layout, spill, median_cut)
    if isinstance(rule, TrimmedMeanConfig):
        return Trimmed(layout, spill, partial(trimmed_cut, share=rule.share))
    mean = WeightedMean(layout, largest=largest_product(study.aggregation), spare=spare)
    if isinstance(rule, MeanConfig):
        return mean
    if rule.max_norm is not None:
        return NormBoundedMean(layout, mean, rule.max_norm)
    return MedianBoundedMean(layout, mean, spill, rule.times_median)
