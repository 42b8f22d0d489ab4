"""Domains of a checkpoint: a folder of its own whose config loads it, and whatever was not spoken of as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from bnext.checkpoints import load_model
from bnext.cli import main
from bnext.cli.domain import DomainRequest, change_domains
from bnext.cli.export import ExportRequest, export_checkpoint
from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.errors import BNextError, CheckpointError, ConfigError, DatasetError
from bnext.scope import use_domain
from bnext.surgery import list_domains
from tests import tiny

SLOW = pytest.mark.slow
OWN = {"STATISTICS": "per_domain", "POPULATION": "per_domain", "AFFINE": "per_domain"}
NAMES = ("MODEL.BNEXT.DOMAINS.NAMES", "('day', 'dusk')")


def answer(place, **answers):
    return tuple(word for key, value in answers.items() for word in (f"MODEL.BNEXT.{place}.{key}", value))


# Row 4 of Table 5 in the head, which detectron2's own can hold.
RETINANET = (*NAMES, *answer("RESNETS", **OWN), *answer("RETINANET", POPULATION="per_level", AFFINE="shared"))
RETINANET += ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
RCNN = (*NAMES, *answer("RESNETS", POPULATION="per_domain"), *answer("ROI_BOX_HEAD", **OWN))
RCNN += (*answer("ROI_MASK_HEAD", **OWN), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def save(path, *opts, config=tiny.CONFIG):
    """Weights whose domains differ, and which detect something."""
    torch.manual_seed(0)
    model = build_model(tiny.load(path.parent, *opts, config=config))
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if ".day." in key or ".dusk." in key or ("subnet" in key and "running" in key):
            value += (torch.rand(value.shape, generator=generator) / 10).to(value.dtype)
    torch.save({"model": model.state_dict(), "iteration": 5, "optimizer": {}, "classes": ["a"]}, path)
    return path


def load(weights, *opts, config=tiny.CONFIG):
    return tiny.load(weights.parent / "unused", "MODEL.WEIGHTS", weights, *opts, config=config)


@pytest.fixture(scope="module")
def with_domains(digits, tmp_path_factory):
    return save(tmp_path_factory.mktemp("domains") / "in.pth", *RETINANET)


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """A folder of a user's: pictures, also in a folder below it, and other files."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "more").mkdir()
    for number, record in enumerate(DatasetCatalog.get("digits_val")):
        shutil.copy(record["file_name"], folder / ("more" if number % 2 else "") / f"{number}.PNG")
    (folder / "notes.txt").write_text("taken in November")
    (folder / "._1.png").write_text("of a Macintosh")
    return folder


def read(folder):
    return torch.load(folder / "model.pth")["model"]


def differ(first, second):
    return {key for key in first if not torch.equal(first[key], second[key])}


def test_a_domain_from_a_folder_of_pictures(with_domains, pictures, tmp_path, capsys):
    output, before = tmp_path / "out", with_domains.read_bytes()
    request = DomainRequest("add", "night", str(output), images=str(pictures), like="dusk")
    report = change_domains(load(with_domains, *RETINANET), request)
    assert with_domains.read_bytes() == before
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "model.pth", "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    old, new = torch.load(with_domains)["model"], read(output)
    assert not differ(old, new)
    added = {key: value for key, value in new.items() if key not in old}
    assert len(added) == 5 * 21
    moved = {key.rpartition(".")[2] for key, value in added.items() if not torch.equal(value, old[as_dusk(key)])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}

    assert report["statistics"]["num_samples"] == 4
    assert len(report["statistics"]["estimates"]) == 21, "those of the new domain alone"
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "mean moved" in capsys.readouterr().out

    cfg = load_config(str(output / "config.yaml"))
    assert list_domains(load_model(cfg, cfg.MODEL.WEIGHTS)) == ("day", "dusk", "night")
    assert "classes" in torch.load(output / "model.pth")
    assert "iteration" not in torch.load(output / "model.pth")


def as_dusk(key):
    return key.replace(".night.", ".dusk.")


@SLOW
def test_the_selected_detector_is_detectron2s(with_domains, tmp_path, capsys):
    output = tmp_path / "out"
    change_domains(load(with_domains, *RETINANET), DomainRequest("select", "dusk", str(output)))
    compare_with_plain(load(with_domains, *RETINANET), output)
    assert "4 pictures of digits_val" in capsys.readouterr().out


