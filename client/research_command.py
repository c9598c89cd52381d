"""`unimiss`: what a researcher does with a pretrained encoder.

unimiss import RELEASED.pth OUT_DIR               the authors' released weights as a checkpoint of ours
unimiss embed CHECKPOINT_DIR INPUT --out FILE     features of scans, or of an array that is already preprocessed
unimiss verify CHECKPOINT_DIR                     whether it is as it was written, and signed by whom it should be
unimiss export MODEL --to FORM --out OUT_DIR      an encoder or a fine-tuned model, for other programs
unimiss finetune CONFIG.yaml [--resume]           a model for a task from an encoder and labelled scans
unimiss predict MODEL_DIR SCANS --out OUT_DIR     what such a model says about scans that nobody labelled
unimiss probe CHECKPOINT --data DATA              how well labelled scans separate by an encoder's features
unimiss plan-privacy ...                          what a study's privacy costs, or the noise that an epsilon needs
unimiss audit-privacy ...                         what the private engine releases, or whether a run tells its patients

The work is in `client.research`, which is imported once the command line is known to be right: torch takes seconds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from client import export_command, predict_command
from client.screen import Screen
from unimiss_core import progress
from unimiss_core.commands import exit_code_of
from unimiss_core.errors import ConfigError
from unimiss_core.extras import way_to

_MODALITIES = ("CT", "MR", "PT", "XR", "OT")
"""`unimiss_core.scan.Modality`, which cannot be read without importing NumPy."""
_LEFT = {"finetune": "go on with --resume", "predict": "the table in --out has what was predicted so far"}
"""What there is of a command's work when it is interrupted."""
_FEWER = "give a smaller --batch, free it of other work, or name another --device"
_OUT_OF_MEMORY = {
    "finetune": "free it of other work, or name another --device, and go on with --resume; or begin anew in another "
    "--out with a smaller training.batch, inference.batch or task.input_size",
    "embed": _FEWER,
    "predict": _FEWER,
    "probe": _FEWER,
    "audit-privacy": "free it of other work; with --study give fewer --patients-at-once, with --run another --device",
}
"""What may be done where memory does not suffice for a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `unimiss_core.errors`)."""
    options = _parser().parse_args(arguments)
    left = _LEFT.get(options.command, "nothing was written")
    return exit_code_of(
        lambda: _run(options),
        f"unimiss {options.command}",
        interrupted=f"interrupted; {left}",
        out_of_memory=_OUT_OF_MEMORY.get(options.command, "free it of other work"),
    )


def _run(options: argparse.Namespace) -> None:
    try:
        with progress.listen(Screen().show):
            _ACTS[options.command](options)
    except OSError as error:  # of a path on the command line; never its text, which may name a file below a data root
        raise ConfigError(f"a file or folder cannot be used ({error.strerror}); check the paths given") from None


def _import(options: argparse.Namespace) -> None:
    from client import research

    research.import_released(options.released, options.out)


def _verify(options: argparse.Namespace) -> None:
    from client import verify_command

    verify_command.verify(options.checkpoint, options.key)


def _finetune(options: argparse.Namespace) -> None:
    from client.finetune import finetune

    finetune(
        options.config,
        resume=options.resume,
        data_root=options.data,
        out=options.out,
        init=options.init,
        device=options.device,
        show_paths=options.show_paths,
        key=options.key,
        fold=options.fold,
    )


def _embed(options: argparse.Namespace) -> None:
    from client.embedding import embed_input

    embed_input(
        options.checkpoint,
        options.input,
        options.out,
        batch=options.batch,
        device=options.device,
        show_paths=options.show_paths,
        key=options.key,
        modality=options.modality,
    )


def _probe(options: argparse.Namespace) -> None:
    try:
        from client.probe_sources import Columns, source_of
        from client.probing import run_probe
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        raise ConfigError(f"a probe needs scikit-learn: {way_to('research')}") from None

    source = source_of(
        options.data,
        root=options.root,
        columns={name: told for name in Columns._fields if (told := getattr(options, name)) is not None},
        patient_pattern=options.patient_pattern,
        modality=options.modality,
        counts_as={n: told for n in ("missing", "uncertain") if (told := getattr(options, n)) is not None},
    )
    run_probe(
        options.checkpoints,
        source,
        out=options.out,
        scores=options.scores,
        set_out=options.set_out,
        study=options.study,
        batch=options.batch,
        device=options.device,
        key=options.key,
    )


