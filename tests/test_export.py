import hashlib
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dp_accounting import dp_event, pld
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from client.research_command import main
from tests.federation import saved_checkpoint
from tests.run_artefacts import SITES, round_records, study, without, write_run
from tests.test_research_command import NANO, nano_checkpoint
from unimiss_core import checkpoint, exported, keys, task_checkpoint, trained_by
from unimiss_core.errors import CheckpointError
from unimiss_core.model import MiT
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import PlanConfig, StudyConfig
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig
from unimiss_core.tasks import build_task_model
from unimiss_core.trained_by import TrainedBy


def tuned(folder: Path, part: str = "test", **figures: Any) -> Path:
    """A fine-tuned model of three classes of pictures, judged on scans of this part."""
    task = ClassificationConfig(kind="multi_class", rank=2, classes=("a", "b", "c|d"), input_size=(40, 44))
    model = build_task_model(NANO, task, seed=3, pretrained=None)
    manifest = TaskManifest(
        task=task,
        model=NANO,
        plan=PlanConfig(),
        began_with="checkpoint",
        pretrained_digest="ab" * 32,
        taught_by_labels=False,
        trained="full",
        seed=3,
        epoch=7,
    )
    folder.mkdir()
    task_checkpoint.save(folder, dict(model.named_parameters()), manifest)
    (folder / "metrics.json").write_text(json.dumps({"parts": {"validation": {"scans": 3}, part: figures}}))
    return folder


def in_a_run(out: Path, told: StudyConfig, round: int) -> Path:
    """A checkpoint where a run keeps it."""
    student, teacher = (tensors_of(build_network(told.model, seed=seed)) for seed in (0, 1))
    folder = out / "checkpoints" / checkpoint.folder_name(round)
    return saved_checkpoint(folder, round, study=told, student=student, teacher=teacher)


def export(folder: Path, out: Path, *words: str) -> int:
    return main(["export", str(folder), "--to", "safetensors", "--out", str(out), *words])


def test_the_card_of_a_federations_model_counts_rounds_and_points_to_the_study(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "model")
    _, manifest = task_checkpoint.load(folder)
    (folder / "model.json").write_text(manifest.model_copy(update={"trained_in": "rounds"}).model_dump_json())
    assert export(folder, tmp_path / "out") == 0
    told = (tmp_path / "out" / "README.md").read_text()
    assert "`full`, 7 rounds, seed 3" in told
    assert "Fine-tuned by a federation" in told
    assert "stands in its study, if anything was" in told
    assert "one place" not in told


@pytest.mark.parametrize(("words", "seed"), [((), 1), (("--student",), 0)])
def test_safetensors_hold_the_encoder_by_its_own_names(tmp_path: Path, words: tuple[str, ...], seed: int) -> None:
    folder, out = nano_checkpoint(tmp_path / "round-0001"), tmp_path / "out"
    assert export(folder, out, *words) == 0
    backbone = build_network(NANO, seed=seed).backbone
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == backbone.state_dict().keys()
    assert all(torch.equal(tensor, backbone.state_dict()[name]) for name, tensor in tensors.items())
    model, config = exported.load(out)
    x = torch.rand(2, 1, 14, 40, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(x), backbone(x), rtol=0, atol=0)
    assert (config.part, config.num_features, config.ranks) == ("student" if words else "teacher", 32, (2, 3))
    assert config.source_digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_a_fine_tuned_model_comes_back_as_it_was(tmp_path: Path) -> None:
    folder, out = tuned(tmp_path / "tuned"), tmp_path / "out"
    assert export(folder, out, "--licence", "CC-BY-NC-4.0") == 0
    (model, config), x = exported.load(out), torch.rand(2, 1, 40, 44)
    with torch.no_grad():
        assert torch.equal(model(x), task_checkpoint.load(folder)[0](x))
    assert config.task is not None
    assert (config.holds, config.task.classes, config.licence) == ("classification", ("a", "b", "c|d"), "CC-BY-NC-4.0")