@torch.no_grad()
def compare_with_plain(cfg, output):
    """The folder in detectron2's own hands, on pictures of the set."""
    plain_cfg = get_cfg()
    plain_cfg.merge_from_file(str(output / "config.yaml"))
    plain = build_model(plain_cfg)
    assert type(plain).__module__.startswith("detectron2.")
    incompatible = DetectionCheckpointer(plain).load(plain_cfg.MODEL.WEIGHTS)
    assert not incompatible
    assert not differ(plain.state_dict(), read(output))

    whole = load_model(cfg, cfg.MODEL.WEIGHTS)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    (mine,) = plain.eval()([{"image": images[0]}])
    with use_domain("dusk"):
        (expected,) = whole([{"image": images[0]}])
    mine, expected = mine["instances"], expected["instances"]
    assert len(expected) > 0
    torch.testing.assert_close(mine.scores, expected.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-4)


@SLOW
def test_a_two_stage_detector_with_domains_in_its_heads(pictures, tmp_path):
    weights = save(tmp_path / "in.pth", *RCNN, config=tiny.RCNN)
    cfg = load(weights, *RCNN, config=tiny.RCNN)
    change_domains(cfg, DomainRequest("select", "dusk", str(tmp_path / "plain")))
    compare_with_plain(cfg, tmp_path / "plain")

    request = DomainRequest("add", "night", str(tmp_path / "added"), images=str(pictures))
    report = change_domains(cfg, request)
    reached = {row["path"] for row in report["statistics"]["estimates"] if row["count"]}
    assert {"roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm"} <= reached


@SLOW
def test_drop_merge_and_select_in_the_form_of_bnext(with_domains, tmp_path):
    old = torch.load(with_domains)["model"]
    sets = ("DATASETS.TEST", "('digits_val', 'digits_train')", "DATASETS.DOMAINS.TEST", "('dusk', 'day')")
    cfg = load(with_domains, *RETINANET, *sets)
    for request, names, population, test_domains in (
        (DomainRequest("drop", "dusk", str(tmp_path / "a")), ("day",), "per_domain", ("day",)),
        (
            DomainRequest("merge", "all", str(tmp_path / "b"), of=("day=3", "dusk=1")),
            ("all",),
            "per_domain",
            ("all",) * 2,
        ),
        (DomainRequest("select", "day", str(tmp_path / "c"), form="bnext"), (), "shared", ("dusk", "day")),
    ):
        change_domains(cfg, request)
        new_cfg = load_config(f"{request.output}/config.yaml")
        norms, of_sets = new_cfg.MODEL.BNEXT, new_cfg.DATASETS.DOMAINS.TEST
        written = (norms.DOMAINS.NAMES, norms.RESNETS.POPULATION, of_sets)
        assert written == (names, population, test_domains)
        assert list_domains(load_model(new_cfg, new_cfg.MODEL.WEIGHTS)) == names
        check_run(new_cfg, eval_only=True)

    name = "backbone.bottom_up.stem.conv1.norm"
    assert not differ(read(tmp_path / "a"), old)
    assert torch.equal(read(tmp_path / "c")[f"{name}.weight"], old[f"{name}.day.weight"])
    merged = read(tmp_path / "b")[f"{name}.all.running_mean"]
    torch.testing.assert_close(merged, 0.75 * old[f"{name}.day.running_mean"] + 0.25 * old[f"{name}.dusk.running_mean"])