def _plan(options: argparse.Namespace) -> None:
    from client import plan_privacy

    numbers = {"--patients": options.patients, "--batch": options.batch, "--steps": options.steps}
    given = [name for name, value in numbers.items() if value is not None]
    if options.study is not None and set(given) <= {"--patients"}:
        plan_privacy.of_study(options.study, options.patients)
    elif options.study is None and len(given) == len(numbers):
        plan_privacy.of_numbers(
            patients=options.patients,
            batch=options.batch,
            steps=options.steps,
            epsilons=options.epsilon or (8.0, 3.0, 1.0),
            delta=options.delta,
            parameters=options.parameters,
        )
    else:
        raise ConfigError("give either --study (and --patients), or --patients, --batch and --steps")


def _audit(options: argparse.Namespace) -> None:
    of_run = (options.run, options.members, options.others)
    if (options.study is None) == (options.run is None) or (None in of_run) != (of_run == (None, None, None)):
        raise ConfigError("give either --study, or --run, --members and --others")
    from client import audit_command

    if options.study is not None:
        audit_command.of_study(
            options.study,
            canaries=options.canaries,
            steps=options.steps,
            patients_at_once=options.patients_at_once,
        )
    else:
        audit_command.of_run(*of_run, device=options.device, key=options.key)


_ACTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "import": _import,
    "embed": _embed,
    "verify": _verify,
    "export": export_command.run,
    "finetune": _finetune,
    "predict": predict_command.run,
    "probe": _probe,
    "plan-privacy": _plan,
    "audit-privacy": _audit,
}
"""What each command does."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimiss",
        description="What a researcher does with a pretrained encoder.",
        epilog="Exit codes: 0 done, 2 wrong input or an output that cannot be written, 3 no usable scan, "
        "4 bad checkpoint, 7 an audit contradicts a study's privacy, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    released = commands.add_parser("import", help="turn weights that the authors of UniMiSS released into a checkpoint")
    released.add_argument("released", type=Path, metavar="RELEASED.pth")
    released.add_argument("out", type=Path, metavar="OUT_DIR", help="folder of the checkpoint; must be new or empty")

    embed = commands.add_parser(
        "embed",
        help="write one feature vector for each scan",
        epilog="FILE.npz holds features (N, width), ranks (N,) and, but of an array, keys (N,); FILE.parquet the same "
        "as columns. Rows stand in the array's order; of a folder, pictures and NIfTI volumes by path, a folder's "
        "files before its subfolders, then DICOM series by the path of their first file. --show-paths says which row "
        "is which. docs/after-pretraining.md has more.",
    )
    embed.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="such as OUT/checkpoints/round-0007")
    embed.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="folder of scans, one file, or .npy array (N, C, *S) already preprocessed",
    )
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.parquet")
    _add_modality(embed, "NIfTI is OT, pictures are XR")
    _add_asking(embed)
    _add_key(embed)

    verify = commands.add_parser("verify", help="check a checkpoint's files, and who signed it")
    verify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="of a run, or as it was handed on")
    _add_key(verify)

    _add_key(export_command.add_to(commands))
    _add_finetune(commands)
    predict = predict_command.add_to(commands)
    _add_key(predict)
    _add_modality(predict, "what the model was trained with")
    _add_asking(predict)
    _add_probe(commands)
    plan = commands.add_parser(
        "plan-privacy",
        help="say what a study's privacy costs, or what noise an epsilon needs",
        epilog="Noise / clip norm is s sqrt(d) / B: how long the noise on a step's gradient is, beside the longest "
        "gradient that there can be. docs/privacy.md says what an epsilon is worth.",
    )
    plan.add_argument("--study", type=Path, metavar="STUDY.yaml", help="a study with a section `privacy`")
    plan.add_argument("--patients", type=_positive, metavar="N", help="patients of one site")
    plan.add_argument("--batch", type=_positive, metavar="B", help="patients that a step is expected to hold")
    plan.add_argument("--steps", type=_positive, metavar="T", help="rounds x local steps")
    plan.add_argument("--epsilon", type=_above_zero, nargs="+", metavar="E", help="default: 8 3 1")
    plan.add_argument("--delta", type=_above_zero, default=1e-5, metavar="D", help="default: 1e-5")
    plan.add_argument(
        "--parameters", type=_positive, default=2_390_992, metavar="P", help="values trained (default: all of nano)"
    )
    audit = commands.add_parser(
        "audit-privacy",
        help="measure what the private engine releases, or attack a finished run",
        epilog="With --study: trains on canaries and needs no scan. With --run: both site files are read as a site "
        "reads them; members and others should be two parts of one folder (patient_range). docs/privacy.md says what "
        "the figures are worth.",
    )
    audit.add_argument("--study", type=Path, metavar="STUDY.yaml", help="a study with privacy.mode: patient")
    audit.add_argument(
        "--canaries",
        type=_positive,
        metavar="N",
        help="of the bound (default: 500, or as many as the model has room for)",
    )
    audit.add_argument(
        "--steps", type=_positive, metavar="T", help="of the bound (default: 4 / sampling_rate, at most 1000)"
    )
    audit.add_argument(
        "--patients-at-once", type=_positive, default=1, metavar="N", help="as the site file has it (default: 1)"
    )
    audit.add_argument("--run", type=Path, metavar="OUT", help="folder of a finished run")
    audit.add_argument("--members", type=Path, metavar="SITE.yaml", help="whose patients the run trained on")
    audit.add_argument("--others", type=Path, metavar="SITE.yaml", help="whose patients it never saw")
    _add_key(audit)
    audit.add_argument("--device", default="auto", help="of --run: auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", type=Path, metavar="FILE.pub", help="refuse a checkpoint that this public key's owner did not sign"
    )


def _add_finetune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tune = commands.add_parser(
        "finetune",
        help="train a model for a task from an encoder and labelled scans",
        epilog="docs/finetuning.md says what the file holds and what is written; configs/finetune has examples. Scans "
        "are called by the line of their table, unless --show-paths names their files. Exit codes: 0 done, 1 loss or "
        "answers were not finite, 2 wrong input or an output that cannot be written, 3 no usable scan, 4 bad "
        "checkpoint or state, 130 interrupted.",
    )
    tune.add_argument("config", type=Path, metavar="CONFIG.yaml")
    tune.add_argument(
        "--resume", action="store_true", help="go on after the last epoch that was finished; leave what is done"
    )
    tune.add_argument(
        "--data", type=Path, metavar="ROOT", help="where paths of its data begin (default: its data_root)"
    )
    tune.add_argument("--out", type=Path, metavar="OUT_DIR", help="instead of the file's out")
    tune.add_argument(
        "--fold",
        type=_fold,
        metavar="N",
        help="instead of the file's split.fold, in OUT_DIR/fold-N; or all: each in turn, and what they say together",
    )
    tune.add_argument("--init", metavar="INIT", help="a checkpoint's folder, a released file, or scratch")
    tune.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    tune.add_argument("--show-paths", action="store_true", help="also name each scan's file below its folder")
    _add_key(tune)


def _add_probe(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    probe = commands.add_parser(
        "probe",
        help="say how well labelled scans separate by an encoder's features",
        epilog="DATA is a folder with a folder of scans for each label; a CSV with scan, label, patient and perhaps "
        "split; a MedMNIST .npz; or the file of a fine-tuning, whose split is taken. Patients stay together: without a "
        "split each scan is judged by a model of other patients. docs/after-pretraining.md has more. Exit codes: 0 "
        "done, 2 wrong input or an output that cannot be written, 3 no usable scan, 4 bad checkpoint, 130 interrupted.",
    )
    probe.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="its folder, a released file, or scratch; others are held against the first",
    )
    probe.add_argument("--data", type=Path, required=True, metavar="DATA", help="labelled scans")
    probe.add_argument("--root", type=Path, metavar="FOLDER", help="where a table's paths begin (default: its own)")
    for column in ("scan", "label", "patient"):
        probe.add_argument(f"--{column}", metavar="COLUMN", help=f"of a table (default: {column})")
    probe.add_argument("--missing", choices=("zeros", "ignore"), help="of a table: what a blank label counts as")
    probe.add_argument(
        "--uncertain", choices=("ones", "zeros", "ignore"), help="of a table of 1, 0 and -1: what -1 counts as"
    )
    probe.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="of a folder: a group named patient, searched in the path; without it NIfTI files and pictures are of a "
        "patient each",
    )
    _add_modality(probe, "NIfTI is OT, pictures are XR")
    probe.add_argument("--study", type=Path, metavar="STUDY.yaml", help="whose model and plan scratch has")
    probe.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures")
    probe.add_argument("--scores", action="store_true", help="into FILE.json also what each judged scan scored")
    probe.add_argument(
        "--set-out", type=Path, metavar="FILE.npz", help="also write the scans as a coordinator's `probe` takes them"
    )
    _add_batch_and_device(probe)
    _add_key(probe)


def _add_modality(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--modality",
        choices=_MODALITIES,
        help=f"of NIfTI and pictures, which do not say it: CT makes values HU (default: {default})",
    )


def _add_asking(parser: argparse.ArgumentParser) -> None:
    _add_batch_and_device(parser)
    parser.add_argument("--show-paths", action="store_true", help="also write each scan's file below the folder")


def _add_batch_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_positive, default=8, metavar="N", help="scans at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _fold(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _above_zero(text: str) -> float:
    if not (0 < (number := float(text)) < float("inf")):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