def test_the_card_of_a_fine_tuned_model_tells_its_figures(tmp_path: Path) -> None:
    auc = {"value": 0.8125, "low": 0.7, "high": 0.9}
    folder = tuned(tmp_path / "tuned", scans=12, patients=9, auc=auc, **{"auc/a": auc}, ece={"value": None})
    assert export(folder, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "license: unknown",
        "# Multi-class classification of images",
        "40 x 44 (H, W)",
        "| classes | a, b, c\\|d |",
        "ab" * 32,
        "12 scans of 9 patients that it never saw",
        "| `auc` | 0.812 (0.700 to 0.900) |",
        "**Not for diagnosis.**",
        "not stated: whoever publishes this must",
    ):
        assert told in card, told
    assert "auc/a" not in card
    assert "`ece`" not in card


class Shown(HTMLParser):
    """What a reader of the page sees, and which elements it is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, _: object) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_card_shows_names_as_they_are_and_runs_nothing_of_them(tmp_path: Path) -> None:
    """Oracle: a Markdown renderer that lets HTML through, as those of model hubs do."""
    odd = ("<script>alert(1)</script>", "*[x](javascript:y)* `z`", "a|b &lt; c\\d ~~e~~ _f_ g_h\n# i")
    task = ClassificationConfig(kind="multi_class", rank=2, classes=odd, input_size=(40, 44))
    folder = tuned(tmp_path / "tuned", scans=12, patients=9, **{"<b>": {"value": 1}, "auc": {"value": "<i>"}})
    model, manifest = task_checkpoint.load(folder)
    task_checkpoint.save(folder, dict(model.named_parameters()), manifest.model_copy(update={"task": task}))
    assert export(folder, tmp_path / "out", "--licence", "no") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front, page = card.split("---\n")[1:]
    assert yaml.safe_load(front)["license"] == "no"  # no word of YAML's own
    shown = Shown(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page))
    assert ", ".join(odd).replace("\n", " ") in "".join(shown.texts)
    assert shown.elements <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "code", "pre"}


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ('{"parts": {"validation": {"scans": 4, "patients": 2}}}', "4 scans of 2 patients that decided when training"),
        ('{"parts": [1]}', None),
        ('{"parts": {"test": 3}}', None),
        ("no json", None),
        pytest.param("[" * 50_000, None, id="deep"),
    ],
)
def test_what_stopped_the_training_is_not_called_unseen(tmp_path: Path, metrics: str, told: str | None) -> None:
    folder = tuned(tmp_path / "tuned")
    (folder / "metrics.json").write_text(metrics)
    assert export(folder, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (told in card) if told else ("judged on" not in card)
    assert "never saw" not in card


def test_the_card_counts_sites_and_names_none(tmp_path: Path) -> None:
    told = study(4, model=NANO.model_dump(mode="json"))
    records = round_records(4)
    for record in records[:3]:
        record["sites"]["gamma-mixed"] = without(record["sites"]["gamma-mixed"], "refused", "policy")
    write_run(tmp_path / "run", records, rounds=4, model=NANO.model_dump(mode="json"))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "sit')
    for round, kinds, sites in ((3, "images (2D) at 1 site, volumes (3D) at 1 site", 2), (4, "at 2 sites, ", 3)):
        assert export(in_a_run(tmp_path / "run", told, round), tmp_path / f"out{round}") == 0
        card = (tmp_path / f"out{round}" / "README.md").read_text()
        assert f"| sites | {sites} |" in card
        assert kinds in card
        assert f"| rounds | {round} of 4, 40 steps each |" in card
        assert told.digest() in card
        assert "Nothing is promised." in card
        assert not any(name in card for name in (*SITES, told.name, str(tmp_path)))


def test_the_card_tells_what_a_patient_has_cost_by_then(tmp_path: Path) -> None:
    """Against another accountant: of a site with both ranks, the dearest, by privacy loss distributions."""
    private = {"mode": "patient", "max_epsilon": 50.0, "noise_multiplier": 1.5, "centre_noise": 9.0}
    settings = {
        "privacy": private,
        "aggregation": {"weighting": "uniform", "max_size_ratio": None},
        "objective": {"centre_momentum": 0.999995},
        "model": NANO.model_dump(mode="json"),
    }
    told = study(4, **settings)
    write_run(tmp_path / "run", round_records(4), rounds=4, **settings)
    assert export(in_a_run(tmp_path / "run", told, 2), tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    found = float(card.split("By this round a patient has cost ")[1].split()[0])
    accountant = pld.PLDAccountant()
    for looks in (1, 2):  # an image is looked at in one way, a volume in two; 2 rounds of 40 steps, half for each
        noise = (1.5**-2 + looks * 9.0**-2) ** -0.5
        event = dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(noise))
        accountant.compose(dp_event.SelfComposedDpEvent(event, 40))
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)
    assert "epsilon of at most 50 at delta 1e-05" in card


def test_a_checkpoint_that_was_handed_on_brings_its_counts_along(tmp_path: Path) -> None:
    settings = {
        "privacy": {"mode": "site", "max_epsilon": 900.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "sites": 3},
        "aggregation": {"weighting": "uniform", "max_size_ratio": None},
        "model": NANO.model_dump(mode="json"),
    }
    told = study(4, **settings)
    write_run(tmp_path / "run", round_records(4), rounds=4, **settings)
    handed = tmp_path / "handed-on"
    shutil.move(in_a_run(tmp_path / "run", told, 2), handed)
    shutil.move(tmp_path / "run" / "study.yaml", handed)
    trained_by.write(handed, TrainedBy(sites=5, with_images=4, with_volumes=2, site_epsilon=12.34))
    assert export(handed, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sites | 5 |" in card
    assert "images (2D) at 4 sites, volumes (3D) at 2 sites" in card
    assert "By this round a site has paid 12.3." in card


def test_a_card_says_no_less_than_was_released_where_the_metrics_have_lost_lines(tmp_path: Path) -> None:
    settings = {
        "privacy": {"mode": "site", "max_epsilon": 50.0, "noise_multiplier": 2.0, "clip_norm": 1.0, "sites": 3},
        "aggregation": {"weighting": "uniform", "max_size_ratio": None},
        "model": NANO.model_dump(mode="json"),
    }
    first = round_records(1)
    first[0]["global"]["site_epsilon"] = 1.99
    write_run(tmp_path / "run", first, rounds=4, **settings)
    assert export(in_a_run(tmp_path / "run", study(4, **settings), 3), tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    paid = float(card.split("By this round a site has paid ")[1].split()[0].rstrip("."))
    accountant = pld.PLDAccountant()
    accountant.compose(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(2.0), 3))
    assert paid == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)


def test_what_is_not_known_of_a_checkpoint_is_not_made_up(tmp_path: Path) -> None:
    folder = in_a_run(tmp_path / "run", study(4, model=NANO.model_dump(mode="json")), 2)
    write_run(tmp_path / "run", round_records(4), rounds=5)  # of another study
    assert export(folder, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sites | not known here |" in card
    assert "Take it as if nothing were promised." in card


def test_sites_are_counted_from_metrics_that_were_cut_or_written_twice(tmp_path: Path) -> None:
    def line(round: int, sites: dict[str, Any], **whole: float) -> str:
        return json.dumps({"round": round, "sites": sites, "global": whole})

    ok = {"status": "ok", "scans": {"2d": 3, "3d": 0}}
    lines = [
        line(1, {"a": ok, "b": ok}, site_epsilon=1.0),  # begun again below: does not count
        line(1, {"a": ok, "b": {"status": "absent"}}, site_epsilon=1.5),
        line(2, {"c": {"status": "late", "scans": {"2d": 1, "3d": 1}}, "a": {"status": "error"}}, site_epsilon=2.5),
        line(3, {"d": ok}, site_epsilon=9.0),
        '{"round": 2, "sites": {"e": {"sta',
        "[]",
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    told = TrainedBy(sites=2, with_images=2, with_volumes=1, site_epsilon=2.5)
    assert trained_by.of_run(tmp_path, 2) == told
    assert trained_by.of_run(tmp_path, 0) is None
    assert trained_by.of_run(tmp_path / "nowhere", 2) is None


# ------------------------------------------------------------------------------------------------------- bad input


DEEP = "[" * 50_000


def spoilt(path: Path, change: str) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif change == DEEP:
        path.write_text(DEEP)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": change}))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("round-0001/teacher.safetensors", "", "teacher.safetensors was changed after it was written"),
        ("round-0001/manifest.json", 9, "has format version 9, this program reads 1"),
        pytest.param("round-0001/manifest.json", DEEP, "is not a manifest of this program", id="deep manifest"),
        ("tuned/model.safetensors", "", "was changed after it was written"),
        ("tuned/model.json", 9, "has format version 9, this program reads 1"),
        pytest.param("tuned/model.json", DEEP, "is no description of a fine-tuned model", id="deep model.json"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "onnx", "monai"])
def test_what_is_damaged_or_of_another_version_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Any, told: str, form: str
) -> None:
    nano_checkpoint(tmp_path / "round-0001")
    tuned(tmp_path / "tuned")
    spoilt(tmp_path / name, change)
    arguments = ["export", str((tmp_path / name).parent), "--to", form, "--out", str(tmp_path / "out")]
    assert main(arguments) == 4
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("source", "words", "code", "told"),
    [
        ("round-0001", ["--to", "monai"], 2, "a bundle answers a task"),
        ("round-0001", ["--to", "safetensors", "--channels", "3"], 2, "--channels are of --to onnx"),
        ("round-0001", ["--to", "onnx", "--input-size", "64"], 2, "give H W or D H W, at least"),
        ("round-0001", ["--to", "onnx", "--input-size", "4", "64", "64"], 2, "--input-size 4 64 64: give H W or D H W"),
        ("round-0001", ["--to", "onnx", "--input-size", "16", "64", "64", "--channels", "3"], 2, "have one channel"),
        ("round-0001", ["--to", "safetensors", "--licence", "my own\x1b"], 2, "'my own\\x1b': give an SPDX identifier"),
        ("tuned", ["--to", "safetensors", "--student"], 2, "has no student and no signature; leave both out"),
        ("tuned", ["--to", "onnx", "--input-size", "16", "64", "64"], 2, "is for scans of 2 axes, 3 were given"),
        ("nowhere", ["--to", "safetensors"], 4, "nowhere: does not exist"),
        ("full", ["--to", "safetensors"], 4, "holds neither a checkpoint (manifest.json) nor a fine-tuned model"),
        ("x" * 300, ["--to", "safetensors"], 2, "cannot be used (File name too long); check the paths given"),
        ("round-0001", ["--to", "onnx", "--input-size", "999999", "999999"], 2, "need more memory than there is"),
        ("full/mine.pth", ["--to", "safetensors"], 4, "turn released weights into a checkpoint first: unimiss import"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, words: list[str], code: int, told: str
) -> None:
    nano_checkpoint(tmp_path / "round-0001")
    tuned(tmp_path / "tuned")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.pth").write_text("mine")
    assert main(["export", str(tmp_path / source), *words, "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("unimiss export: ")
    assert told in said
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "mine"):
        assert export(folder, out) == 2
        assert "exists and is not empty; give a new folder" in capsys.readouterr().err
    assert export(folder, tmp_path / "full" / "mine" / "below") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (
            "onnx",
            "onnx and onnxruntime and onnxscript must be installed for --to onnx: pip install -e '.[export]' in this",
        ),
        ("monai", "monai must be installed for --to monai: pip install -e '.[finetune]' in this"),
    ],
)
def test_a_missing_extra_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str, told: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["export", str(tmp_path / "nowhere"), "--to", form, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


def test_an_unsigned_checkpoint_is_refused_where_a_signature_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nano_checkpoint(tmp_path / "round-0001")
    (tmp_path / "signing.pub").write_text(keys.public_line(keys.new_signing_key().public_key()))
    assert export(folder, tmp_path / "out", "--key", str(tmp_path / "signing.pub")) == 4
    assert "holds no manifest.sig" in capsys.readouterr().err


def test_an_exported_folder_that_was_changed_is_not_loaded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(nano_checkpoint(tmp_path / "round-0001"), out) == 0
    config = (out / "config.json").read_text()
    for change, told in (
        ({"format_version": 3}, "has format version 3, this program reads 2"),
        ({"sha256": {}}, "was changed after it was written"),
        ({"model": {**NANO.model_dump(mode="json"), "size": "tiny"}}, "are not those of the model in config.json"),
        ({"extra": 1}, "is not of this program"),
    ):
        (out / "config.json").write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(CheckpointError, match=told):
            exported.load(out)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        exported.load(tmp_path)


def test_an_exported_encoder_is_asked_as_timms_models_are(tmp_path: Path) -> None:
    assert export(nano_checkpoint(tmp_path / "round-0001"), tmp_path / "out") == 0
    model, _ = exported.load(tmp_path / "out")
    assert isinstance(model, MiT)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(torch.rand(2, 1, 40, 57)))
    assert features.shape == (2, model.num_features)
