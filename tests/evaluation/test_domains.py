"""AP by domain: of sets, of a part of a set, their mean and the worst, and what the results are compared with."""

import contextlib
import json
import math

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.engine.trainer import Trainer
from bnext.errors import ConfigError, DatasetError
from bnext.evaluation import build_evaluator, evaluate_model
from bnext.evaluation.domain_report import draw_domains, format_domains
from bnext.evaluation.domains import DomainResult, Share, gather_domains, read_specialists, summarize
from tests import tiny
from tests.evaluation.own_sets import edit, evaluate_perfect, make_set
from tests.evaluation.own_sets import load as load_own
from tests.evaluation.own_sets import registered as registered_own

NAN = math.nan


@pytest.fixture(scope="module")
def model(digits, tmp_path_factory):
    model = Trainer.build_model(tiny.load(tmp_path_factory.mktemp("model")))
    model.test_score_thresh = 0.0  # so that there is something to evaluate
    return model


@contextlib.contextmanager
def registered(**sets):
    """Register records in this scope, with the classes of the digits."""
    for name, records in sets.items():
        DatasetCatalog.register(name, lambda records=records: records)
        classes = MetadataCatalog.get("digits_val").thing_classes
        MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="coco")
    try:
        yield
    finally:
        for name in sets:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("fast", [True, False])
def test_a_part_of_the_images_is_evaluated_as_if_it_were_the_set(tmp_path, fast):
    content = make_set(num_images=8)
    rough = edit(content, bbox=lambda number, each: [each["bbox"][0] + 3 * (number % 5), *each["bbox"][1:]])
    some = {**content, "images": content["images"][::3]}
    ids = [image["id"] for image in some["images"]]
    some["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]

    with registered_own(tmp_path, val=content, some=some):
        cfg = load_own(tmp_path, "TEST.BNEXT.FAST_EVAL", fast)
        whole = build_evaluator(cfg, "own_val")
        whole.parts = {"day": ids, "night": [2]}
        results = evaluate_perfect(whole, rough)
        recalls = whole.recalls
        alone = evaluate_perfect(build_evaluator(cfg, "own_some"), {**rough, "images": some["images"]})["bbox"]

    of_day = whole.results_of_parts["day"]["bbox"]
    assert 0 < alone["AP"] != results["bbox"]["AP"]
    assert of_day == pytest.approx({name: alone[name] for name in of_day}, rel=1e-12, nan_ok=True)
    assert whole.recalls is recalls
    assert any(name.startswith("AP-") for name in alone)
    assert not any(name.startswith("AP-") for name in of_day)


def test_the_images_of_a_domain_may_be_parts_of_sets(model, digits, tmp_path):
    records = DatasetCatalog.get("digits_val")
    domains = ["day", "night", "day", ""]
    mixed = [{**record, "domain": name} if name else record for record, name in zip(records, domains, strict=True)]

    with registered(mixed_val=mixed, alone_val=[{**records[0], "domain": "day"}]):
        results = evaluate_model(tiny.load(tmp_path, "DATASETS.TEST", "('mixed_val', 'alone_val')"), model)
        one = evaluate_model(tiny.load(tmp_path / "one", "DATASETS.TEST", "('mixed_val',)"), model)

    assert list(results) == ["mixed_val", "alone_val", "domains"]
    assert list(results["domains"]) == ["day", "night", "mean", "worst"]
    assert list(one) == ["bbox", "domains"]
    stored = json.loads((tmp_path / "inference/results.json").read_text())
    assert stored["domains"]["day"]["sets"] == {"mixed_val": 2, "alone_val": 1}
    assert stored["domains"]["night"]["sets"] == {"mixed_val": 1}
    assert (tmp_path / "inference/domains.png").exists()


def test_sets_without_domains_and_of_one_have_what_they_had(model, digits, tmp_path):
    alone = evaluate_model(tiny.load(tmp_path / "a"), model)
    named = evaluate_model(tiny.load(tmp_path / "b", "DATASETS.DOMAINS.TEST", "('day',)"), model)
    assert alone.keys() == named.keys() == {"bbox"}
    first, second = (tmp_path / name / "inference" for name in "ab")
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert (first / "results.json").read_bytes() == (second / "results.json").read_bytes()


def test_mean_and_worst_are_of_domains_that_have_a_number():
    shares = [
        Share("day", "a", 10, {"bbox": {"AP": 20.0, "APl": NAN}}),
        Share("night", "b", 10, {"bbox": {"AP": 5.0, "APl": 1.0}}),
        Share("day", "c", 90, {"bbox": {"AP": 30.0, "APl": NAN}}),
        Share("fog", "d", 10, {"bbox": {"AP": NAN, "APl": NAN}}),
    ]
    domains = gather_domains(shares, {"night": {"bbox": {"AP": 9.0}}})
    assert [domain.name for domain in domains] == ["day", "night", "fog"]
    assert domains[1].find_gap("bbox") == 4.0

    summary = summarize(domains)
    assert summary["mean"]["bbox"] == {"AP": 15.0, "APl": 1.0}
    assert summary["worst"]["bbox"] == {"AP": 5.0, "APl": 1.0}
    assert summarize(domains[:1]) == {}

    lines = format_domains(domains).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["day", "a, c", "100", "25.0", "-", "-", "-"]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["night", "b", "10", "5.0", "1.0", "9.0", "+4.0"]


def test_a_picture_of_domains_without_a_number_can_be_drawn(tmp_path):
    domains = [DomainResult(name, {"a": 1}, {"bbox": {"AP": NAN}}) for name in ("a_$b$", "b" * 50)]
    assert draw_domains(domains, tmp_path / "domains.png").stat().st_size > 0


def test_a_specialist_is_refused_unless_its_results_are_of_the_sets_of_its_domain(digits, tmp_path):
    names, domains = "('digits_val', 'digits_train')", "('day', 'night')"
    cfg = tiny.load(tmp_path, "DATASETS.TEST", names, "DATASETS.DOMAINS.TEST", domains)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"digits_val": {"bbox": {"AP": 3.0, "APl": None, "AP-1": 2.0}}}))

    metrics = read_specialists(cfg, {"day": str(file)})["day"]["bbox"]
    assert metrics["AP"] == 3.0
    assert metrics.keys() == {"AP", "APl"}
    for files, named in (
        ({"night": file}, "digits_train"),
        ({"fog": file}, "'fog'"),
        ({"day": tmp_path}, "specialist"),
    ):
        with pytest.raises(ConfigError, match=named):
            read_specialists(cfg, {name: str(path) for name, path in files.items()})


