"""`unimiss predict`: its options. The work is in `client.predicting`, imported once they are known to be right."""

import argparse
from pathlib import Path


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "predict",
        help="ask a fine-tuned model about scans",
        epilog="OUT_DIR/predictions.csv has a line for each scan, OUT_DIR/masks what a segmentation draws, on the grid "
        "of each scan's own file. What cannot be read is counted and left out. --show-paths says which line is of "
        "which file. A table has a line for each scan, with the path of a file, or of a DICOM series' folder, for each "
        "channel of the model. docs/after-pretraining.md has more. Exit codes: 0 done, 2 wrong input or an output that "
        "cannot be written, 3 no usable scan, 4 bad model, 130 interrupted.",
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL_DIR",
        help="as `unimiss finetune` wrote it, or a round of a federation that fine-tuned",
    )
    parser.add_argument(
        "scans",
        type=Path,
        metavar="SCANS",
        help="folder of DICOM, NIfTI, PNG, ..., or one file, or a table of paths (.csv or .tsv)",
    )
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="where a table's paths begin (default: its own)")
    parser.add_argument(
        "--scan",
        action="append",
        default=[],
        metavar="[CHANNEL=]COLUMN",
        help="of a table: the column of the scan (default: scan), or, once for each channel, of this one (default: as "
        "the channel is called)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT_DIR", help="new or empty")
    parser.add_argument(
        "--dicom-seg", action="store_true", help="masks of DICOM series also as DICOM SEG, which names the patient"
    )
    parser.add_argument(
        "--names",
        choices=("number", "input"),
        default="number",
        help="what masks are called: as their scan's number (of a table its line's), or as its file or folder, which "
        "may name a patient (default: number)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises as `client.predicting.predict`."""
    from client.predicting import predict

    predict(
        options.model,
        options.scans,
        options.out,
        modality=options.modality,
        batch=options.batch,
        device=options.device,
        show_paths=options.show_paths,
        dicom_seg=options.dicom_seg,
        names=options.names,
        key=options.key,
        root=options.root,
        columns=options.scan,
    )
