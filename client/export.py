"""`unimiss export`: a checkpoint's encoder, or a fine-tuned model, in the forms that other programs read.

OUT/README.md, config.json     model card, and what programs need to know (`unimiss_core.exported`)
    model.safetensors          --to safetensors: a plain state_dict
    encoder-2d.onnx, encoder-3d.onnx, or model.onnx    --to onnx
    configs/, models/          --to monai: a bundle (`client.monai_bundle`)
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from safetensors.torch import save as as_bytes
from torch import nn

from client import monai_bundle, onnx_export
from client.export_card import card
from client.export_sources import Pretrained, Source, Tuned, read_source
from client.onnx_export import EncoderOutputs, Graph, graph_of
from unimiss_core import durable, progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError
from unimiss_core.exported import CONFIG, TENSORS, ExportedConfig
from unimiss_core.inputs import InputConfig
from unimiss_core.keys import read_signing_public_key
from unimiss_core.scan import SMALLEST, Rank

Form = Literal["safetensors", "onnx", "monai"]

CARD = "README.md"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def export(
    folder: Path,
    form: Form,
    out: Path,
    *,
    student: bool = False,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    licence: str | None = None,
    key: Path | None = None,
) -> None:
    """Write what lies in `folder` as the folder `out`, whole or not at all.

    student: of a checkpoint, in the teacher's place. size, channels: that an ONNX graph is made for; None takes the
    model's own sizes, and its task's channels, or grey. licence: an SPDX identifier. key: the public key that must have
    signed a checkpoint.
    Raises ConfigError, CheckpointError, ExportError.
    """
    _check(form, out, size=size, channels=channels, licence=licence)
    source = read_source(
        folder, student=student, key=read_signing_public_key(key) if key is not None else None, licence=licence
    )
    graphs = dict(_graphs(source, size, _channels(source, size, channels))) if form == "onnx" else {}
    if form == "monai":
        tuned = _task_of(source)
        files, use = monai_bundle.files_of(tuned), monai_bundle.use_of(tuned.manifest)
    elif form == "onnx":
        files, use = {name: graph.payload for name, graph in graphs.items()}, _USE_ONNX
    else:
        files, use = {TENSORS: as_bytes(source.model.state_dict())}, _use_safetensors(source)
    config = source.config.model_copy(
        update={
            "inputs": _inputs(source.config, graphs),
            "graphs": {name: graph.config for name, graph in graphs.items()},
            "sha256": {name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()},
        }
    )
    _write(out, {**files, CONFIG: _json(config), CARD: card(source, config, use).encode()})
    for name, graph in graphs.items():
        print(f"{name}: differs from torch by {graph.config.largest_difference:.1e} of the largest value at most")
    print(f"{out}: {', '.join(sorted(files))}, {CONFIG} and {CARD}")


def _check(form: Form, out: Path, *, size: Sequence[int] | None, channels: int | None, licence: str | None) -> None:
    """What can be told before anything is read. Raises ConfigError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not empty; give a new folder")
    if form != "onnx" and (size is not None or channels is not None):
        raise ConfigError(f"--input-size and --channels are of --to onnx; --to {form} takes scans of any size")
    if size is not None:
        rank: Rank = 2 if len(size) == 2 else 3
        if len(size) not in SMALLEST or any(n < least for n, least in zip(size, SMALLEST[rank], strict=True)):
            least = " or ".join(" ".join(map(str, SMALLEST[one])) for one in SMALLEST)
            raise ConfigError(f"--input-size {' '.join(map(str, size))}: give H W or D H W, at least {least}")
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(f"--licence {licence!a}: give an SPDX identifier, such as CC-BY-NC-4.0")
    if form == "onnx":
        onnx_export.require_extra()
    elif form == "monai":
        monai_bundle.require_extra()


def _task_of(source: Source) -> Tuned:
    if isinstance(source, Pretrained):
        raise ConfigError("--to monai: a bundle answers a task; give a fine-tuned model, or take --to safetensors")
    return source