def test_names_of_what_is_computed_over_domains_are_no_domains(digits, tmp_path):
    cfg = tiny.load(tmp_path, "DATASETS.DOMAINS.TEST", "('mean',)")
    with pytest.raises(DatasetError, match="'mean'"):
        evaluate_model(cfg, None)


def test_it_is_said_what_images_of_an_unseen_domain_were_taken_for(digits, tmp_path, bnext_log):
    records = [{**record, "domain": "fog"} for record in DatasetCatalog.get("digits_val")[:2]]
    norms = ("MODEL.FPN.NORM", "BN", "MODEL.BNEXT.FPN.POPULATION", "per_domain", "MODEL.BNEXT.DOMAINS.UNSEEN", "stream")
    sets = ("DATASETS.TEST", "('fog_val',)", "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    cfg = tiny.load(tmp_path, *norms, *sets, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)

    with registered(fog_val=records):
        model = Trainer.build_model(cfg)
        detections = []
        for _ in range(2):
            evaluate_model(cfg, model)
            detections.append((tmp_path / "inference/coco_instances_results.json").read_text())
    said = {id(record): record.getMessage() for record in bnext_log.records}  # two handlers may have one record
    lines = [line for line in said.values() if line.startswith("fog_val: ")]
    assert len(lines) == 2
    assert all("2 images of the domain 'fog'" in line for line in lines)
    assert detections[0] == detections[1], "the stream has begun anew"
