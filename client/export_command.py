"""`unimiss export`: its options. The work is in `client.export`, which is imported once they are known to be right."""

import argparse
from pathlib import Path

from unimiss_core.extras import way_to

FORMS = ("safetensors", "onnx", "monai")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "export",
        help="write an encoder, or a fine-tuned model, for other programs",
        epilog="Each folder also holds a model card, README.md, and config.json. onnx is held against torch with "
        f"onnxruntime before it is written, and needs the extra: {way_to('export')}. monai takes a "
        "fine-tuned model. docs/export.md says more. Exit codes: 0 done, 1 the ONNX answers otherwise than torch, 2 "
        "wrong option, missing extra or an OUT that is not empty, 4 bad checkpoint or model, 130 interrupted; nothing "
        "is written but by 0.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint, or of a fine-tuning")
    parser.add_argument("--to", choices=FORMS, required=True, dest="form", metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--out", type=Path, required=True, metavar="OUT_DIR", help="must be new or empty")
    parser.add_argument("--student", action="store_true", help="of a checkpoint, instead of its teacher")
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="N",
        help="of onnx: H W or D H W; of an encoder that rank alone (default: the model's own, both ranks)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        metavar="C",
        help="of onnx for images, 1 or 3 (default: 1, grey; of a task with channels all of them)",
    )
    parser.add_argument("--licence", metavar="SPDX", help="for the card, such as CC-BY-NC-4.0 (default: not stated)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises as `client.export.export`."""
    from client.export import export

    export(
        options.model,
        options.form,
        options.out,
        student=options.student,
        size=options.input_size,
        channels=options.channels,
        licence=options.licence,
        key=options.key,
    )
