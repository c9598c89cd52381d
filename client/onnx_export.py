"""Models as ONNX graphs, each held against torch before it is let out: the one file that knows ONNX.

Legend of shapes: B scans, C channels, S spatial axes - (H, W) or (D, H, W) -, N tokens, K outputs.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unimiss_core.backbone import Backbone
from unimiss_core.errors import ConfigError, ExportError
from unimiss_core.exported import GraphConfig
from unimiss_core.extras import way_to
from unimiss_core.layers import PositionTable

Values = NDArray[Any]

TOLERANCE = 1e-4
"""Of what ONNX may answer otherwise than torch, in shares of the largest value where that is above 1."""
INPUT = "scan"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_OPSET = 18
_BATCHES = (1, 3)
"""Of the check: neither is the batch that the graph is traced with."""


@dataclass(frozen=True)
class Graph:
    """An ONNX file's bytes, and what was found of it."""

    payload: bytes
    config: GraphConfig


class EncoderOutputs(nn.Module):
    """`features` (B, width) and `tokens` (B, 1 + N, width) of an encoder, in one pass."""

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, scan: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder.forward_features(scan)
        return self.encoder.forward_head(tokens), tokens


def require_extra() -> None:
    """Raises ConfigError: what ONNX needs is not installed."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} must be installed for --to onnx: {way_to('export')}")


@torch.no_grad()
def graph_of(
    model: nn.Module, size: Sequence[int], *, channels: int, outputs: Sequence[str], facts: Mapping[str, str]
) -> Graph:
    """The model's graph for scans (B, channels, *size), B being free.

    outputs: names of what the model answers. facts: what the file itself should say of the model.
    Raises ExportError: onnxruntime answers otherwise than torch. Raises ConfigError: such scans do not fit into memory.
    """
    try:
        made = fitted(model, size, channels=channels)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise ConfigError(
            f"scans of {' x '.join(map(str, size))} need more memory than there is; give a smaller --input-size"
        ) from None
    payload = _traced(made, size, channels=channels, outputs=outputs, facts=facts)
    return Graph(payload, _checked(payload, model, size, channels=channels, outputs=outputs))


def fitted(model: nn.Module, size: Sequence[int], *, channels: int) -> nn.Module:
    """A copy whose position tables are those that scans (B, channels, *size) meet, already resized.

    torch's exporter drops the scale of a trilinear resizing, which sets where a table is sampled: traced as it is, a
    volume's answers would differ by a hundredth (docs/LOG.md).
    """
    made = copy.deepcopy(model)

    def resize_(table: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(table, PositionTable)
        table.table = nn.Parameter(table.forward(inputs[0]), requires_grad=False)
        table.grid = tuple(inputs[0].shape[2:])

    hooks = [one.register_forward_pre_hook(resize_) for one in made.modules() if isinstance(one, PositionTable)]
    made(torch.zeros(1, channels, *size))
    for hook in hooks:
        hook.remove()
    return made


def _traced(
    model: nn.Module, size: Sequence[int], *, channels: int, outputs: Sequence[str], facts: Mapping[str, str]
) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, channels, *size),),
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=list(outputs),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
    _forget_sources_(proto)
    onnx.helper.set_model_props(proto, dict(facts))
    onnx.checker.check_model(proto)
    payload: bytes = proto.SerializeToString()
    return payload


def _forget_sources_(proto: Any) -> None:
    """Nodes and values remember which line of which file on this machine they came from."""
    proto.ClearField("doc_string")
    for part in (proto.graph, *proto.functions):
        for kind in ("node", "value_info", "input", "output", "initializer"):
            for one in getattr(part, kind, ()):
                for field in ("doc_string", "metadata_props"):
                    if not isinstance(one, str):
                        one.ClearField(field)
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _checked(
    payload: bytes, model: nn.Module, size: Sequence[int], *, channels: int, outputs: Sequence[str]
) -> GraphConfig:
    """Ask both about scans drawn at random over the range of the input. Raises ExportError."""
    generator = torch.Generator().manual_seed(0)
    worst, shapes = 0.0, {}
    for batch in _BATCHES:
        scans = torch.rand(batch, channels, *size, generator=generator) * 4 - 2
        expected = model(scans)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        found = _answers(payload, outputs, scans)
        worst = max(worst, *(difference(one, other.numpy()) for one, other in zip(found, expected, strict=True)))
        shapes = {name: ("batch", *one.shape[1:]) for name, one in zip(outputs, found, strict=True)}
    if not worst <= TOLERANCE:
        raise ExportError(
            f"onnxruntime answers otherwise than torch: by {worst:.1e} of the largest value, expected at most "
            f"{TOLERANCE:.0e}. Nothing was written; other versions of torch and onnxruntime may agree"
        )
    return GraphConfig(input=("batch", channels, *size), outputs=shapes, largest_difference=worst)


def _answers(payload: bytes, outputs: Sequence[str], scans: Tensor) -> Sequence[Values]:
    import onnxruntime

    session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    found: Sequence[Values] = session.run(list(outputs), {INPUT: scans.numpy()})
    return found


def difference(found: Values, expected: Values) -> float:
    """The largest, in shares of the largest value where that is above 1; infinite where a value is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of what it does itself, and of packages that nobody asked for."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