def _channels(source: Source, size: Sequence[int] | None, asked: int | None) -> int:
    """C of the graphs' scans: the task's, or of images 1, grey, or 3. Raises ConfigError: there are no such scans."""
    if (named := source.config.channels) is not None:
        if asked not in (None, len(named)):
            told = ", ".join(map(on_one_line, named))
            raise ConfigError(f"--channels {asked}: the model's scans have {len(named)} ({told}); leave it out")
        return len(named)
    if asked not in (None, 1, 3):
        raise ConfigError(f"--channels {asked}: give 1, of grey images, or 3, of coloured ones")
    ranks = {len(size)} if size is not None else {*source.config.ranks}
    if asked == 3 and ranks == {3}:
        raise ConfigError("--channels 3: volumes have one channel; leave it out")
    return asked or 1


def _graphs(source: Source, size: Sequence[int] | None, channels: int) -> Iterator[tuple[str, Graph]]:
    """ONNX files by name, one at a time: of an encoder one for each rank, or for that of `size` alone."""
    config, facts = source.config, _facts(source.config)
    if isinstance(source, Tuned):
        task = source.manifest.task
        chosen = tuple(size or task.size_for(config.model))
        if len(chosen) != task.rank:
            raise ConfigError(f"--input-size: the model is for scans of {task.rank} axes, {len(chosen)} were given")
        _tell("model.onnx", chosen)
        yield "model.onnx", graph_of(source.model, chosen, channels=channels, outputs=["logits"], facts=facts)
        return
    sizes = [tuple(size)] if size is not None else [config.model.image_size, config.model.volume_size]
    model: nn.Module = EncoderOutputs(source.model)
    for chosen in sizes:
        name, own = f"encoder-{len(chosen)}d.onnx", channels if len(chosen) == 2 else 1
        _tell(name, chosen)
        yield name, graph_of(model, chosen, channels=own, outputs=["features", "tokens"], facts=facts)


def _inputs(config: ExportedConfig, graphs: Mapping[str, Graph]) -> tuple[InputConfig, ...]:
    """As the model has them, or as its ONNX files do, which were made for one size each."""
    sizes = [graph.config.input[2:] for graph in graphs.values()] or [one.size for one in config.inputs]
    known = {len(one.size): one for one in config.inputs}
    return tuple(known[len(size)].model_copy(update={"size": size}) for size in sizes)


def _tell(name: str, size: Sequence[int]) -> None:
    progress.report(
        progress.Note(f"{name}: traced for scans of {' x '.join(map(str, size))} and checked; takes a while")
    )


def _facts(config: ExportedConfig) -> dict[str, str]:
    """What an ONNX file says of itself where it is parted from its folder."""
    told = {
        "holds": config.holds,
        "plan": config.plan.canonical(),
        "values": "the plan's [0, 1] as 4 x - 2",
        "task": "" if config.task is None else config.task.canonical(),
        "channels": _channels_told(config),
        "study_digest": config.study_digest or "",
        "source_digest": config.source_digest,
        "licence": config.licence or "",
        "use": "research; not for diagnosis",
    }
    return {f"unimiss.{name}": text for name, text in told.items() if text}


def _channels_told(config: ExportedConfig) -> str:
    """JSON; empty of scans of one."""
    named = [one.model_dump(mode="json") for told in config.inputs for one in told.channels]
    return json.dumps(named) if named else ""


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    try:
        with durable.new_folder(out.resolve()) as partial:  # "." has no name to write beside
            for name, payload in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(payload)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None


def _json(config: ExportedConfig) -> bytes:
    return (config.model_dump_json(indent=2) + "\n").encode()


_USE_ONNX = """\
Each ONNX file takes `scan` (batch, channels, ...) of the size in `config.json`, any number at a time, and was held
against torch when it was written. For an encoder or a classification a prepared scan is resized to that size as a
whole; for a segmentation windows of that size are cut from it. A grey picture is one channel. An encoder answers
`features` (batch, width), and `tokens` (batch, 1 + N, width), the class token first and then each cell of the map
that goes with it. A model for a task answers `logits`: softmax over their second axis makes them probabilities; of a
multi-label classification, sigmoid.

    session = onnxruntime.InferenceSession("FILE.onnx")
    session.run(None, {"scan": scans})
"""


def _use_safetensors(source: Source) -> str:
    network = source.config.model.network
    what = network if isinstance(source, Pretrained) else "the task's model, `backbone.*` and `head.*`"
    return f"""\
`model.safetensors` is a plain state_dict of {what}, `config.json` has its sizes.

    tensors = safetensors.torch.load_file("model.safetensors")    # names and values alone
    model, config = unimiss_core.exported.load(Path("."))         # with federated-unimiss, ready to be asked
"""