def test_what_is_refused_writes_nothing(with_domains, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    files = sorted(path.name for path in with_domains.parent.iterdir())
    output = str(tmp_path / "out")
    cfg = load(with_domains, *RETINANET)
    cases = [
        (load(with_domains), DomainRequest("add", "night", output), ConfigError, "per_domain"),
        (
            load(with_domains.with_name("no.pth"), *RETINANET),
            DomainRequest("add", "x", output),
            CheckpointError,
            "no.pth",
        ),
        (cfg, DomainRequest("remove", "day", output), ConfigError, "ACTION"),
        (cfg, DomainRequest("add", "x", str(with_domains.parent)), ConfigError, "--output"),
        (cfg, DomainRequest("add", "x", str(tmp_path / "no" / "out")), ConfigError, "--output"),
        (cfg, DomainRequest("add", "x", output, images=str(tmp_path / "empty")), DatasetError, "empty"),
        (cfg, DomainRequest("add", "x", output, images=str(tmp_path / "no")), ConfigError, "--images"),
        (cfg, DomainRequest("add", "x", output, images="digits_vla"), DatasetError, "digits_val"),
        (cfg, DomainRequest("add", "x", output, images=str(tmp_path / "broken")), DatasetError, "a.jpg"),
        (cfg, DomainRequest("drop", "day", output, images=str(pictures)), ConfigError, "--images"),
        (cfg, DomainRequest("add", "x", output, form="bnext"), ConfigError, "--form"),
        (cfg, DomainRequest("add", "x", output, source_samples=16), ConfigError, "--images"),
        (cfg, DomainRequest("merge", "x", output), ConfigError, "--of"),
        (cfg, DomainRequest("merge", "x", output, of=("day", "day")), ConfigError, "--of"),
        (cfg, DomainRequest("merge", "x", output, of=("day=5", "dusk")), ConfigError, "--of"),
        (cfg, DomainRequest("merge", "x", output, of=("day=many", "dusk=5")), ConfigError, "--of"),
    ]
    for case_cfg, request, kind, thing in cases:
        with pytest.raises(kind, match=thing):
            change_domains(case_cfg, request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty"]
    assert sorted(path.name for path in with_domains.parent.iterdir()) == files


@SLOW
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of detectron2's traces
def test_an_export_is_of_one_domain(with_domains, tmp_path):
    file = tmp_path / "dusk.ts"
    cfg = load(with_domains, *RETINANET)
    report = export_checkpoint(cfg, ExportRequest(str(file), domain="dusk", fold=True, num_images=1))
    assert (report["domain"], report["norms_left"]) == ("dusk", ["head.bbox_subnet.1", "head.cls_subnet.1"])

    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    outputs = dict(zip(report["outputs"], torch.jit.load(file)(picture), strict=True))
    for domain, is_equal in (("dusk", True), ("day", False)):
        with torch.no_grad(), use_domain(domain):
            (expected,) = load_model(cfg, cfg.MODEL.WEIGHTS)([{"image": picture}])
        scores = expected["instances"].scores
        assert torch.allclose(outputs["scores"][: len(scores)], scores[: len(outputs["scores"])], atol=1e-3) == is_equal


@SLOW
def test_a_detector_without_domains_gets_its_first_one_by_the_keys_that_the_refusal_names(weights, pictures, tmp_path):
    request = DomainRequest("add", "night", str(tmp_path / "out"), images=str(pictures))
    keys = ("MODEL.BNEXT.DOMAINS.NAMES", "('day',)", "MODEL.BNEXT.RESNETS.POPULATION", "per_domain")
    with pytest.raises(ConfigError) as refused:
        change_domains(load(weights), request)
    assert all(key in str(refused.value) for key in keys)

    change_domains(load(weights, *keys), request)
    old, new = torch.load(weights)["model"], read(tmp_path / "out")
    assert not [key for key, value in new.items() if ".night." not in key and differs_from(old, key, value)]
    assert differ({"x": new["backbone.bottom_up.stem.conv1.norm.night.running_mean"]}, {"x": torch.zeros(16)})


def differs_from(old, key, value):
    return not torch.equal(value, old[key.replace(".day.", ".")])


@SLOW
@pytest.mark.parametrize(
    ("opts", "request_of", "thing"),
    [
        ((), ("add", "day"), "name of its own"),
        ((), ("drop", "night"), "to drop"),
        ((), ("select", "night"), "to select"),
        (("MODEL.BNEXT.RETINANET.EPS", 1e-3), ("select", "day"), "eps"),
        (answer("RETINANET", INFERENCE="mini_batch"), ("select", "day"), "mini_batch"),
        (answer("RESNETS", FROZEN="statistics"), ("add", "night", "digits_val"), "not frozen"),
    ],
)
def test_what_the_model_refuses_writes_nothing(with_domains, tmp_path, opts, request_of, thing):
    action, name, *images = request_of
    request = DomainRequest(action, name, str(tmp_path / "out"), images=images[0] if images else None)
    with pytest.raises(BNextError, match=thing):
        change_domains(load(with_domains, *RETINANET, *opts), request)
    assert not list(tmp_path.iterdir())


@SLOW
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # detectron2's file
def test_the_command_and_what_follows_it(with_domains, pictures, tmp_path, capsys):
    words = ["--config-file", str(tiny.CONFIG), "--output", str(tmp_path / "out"), *map(str, RETINANET)]
    pairs = ["MODEL.WEIGHTS", str(with_domains), "OUTPUT_DIR", str(tmp_path / "unused")]
    assert main.main(["domain", "add", "night", "--images", str(pictures), *words, *pairs]) == 0
    config = str(tmp_path / "out" / "config.yaml")
    before = (tmp_path / "out" / "config.yaml").read_bytes()
    assert main.main(["evaluate", "--config-file", config, "DATASETS.DOMAINS.TEST", "('night',)"]) == 0
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before
    assert "| bbox |" in capsys.readouterr().out

    training = ["OUTPUT_DIR", str(tmp_path / "training"), "SOLVER.STEPS", "[]"]
    training += ["DATASETS.DOMAINS.TRAIN", "('night',)", "DATASETS.DOMAINS.TEST", "('night',)"]
    for number, options in enumerate(([], ["--resume"])):
        words = ["--config-file", config, *options, *training, "SOLVER.MAX_ITER", str(number + 1)]
        assert main.main(["train", *words]) == 0
    old, new = read(tmp_path / "out"), torch.load(tmp_path / "training" / "model_final.pth")["model"]
    assert {key for key in differ(old, new) if ".day." in key or ".dusk." in key} == set()
    assert any(".night.weight" in key for key in differ(old, new))
